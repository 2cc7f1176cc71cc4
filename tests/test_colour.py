"House numbers and CIFAR-10: layouts, faults and the cache"
import errno, hashlib, io, os, pickle, shutil, struct, tarfile, tracemalloc, zipfile, zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from draw_nbdev import archives, colour, data
from draw_nbdev.archives import SVHN_SHA256, find_parts
from draw_nbdev.cifar import cifar10
from draw_nbdev.colour import PatchImages, crop_number, digit_boxes, grown_box, house_numbers, svhn
from draw_nbdev.data import SPLITS
from draw_nbdev.data_sets import find
from draw_nbdev.images import image_folder

REAL = Path(os.environ.get('DRAW_DATA', ''))
GENUINE, SAMPLE = REAL/'svhn_genuine', REAL/'svhn_sample.zip'


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    "An empty data folder and an empty cache, and a network that answers nothing"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    monkeypatch.setenv('DRAW_DATA', str(tmp_path/'root'))
    monkeypatch.setattr(CIFAR10, 'url', 'http://127.0.0.1:9/cifar-10-python.tar.gz')
    (tmp_path/'root').mkdir()
    return tmp_path/'root', tmp_path/'cache'/'draw_nbdev'


def one_line(error): return '\n' not in str(error.value) and str(error.value)

def leftovers(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


# Files in the official layout

def digit_struct(records):
    """digitStruct.mat as MATLAB 7.3 writes it; records: name -> boxes as (left, top, width,
    height), or None for an empty struct"""
    stream = io.BytesIO()
    with h5py.File(stream, 'w') as file:
        refs = file.create_group('#refs#')
        def store(values, dtype):
            return refs.create_dataset(f'o{len(refs)}', data=np.array(values, dtype)[:, None]).ref
        def column(pointers): return np.array(pointers, dtype=object)[:, None]
        names = [store([ord(c) for c in name], np.uint16) for name, _ in records]
        groups = []
        for _, boxes in records:
            if boxes is None:
                groups.append(refs.create_dataset(f'o{len(refs)}', data=np.zeros(2, np.uint64)))
                groups[-1].attrs['MATLAB_empty'] = np.uint8(1)
                continue
            groups.append(refs.create_group(f'o{len(refs)}'))
            for field, values in zip(('left', 'top', 'width', 'height'), zip(*boxes)):
                if len(values) == 1:
                    groups[-1].create_dataset(field, data=np.array([values], float))
                else:
                    groups[-1].create_dataset(
                        field, data=column([store([v], float) for v in values]),
                        dtype=h5py.ref_dtype,
                    )
        file.create_dataset('digitStruct/name', data=column(names), dtype=h5py.ref_dtype)
        file.create_dataset(
            'digitStruct/bbox', data=column([group.ref for group in groups]), dtype=h5py.ref_dtype
        )
    return stream.getvalue()


def photo(seed, height=30, width=50):
    stream = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ).save(stream, 'PNG')
    return stream.getvalue()

BOXES = [
    [(5, 6, 10, 15)], [(5, 6, 10, 15), (16, 7, 9, 14)],
    [(3, 3, 7, 9), (11, 3, 7, 9), (19, 3, 7, 9)],
]

def files(count, seed=0, change=None):
    "Contents of one part: name -> bytes; `change` may alter the records"
    records = [(f'{k}.png', BOXES[k % 3]) for k in range(1, count + 1)]
    contents = {name: photo(100*seed + k) for k, (name, _) in enumerate(records)}
    return contents | {'digitStruct.mat': digit_struct(change(records) if change else records)}

def write_tar(path, part, contents, prefix=''):
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f'{prefix}{part}/{name}')
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

COUNTS = {'train': 12, 'extra': 18, 'test': 4}
PARTS = {part: files(count, seed) for seed, (part, count) in enumerate(COUNTS.items())}

@pytest.fixture
def numbers(tmp_path):
    "The three tar files in a folder"
    folder = tmp_path/'numbers'
    folder.mkdir()
    for part, contents in PARTS.items(): write_tar(folder/f'{part}.tar.gz', part, contents)
    return folder

