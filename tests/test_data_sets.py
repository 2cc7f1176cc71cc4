"Names and paths: what `find` gives for each, and what the list of data sets says"
import hashlib, zipfile
from dataclasses import replace
import numpy as np
import pytest
from PIL import Image
from draw_nbdev import data
from draw_nbdev.data_sets import DATA_SETS, find

@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "An empty data folder and an empty cache"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('DRAW_DATA', str(tmp_path / 'root'))
    for folder in ('root', 'cache/draw_nbdev'): (tmp_path / folder).mkdir(parents=True)
    data.has_fixed.cache_clear()
    yield tmp_path / 'root', tmp_path / 'cache/draw_nbdev'
    data.has_fixed.cache_clear()

def pictures(folder, count=12, size=(6, 4)):
    "A folder of colour pictures, wider than high"
    folder.mkdir()
    for i in range(count): Image.new('RGB', size, (i, 2 * i, 3 * i)).save(folder / f'{i:02}.png')
    return folder

def packed(folder, file):
    "The same as a zip"
    with zipfile.ZipFile(file, 'w') as archive:
        for path in folder.iterdir(): archive.write(path, path.name)
    return file

@pytest.mark.parametrize('name', [name for name in DATA_SETS if name not in ('svhn', 'cifar10')])
def test_names(name, monkeypatch):
    "Each is a set of its own, in three splits, from the folder that is asked for"
    seen, entry = [], DATA_SETS[name]
    def spy(split, root=None):
        seen.append((split, root))
        return entry.make(split, None)
    monkeypatch.setitem(DATA_SETS, name, replace(entry, make=spy))
    if name in ('mnist', 'mnist_fixed'):
        monkeypatch.setattr(data, 'FIXED_URL', 'http://127.0.0.1:9/')
    if name == 'mnist_fixed':
        with pytest.raises(FileNotFoundError, match='mnist_fixed'): find(name, 'test')
        return
    found = find(name, 'valid', root='somewhere')
    assert seen == [('valid', 'somewhere')] and found.split == 'valid' and len(found) == 10_000
    assert found.name == ('mnist_once' if name == 'mnist' else name)
    side = {'two_digits': 60, 'cluttered_mnist': 100}.get(name, 28)
    assert found.shape == (1, side, side)
    with pytest.raises(ValueError, match='of a size of its own; leave the size out'):
        find(name, 'valid', size=28)

def test_fixed_binarisation_where_it_is_at_hand(places, monkeypatch):
    "`mnist` is the paper's own data as soon as its file is there"
    bits = np.random.default_rng(0).integers(0, 2, (3, 784), dtype=np.uint8)
    checksum = hashlib.md5(bits.tobytes()).hexdigest()
    monkeypatch.setattr(data, 'FIXED_MD5', dict.fromkeys(data.SPLITS, checksum))
    packed_bits = np.packbits(bits, axis=1)
    np.savez(places[1] / data.FIXED_FILE, **dict.fromkeys(data.SPLITS, packed_bits))
    for name in ('mnist', 'mnist_fixed'):
        found = find(name, 'test')
        assert found.name == 'mnist_fixed' and found.checksum == checksum

def test_own_pictures(tmp_path, places):
    "By their path or, as a zip in the data folder or the cache, by its name; resized if asked for"
    folder = pictures(tmp_path / 'mine')
    for name in (str(folder), packed(folder, places[0] / 'here.zip').stem,
                 packed(folder, places[1] / 'there.zip').stem):
        assert find(name, 'train').shape == (3, 4, 6)
        assert find(name, 'train', 5).shape == (3, 5, 5)
        assert find(name, 'train', (3, 7)).shape == (3, 3, 7)
        assert len(find(name, 'train')) == 10 and len(find(name, 'test')) == 1
    assert find('here', 'test').name == 'here'
    with pytest.raises(FileNotFoundError, match='nowhere: neither a folder or zip of images'):
        find('nowhere', 'train')
    with pytest.raises(ValueError, match='unknown split'): find(folder, 'tset')

@pytest.mark.parametrize('name', ['svhn', 'cifar10'])
def test_stand_ins(name, tmp_path, places, monkeypatch):
    "A zip takes the place of a colour set as long as there are no official files"
    packed(pictures(tmp_path / 'mine'), places[0] / f'{name}_sample.zip')
    found = find(name, 'train')
    assert found.name == f'{name}_sample' and found.shape == (3, 4, 6)
    assert f'{name}_sample.zip stands in for it' in DATA_SETS[name].state()
    official = ('svhn', 'train.tar.gz') if name == 'svhn' else ('cifar-10-batches-py', 'data')
    (places[1] / official[0]).mkdir()
    (places[1] / official[0] / official[1]).write_bytes(b'')
    entry = replace(DATA_SETS[name], make=lambda split, root: ('official', split))
    monkeypatch.setitem(DATA_SETS, name, entry)
    assert find(name, 'test') == ('official', 'test')
    assert 'stands in' not in DATA_SETS[name].state()

def test_list(places):
    "Where files are, in the data folder or in the cache, and which are missing"
    rows = DATA_SETS
    assert list(rows) == ['mnist', 'mnist_fixed', 'mnist_once', 'mnist_redrawn', 'mnist_grey',
                          'two_digits', 'cluttered_mnist', 'svhn', 'cifar10']
    assert rows['mnist_fixed'].state().startswith('missing: downloaded when first used')
    assert 'put svhn/train.tar.gz, svhn/extra.tar.gz, svhn/test.tar.gz from' in rows['svhn'].state()
    assert {rows[name].state() for name in rows if 'mnist_' in name} >= {'packaged'}
    for place in reversed(places):
        np.savez(place / data.FIXED_FILE, a=1)
        (place / 'cifar-10-python.tar.gz').write_bytes(b'')
        (place / 'svhn').mkdir()
        for part in ('train', 'test'): (place / f'svhn/{part}.tar.gz').write_bytes(b'')
        assert rows['mnist_fixed'].state() == f'found: {place / data.FIXED_FILE}'
        assert rows['cifar10'].state() == f'found: {place}/cifar-10-python.tar.gz'
        found, missing = rows['svhn'].state().split('; ')
        assert found == f'found: {place}/svhn/train.tar.gz, {place}/svhn/test.tar.gz'
        assert missing.startswith('missing: put svhn/extra.tar.gz from')