def broken(tmp_path, contents, match, part='train'):
    "A folder with one bad part raises one line, and leaves nothing behind"
    folder = tmp_path/'numbers'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_tar(folder/f'{part}.tar.gz', part, contents)
    with pytest.raises(ValueError, match=match) as error:
        house_numbers(folder, 'test' if part == 'test' else 'train')
    assert one_line(error) and str(folder) in str(error.value)
    assert leftovers(tmp_path) == [f'numbers/{part}.tar.gz']
    return str(error.value)


# Layouts

def test_tar_folder_and_zip_agree(numbers, tmp_path):
    unpacked = tmp_path/'unpacked'
    for part, contents in PARTS.items():
        (unpacked/part).mkdir(parents=True)
        for name, content in contents.items(): (unpacked/part/name).write_bytes(content)
        (unpacked/part/'see_bboxes.m').write_text('% the official archives have such files too')
    with zipfile.ZipFile(tmp_path/'packed.zip', 'w') as archive:
        for path in sorted(unpacked.rglob('*')):
            if path.is_file():
                archive.write(path, f'svhn/{path.relative_to(unpacked)}')
                archive.writestr(f'__MACOSX/svhn/{path.parent.name}/._{path.name}', b'junk')
    for split, count in zip(SPLITS, (27, 3, 4)):
        a, b, c = (
            house_numbers(path, split) for path in (numbers, unpacked, tmp_path / 'packed.zip')
        )
        assert len(a) == count and a.shape == (3, 54, 54) and a.checksum == b.checksum == c.checksum
        assert (a.name, b.name, c.name) == ('numbers', 'unpacked', 'packed')
        assert 'packed.zip' in c.note and all('not comparable' in o.note for o in (a, b, c))
        assert find(tmp_path/'packed.zip', split).checksum == a.checksum


def test_crops_are_those_of_the_boxes(numbers):
    crops = {
        split: {o.numpy().tobytes() for o in house_numbers(numbers, split).pixels}
        for split in SPLITS
    }
    wanted = {
        part: [
            crop_number(
                Image.open(io.BytesIO(PARTS[part][f'{k}.png'])), np.array(BOXES[k % 3], float)
            )
            for k in range(1, count + 1)
        ]
        for part, count in COUNTS.items()
    }
    assert crops['test'] == {o[:, 5:59, 5:59].tobytes() for o in wanted['test']}
    both = {o.tobytes() for part in ('train', 'extra') for o in wanted[part]}
    assert crops['train'] < both and len(both) == 30 and len(crops['train']) == 27
    assert crops['valid'] == {
        o[:, 5:59, 5:59].tobytes()
        for part in ('train', 'extra')
        for o in wanted[part]
        if o.tobytes() not in crops['train']
    }


def test_parts_that_are_missing(numbers):
    (numbers/'test.tar.gz').unlink()
    with pytest.raises(FileNotFoundError, match='test.tar.gz') as error:
        house_numbers(numbers, 'test')
    assert one_line(error) and colour.SVHN_URL in str(error.value)
    (numbers/'extra.tar.gz').unlink()
    assert (len(house_numbers(numbers, 'train')), len(house_numbers(numbers, 'valid'))) == (11, 1)
    (numbers/'train.tar.gz').rename(numbers/'extra.tar.gz')
    with pytest.raises(FileNotFoundError, match='train.tar.gz'): house_numbers(numbers, 'train')
    with pytest.raises(FileNotFoundError, match='no such folder'):
        house_numbers(numbers/'nowhere', 'train')
    with pytest.raises(ValueError, match='unknown split'): house_numbers(numbers, 'val')


def test_paper_split(monkeypatch):
    """231,053 and 4,701 images from the official counts, less the one number of six digits; a
    third of the latter from extra"""
    counts = {'train': 33_402 - 1, 'extra': 202_353, 'test': 13_068}
    monkeypatch.setattr(colour, 'find_parts', lambda path: {part: path for part in counts})
    monkeypatch.setattr(colour, 'part_checksum', lambda place: '')
    def fake_crops(place, part, *more):
        return np.full((counts[part], 3, 1, 1), 10 * list(counts).index(part), np.uint8)
    monkeypatch.setattr(colour, 'read_crops', fake_crops)
    monkeypatch.setattr(colour, 'CROP', 1)   # so that there is no edge to cut off
    monkeypatch.setattr(colour, 'PATCH', 1)
    counted = {
        split: house_numbers('.', split).pixels[:, 0, 0, 0].bincount(minlength=21)[::10].tolist()
        for split in SPLITS
    }
    assert counted == {
        'train': [33_401 - 3_134, 202_353 - 1_567, 0], 'valid': [3_134, 1_567, 0],
        'test': [0, 0, 13_068],
    }
    assert sum(counted['train']) == 231_053 and sum(counted['valid']) == 4_701


def test_long_numbers_are_left_out(numbers):
    contents = files(
        12, 0,
        lambda records: [
            (name, BOXES[2] * 2 if name == '5.png' else boxes) for name, boxes in records
        ],
    )
    write_tar(numbers/'train.tar.gz', 'train', contents)
    assert len(house_numbers(numbers, 'train')) + len(house_numbers(numbers, 'valid')) == 29


def test_official_by_name(numbers, places, monkeypatch):
    root, _ = places
    with pytest.raises(FileNotFoundError, match='put train.tar.gz') as error: svhn('train')
    assert one_line(error) and str(root/'svhn') in str(error.value)
    numbers.rename(root/'svhn')
    for split in SPLITS:
        with pytest.raises(ValueError, match='wrong SHA-256') as error: svhn(split)
        assert (
            one_line(error)
            and str(root / 'svhn') in str(error.value)
            and colour.SVHN_URL in str(error.value)
        )
    assert leftovers(root) == ['svhn/extra.tar.gz', 'svhn/test.tar.gz', 'svhn/train.tar.gz']
    for part in SVHN_SHA256:
        checksum = colour.part_checksum(root / f'svhn/{part}.tar.gz')
        monkeypatch.setitem(SVHN_SHA256, part, checksum)
    assert [svhn(split).note for split in SPLITS] == ['SVHN full numbers, train and extra'] * 2 + [
        'SVHN full numbers, test'
    ]
    assert {find('svhn', split).name for split in SPLITS} == {'svhn'}
    (root/'svhn/extra.tar.gz').unlink()
    assert 'without extra' in svhn('train').note
    (root/'svhn/test.tar.gz').unlink()
    (root/'svhn/test').mkdir()
    for name, content in PARTS['test'].items(): (root/'svhn/test'/name).write_bytes(content)
    assert 'not known to be the official' in svhn('test').note   # a folder has no checksum
    assert find('svhn', 'test').name == 'svhn_unverified' and find('svhn', 'train').name == 'svhn'


# The cache

def test_cache_is_used_and_follows_the_source(numbers, places, monkeypatch):
    root, _ = places
    first = house_numbers(numbers, 'test')
    cached, = leftovers(root)
    assert cached.startswith('svhn_64x64/test-') and np.load(root/cached).shape == (4, 3, 64, 64)
    with monkeypatch.context() as patch:
        patch.setattr(colour, 'make_crops', lambda *a: pytest.fail('the cache was not used'))
        assert house_numbers(numbers, 'test').checksum == first.checksum
    write_tar(numbers/'test.tar.gz', 'test', files(5, 9))
    assert len(house_numbers(numbers, 'test')) == 5 and len(leftovers(root)) == 2


@pytest.mark.parametrize('change', ['image', 'mat'])
def test_cache_of_a_folder_follows_its_files(places, tmp_path, change):
    folder = tmp_path/'numbers/test'
    folder.mkdir(parents=True)
    for name, content in PARTS['test'].items(): (folder/name).write_bytes(content)
    first = house_numbers(folder.parent, 'test').checksum
    if change == 'image': (folder/'2.png').write_bytes(photo(77))
    else: (folder/'digitStruct.mat').write_bytes(files(3)['digitStruct.mat'])
    assert house_numbers(folder.parent, 'test').checksum != first


@pytest.mark.parametrize('damage', ['truncated', 'garbage', 'other shape', 'pickle'])
def test_damaged_cache(numbers, places, damage):
    house_numbers(numbers, 'test')
    path = places[0]/leftovers(places[0])[0]
    if damage == 'truncated': path.write_bytes(path.read_bytes()[:1000])
    if damage == 'garbage': path.write_bytes(b'garbage')
    if damage == 'other shape': np.save(path, np.zeros((3, 3)))
    if damage == 'pickle': np.save(path, np.array([Path('/')], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match='remove it') as error: house_numbers(numbers, 'test')
    assert one_line(error) and str(path) in str(error.value)


@pytest.mark.parametrize('full', ['root', 'both'])
def test_full_disk(numbers, places, monkeypatch, full):
    root, cache = places
    before = {path: path.read_bytes() for path in numbers.iterdir()}
    def write_half(path, content):
        with open(path, 'wb') as file:
            file.write(bytes(content)[:1000] if full == 'both' or root in path.parents else content)
        if full == 'both' or root in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'write_bytes', write_half)
        # goes into the cache instead
        if full == 'root': assert len(house_numbers(numbers, 'test')) == 4
        else:
            with pytest.raises(OSError, match='No space left') as error:
                house_numbers(numbers, 'test')
            assert one_line(error) and 'DRAW_DATA' in str(error.value)
    assert not leftovers(root) and len(leftovers(cache) if cache.exists() else []) == (
        full == 'root'
    )
    assert before == {path: path.read_bytes() for path in numbers.iterdir()}
    assert len(house_numbers(numbers, 'test')) == 4


# Faults

def test_truncated_tar(numbers, tmp_path):
    whole = (numbers/'train.tar.gz').read_bytes()
    for length in (0, 10, len(whole)//3, len(whole)*9//10):
        (numbers/'train.tar.gz').write_bytes(whole[:length])
        with pytest.raises(ValueError, match='get it again') as error:
            house_numbers(numbers, 'train')
        assert one_line(error) and str(numbers/'train.tar.gz') in str(error.value)
    (numbers/'train.tar.gz').write_bytes(whole[:500] + bytes([whole[500] ^ 255]) + whole[501:])
    with pytest.raises(ValueError) as error: house_numbers(numbers, 'train')
    assert one_line(error) and not leftovers(tmp_path/'root')


def test_damaged_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'n.zip', 'w') as archive:
        for name, content in PARTS['test'].items(): archive.writestr(f'test/{name}', content)
    whole = (tmp_path/'n.zip').read_bytes()
    spot = whole.index(PARTS['test']['digitStruct.mat'][:100]) + 5000
    (tmp_path/'n.zip').write_bytes(whole[:spot] + b'damage' + whole[spot + 6:])
    with pytest.raises(ValueError, match='get it again') as error:
        house_numbers(tmp_path/'n.zip', 'test')
    assert one_line(error) and leftovers(tmp_path) == ['n.zip']


@pytest.mark.parametrize('name', ['digitStruct.mat', '2.png'])
@pytest.mark.parametrize('kind', ['zip', 'tar', 'folder'])
def test_files_too_large_to_hold(tmp_path, monkeypatch, kind, name):
    "Refused by the size that is stated, before anything is read"
    contents = PARTS['test'] | {name: PARTS['test'][name] + bytes(2**20)}
    monkeypatch.setitem(archives.MOST_BYTES, name, 2**20)
    place = tmp_path/'numbers'
    place.mkdir()
    if kind == 'tar': write_tar(place/'test.tar.gz', 'test', contents)
    elif kind == 'zip':
        place = tmp_path/'numbers.zip'
        with zipfile.ZipFile(place, 'w', zipfile.ZIP_DEFLATED) as archive:
            for file, content in contents.items(): archive.writestr(f'test/{file}', content)
    else:
        (place/'test').mkdir()
        for file, content in contents.items(): (place/'test'/file).write_bytes(content)
    with pytest.raises(
        ValueError, match=f'{name} takes {len(contents[name]):,} bytes, more than'
    ) as error:
        house_numbers(place, 'test')
    assert one_line(error) and not leftovers(tmp_path/'root')


@pytest.mark.parametrize('stated', [8*2**30, 1000])
def test_zip_that_states_a_wrong_size(tmp_path, stated):
    """200 MB of zeros in 200 kB: neither a statement of 8 GB nor one of 1000 bytes makes us hold
    them"""
    path = tmp_path/'n.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in PARTS['test'].items():
            archive.writestr(
                f'test/{name}', bytes(200 * 2**20) if name == 'digitStruct.mat' else content
            )
        # goes into the directory at the end, which readers believe
        archive.getinfo('test/digitStruct.mat').file_size = stated
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match='takes 8,589,934,592 bytes' if stated > 1000 else 'is damaged'
        ) as error:
            house_numbers(path, 'test')
        assert one_line(error) and tracemalloc.get_traced_memory()[1] < 2**24
    finally: tracemalloc.stop()


def test_records_that_unpack_to_any_size(tmp_path):
    "An HDF5 file of some kilobytes can hold a data set of gigabytes"
    stream = io.BytesIO()
    with h5py.File(stream, 'w') as file:
        for field in ('name', 'bbox'):
            file.create_dataset(
                f'digitStruct/{field}', shape=(2**30, 1), dtype=np.uint8, chunks=(2**20, 1),
                compression='gzip',
            )
    with pytest.raises(ValueError, match='1073741824 values') as error:
        digit_boxes(stream.getvalue())
    assert one_line(error)


def test_bad_digit_struct(tmp_path):
    whole = PARTS['train']['digitStruct.mat']
    for content in (b'', b'MATLAB 5.0 MAT-file', whole[:2000], whole[:-8], digit_struct([])):
        broken(tmp_path, PARTS['train'] | {'digitStruct.mat': content}, 'train/digitStruct.mat')
    broken(
        tmp_path,
        {name: content for name, content in PARTS['train'].items() if name != 'digitStruct.mat'},
        'no train/digitStruct.mat',
    )


@pytest.mark.parametrize('boxes', [None, [(np.nan, 1, 2, 3)], [(1, 1, np.inf, 3)]])
def test_record_that_cannot_be_used(tmp_path, boxes):
    contents = files(
        5, 0, lambda records: [(name, boxes if name == '3.png' else b) for name, b in records]
    )
    assert 'record 3 (3.png)' in broken(
        tmp_path, contents, 'no boxes' if boxes is None else 'not finite'
    )


def test_fields_of_different_length(tmp_path):
    with h5py.File(io.BytesIO(PARTS['train']['digitStruct.mat']), 'r+') as file:
        record = file[file['digitStruct/bbox'][3, 0]]
        del record['top']
        record.create_dataset('top', data=np.zeros((5, 1)))
        file.flush()
        content = file.id.get_file_image()
    assert 'record 4 (4.png)' in broken(
        tmp_path, PARTS['train'] | {'digitStruct.mat': content}, 'record 4'
    )


def test_two_records_of_one_name(tmp_path):
    broken(tmp_path, files(5, 0, lambda records: records + records[:1]), 'two records for 1.png')


@pytest.mark.parametrize(
    'boxes',
    [
        [(60, 5, 10, 10)], [(5, 31, 10, 10)], [(-20, 5, 15, 10)], [(5, -10, 10, 10)],
        [(5, 5, 0, 10)], [(5, 5, 10, -3)],
    ],
)
def test_boxes_outside_the_image(tmp_path, boxes):
    contents = files(
        5, 0, lambda records: [(name, boxes if name == '2.png' else b) for name, b in records]
    )
    assert 'train/2.png' in broken(tmp_path, contents, 'outside the image')


def test_boxes_are_clipped():
    assert grown_box(np.array([[-5., -1, 20, 12]]), 30, 50) == (0, 0, 18, pytest.approx(12.8))
    assert grown_box(np.array([[40., 20, 20, 20]]), 30, 50) == (37, 17, 50, 30)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert (
        crop_number(image, np.array([[-100.0, -100, 300, 300]]))
        == np.asarray(image).transpose(2, 0, 1)
    ).all()


def test_crop_is_the_part_around_the_digits():
    "A box that has 64 x 64 pixels once it is grown: these pixels, and no others"
    pixels = np.random.default_rng(1).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    side = 64 / 1.3
    box = np.array([[70 + 32 - side / 2, 20 + 32 - side / 2, side, side]])
    expected = pixels[20:84, 70:134].transpose(2, 0, 1).astype(int)
    assert np.abs(crop_number(Image.fromarray(pixels), box) - expected).max() <= 1


def test_order_of_the_crops(numbers):
    "By the MD5 of part and name: as good as chance, so that validation images are a fair sample"
    names = [f'{k}.png' for k in range(1, COUNTS['test'] + 1)]
    ranked = sorted(names, key=lambda name: hashlib.md5(f'test/{name}'.encode()).hexdigest())
    assert ranked != names
    found = house_numbers(numbers, 'test').pixels.numpy()
    for crop, name in zip(found, ranked, strict=True):
        photograph = Image.open(io.BytesIO(PARTS['test'][name]))
        boxes = np.array(BOXES[int(name.removesuffix('.png')) % 3], float)
        assert (crop == crop_number(photograph, boxes)[:, 5:59, 5:59]).all()


def png_header(width, height):
    def chunk(kind, body):
        return (
            struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
        )
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b''))
        + chunk(b'IEND', b'')
    )

@pytest.mark.parametrize('content', [b'', b'no image', photo(3)[:200], png_header(60_000, 60_000)])
def test_unreadable_png(tmp_path, content):
    assert 'train/4.png' in broken(
        tmp_path, PARTS['train'] | {'4.png': content}, 'cannot be used as an image'
    )


def test_missing_images(tmp_path):
    contents = {
        name: content for name, content in PARTS['train'].items() if name not in ('3.png', '7.png')
    }
    broken(tmp_path, contents, '2 of 12 images .* missing, such as 3.png')


def test_too_few(tmp_path):
    folder = tmp_path/'few'
    folder.mkdir()
    write_tar(folder/'train.tar.gz', 'train', files(1))
    with pytest.raises(ValueError, match='too few') as error: house_numbers(folder, 'train')
    assert one_line(error)


def test_paths_in_archives_do_no_harm(tmp_path, monkeypatch):
    "Nothing is ever unpacked under the name of a member"
    (tmp_path/'work/deep').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'work/deep')
    folder = tmp_path/'numbers'
    folder.mkdir()
    write_tar(folder/'test.tar.gz', 'test', PARTS['test'], prefix='../../')
    with tarfile.open(folder/'train.tar.gz', 'w:gz') as archive:
        for kind, name in (
            (tarfile.SYMTYPE, 'train/1.png'), (tarfile.LNKTYPE, 'train/digitStruct.mat'),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, '/etc/passwd'
            archive.addfile(member)
    with zipfile.ZipFile(tmp_path/'n.zip', 'w') as archive:
        for name, content in PARTS['test'].items():
            archive.writestr(f'/../../../test/{name}', content)
    before = leftovers(tmp_path)
    assert (
        house_numbers(folder, 'test').checksum == house_numbers(tmp_path / 'n.zip', 'test').checksum
    )
    with pytest.raises(ValueError, match='no train/digitStruct.mat'): house_numbers(folder, 'train')
    assert [
        path for path in leftovers(tmp_path) if not path.startswith('root/svhn_64x64/test-')
    ] == before


@pytest.mark.parametrize('name, belongs', [
    ('train/1.png', True), ('svhn/train/1.png', True), ('train/digitStruct.mat', True),
    ('train/more/1.png', False), ('train.png', False), ('extra/1.png', False),
    ('train/.1.png', False), ('train/._1.png', False), ('__MACOSX/train/1.png', False),
])
def test_what_belongs_to_a_part(name, belongs):
    "Files right below the folder of the part, but none that an operating system adds"
    assert archives.is_in(name, 'train') == belongs

@pytest.mark.parametrize('error', [
    OSError('short read'), RuntimeError('encrypted'), NotImplementedError('compression'),
    EOFError('end'), zlib.error('invalid block'), tarfile.ReadError('no header'),
    zipfile.BadZipFile('no directory'),
])
def test_damage_is_told_in_one_line(error, tmp_path):
    "Whatever the libraries raise"
    place = tmp_path / 'train.tar.gz'
    with pytest.raises(ValueError, match='train.tar.gz is damaged: get it again') as caught:
        with archives.damage_in(place): raise error
    assert one_line(caught)

def test_find_parts_of_other_things(tmp_path):
    (tmp_path/'text').write_text('text')
    assert not find_parts(tmp_path) and not find_parts(tmp_path/'text')


# Patches

def test_patches(numbers):
    train = house_numbers(numbers, 'train')
    a, b, c = (
        train.batch(torch.arange(10), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert (
        a.shape == (10, 3, 54, 54)
        and a.dtype == torch.float32
        and (a == b).all()
        and (a != c).flatten(1).any(1).sum() > 7
    )
    assert torch.equal(train.batch([2]), train.batch(torch.tensor([2]))) and torch.equal(
        train[2], train.pixels[2, :, 5:59, 5:59].float() / 255
    )
    slow = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(11, (10,), generator=slow) for _ in range(2))
    for k in range(10):
        assert torch.equal(
            a[k],
            train.pixels[k, :, rows[k] : rows[k] + 54, columns[k] : columns[k] + 54].float() / 255,
        )
    assert len(list(train)) == len(train) and train.mean().shape == train.shape


# CIFAR-10

@pytest.fixture
def cifar(monkeypatch):
    "A small archive in the official layout, with checksums that match"
    rng = np.random.default_rng(0)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    raw = {name: rng.integers(0, 256, (4, 3072), dtype=np.uint8) for name in names}
    contents = {
        name: pickle.dumps({'data': pixels, 'labels': [0] * 4}) for name, pixels in raw.items()
    }
    contents['batches.meta'] = pickle.dumps({'label_names': list('abcdefghij')})
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w:gz') as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for key in ('train_list', 'test_list'):
        monkeypatch.setattr(
            CIFAR10, key, [[name, data.md5(contents[name])] for name, _ in getattr(CIFAR10, key)]
        )
    monkeypatch.setattr(
        CIFAR10, 'meta', {**CIFAR10.meta, 'md5': data.md5(contents['batches.meta'])}
    )
    monkeypatch.setattr(CIFAR10, 'tgz_md5', data.md5(stream.getvalue()))
    return stream.getvalue(), contents, np.concatenate(list(raw.values())).reshape(-1, 3, 32, 32)


def test_cifar_out_of_the_archive(cifar, places):
    packed, contents, raw = cifar
    root, cache = places
    (root/'cifar-10-python.tar.gz').write_bytes(packed)
    train, valid, test = (cifar10(split) for split in SPLITS)
    assert (torch.cat([train.pixels, valid.pixels, test.pixels]).numpy() == raw).all() and [
        len(o) for o in (train, valid, test)
    ] == [18, 2, 4]
    assert (
        leftovers(root)
        == sorted(['cifar-10-python.tar.gz', *(f'cifar-10-batches-py/{name}' for name in contents)])
        and not cache.exists()
    )
    (root/'cifar-10-python.tar.gz').unlink()
    assert find('cifar10', 'test').checksum == test.checksum


@pytest.mark.parametrize('fault', ['none there', 'truncated', 'changed'])
def test_cifar_cannot_be_had(cifar, places, fault):
    packed, *_ = cifar
    root, cache = places
    if fault != 'none there':
        (root / 'cifar-10-python.tar.gz').write_bytes(
            packed[:500] if fault == 'truncated' else packed + b' '
        )
    before = leftovers(root)
    kind, said = ValueError, 'damaged'
    if fault == 'none there': kind, said = FileNotFoundError, 'put cifar'
    with pytest.raises(kind, match=said) as error: cifar10('train')
    assert one_line(error) and str(root) in str(error.value)
    assert leftovers(root) == before and not cache.exists()


def test_download_of_cifar_is_checked(cifar, places, monkeypatch):
    "The official checksum goes along with the address"
    asked = []
    def download(*arguments):
        asked.append(arguments)
        return cifar[0]
    monkeypatch.setattr('draw_nbdev.cifar.download', download)
    assert len(cifar10('test')) == 4 and asked == [(CIFAR10.url, CIFAR10.tgz_md5)]


def test_cifar_is_never_unpickled_unchecked(cifar, places):
    class Trap:
        def __reduce__(self): return Path.touch, (places[0]/'trapped',)
    packed, contents, _ = cifar
    root, _ = places
    (root/'cifar-10-batches-py').mkdir()
    for name, content in contents.items(): (root/'cifar-10-batches-py'/name).write_bytes(content)
    for name in contents:
        (root/'cifar-10-batches-py'/name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ValueError, match='remove it') as error: cifar10('test')
        assert one_line(error) and not (root/'trapped').exists()
        (root/'cifar-10-batches-py'/name).write_bytes(contents[name])


# The real ones

@pytest.mark.skipif(
    not GENUINE.is_dir(), reason='needs DRAW_DATA to name a folder with svhn_genuine'
)
@pytest.mark.parametrize(
    'part, count, digits',
    [('train', 39, {1, 2, 3}), ('test', 40, {1, 2, 3}), ('extra', 40, {1, 2, 3, 4})],
)
def test_genuine(part, count, digits):
    boxes = digit_boxes((GENUINE/part/'digitStruct.mat').read_bytes())
    assert (
        list(boxes) == [f'{k}.png' for k in range(1, count + 1)]
        and {len(b) for b in boxes.values()} == digits
    )
    for k in (1, 2, 3):
        image = Image.open(GENUINE/part/f'{k}.png')
        left, top, right, bottom = grown_box(boxes[f'{k}.png'], image.height, image.width)
        assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
        crop = crop_number(image, boxes[f'{k}.png'])
        assert crop.shape == (3, 64, 64) and crop.std() > 5
    if part != 'extra':   # only three images of each part are there
        with pytest.raises(ValueError, match=f'{count - 3} of {count} images'):
            house_numbers(GENUINE, part)


@pytest.mark.skipif(
    not GENUINE.is_dir(), reason='needs DRAW_DATA to name a folder with svhn_genuine'
)
def test_genuine_values():
    "One number of one digit and one of several, read off by another program"
    assert digit_boxes((GENUINE / 'test/digitStruct.mat').read_bytes())['1.png'].tolist() == [
        [43, 7, 19, 30]
    ]
    assert digit_boxes((GENUINE / 'train/digitStruct.mat').read_bytes())['1.png'].tolist() == [
        [246, 77, 81, 219], [323, 81, 96, 219],
    ]


@pytest.mark.skipif(
    not SAMPLE.is_file(), reason='needs DRAW_DATA to name a folder with svhn_sample.zip'
)
def test_sample(places):
    sets = [find(SAMPLE, split) for split in SPLITS]
    assert [len(o) for o in sets] == [4058, 450, 500] and {o.shape for o in sets} == {(3, 54, 54)}
    assert all(
        o.name == 'svhn_sample' and 'svhn_sample.zip' in o.note and 'not comparable' in o.note
        for o in sets
    )
    # cropped already: cropping again changes nothing, or little where a box is narrow
    plain = image_folder(SAMPLE, 'test')
    same = {o.numpy().tobytes() for o in plain.pixels[:, :, 5:59, 5:59]} & {
        o.numpy().tobytes() for o in sets[2].pixels
    }
    assert len(plain) == 500 and len(same) > 250

@pytest.mark.parametrize('shape', [(2, 3, 6, 6), (2, 1, 64, 64), (2, 3, 64, 53)])
def test_patches_that_do_not_fit(shape):
    with pytest.raises(ValueError, match='few: patches of 3 x 54 x 54 do not fit into images of'):
        PatchImages(torch.rand(shape), 'few', 'train')

def test_patches_by_a_mask():
    images = PatchImages(torch.rand(3, 3, 60, 60), 'few', 'train')
    chosen = torch.tensor([True, False, True])
    assert torch.equal(images.batch(chosen), images.batch([0, 2]))
    assert torch.equal(images.batch([-1]), images.batch([2]))
