"Other people's images: formats, layouts and faults"
import io, os, struct, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from draw_nbdev import images as module
from draw_nbdev.data import SPLITS
from draw_nbdev.data_sets import find
from draw_nbdev.images import SUFFIXES, image_folder, split_files

CIFAR = Path(os.environ.get('DRAW_DATA', '')) / 'cifar10_jpeg.zip'


def one_line(error): return '\n' not in str(error.value) and str(error.value)


def save(folder, name, mode='L', size=(6, 4), value=100, **options):
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)
    return path


def test_formats_and_order(tmp_path):
    for i, suffix in enumerate(['png', 'jpg', 'JPEG', 'gif', 'bmp', 'tif', 'tiff', 'webp']):
        save(tmp_path, f'train/{i}.{suffix}', 'RGB', value=(20*i,)*3)
    for split in ('valid', 'test'): save(tmp_path, f'{split}/a.png')
    (tmp_path/'train/notes.txt').write_text('not an image')
    save(tmp_path, 'train/.hidden.png', size=(1, 1))
    images = image_folder(tmp_path, 'train')
    assert images.shape == (3, 4, 6) and len(images) == 8 and images.split == 'train'
    assert torch.allclose(images.pixels.float().mean((1, 2, 3)), 20*torch.arange(8.), atol=2)
    assert 'JPEG' in images.note and tmp_path.name in images.note


def test_zip_is_read_like_the_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path/'photos'
    for i in range(25):
        path = folder/f'class {i % 3}'/f'é{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5, 7), dtype=np.uint8)).save(path)
    with zipfile.ZipFile(tmp_path/'p.zip', 'w') as archive:
        for path in folder.rglob('*'):
            archive.write(path, path.relative_to(tmp_path))
            if path.is_file():
                archive.writestr(
                    f'__MACOSX/{path.relative_to(tmp_path).parent}/{path.name}', b'junk'
                )
                archive.writestr(f'{path.relative_to(tmp_path).parent}/._{path.name}', b'junk')
    for split, count in zip(SPLITS, (21, 2, 2)):
        a, b = image_folder(folder, split), image_folder(tmp_path/'p.zip', split)
        assert len(a) == count and a.shape == (1, 5, 7) and a.checksum == b.checksum


@pytest.mark.parametrize('stray', ['colour', 'size', 'broken'])
def test_images_that_are_left_out_decide_nothing(tmp_path, stray):
    "Neither channels nor size, nor whether the others can be read"
    for split in SPLITS: save(tmp_path, f'{split}/a.png')
    if stray == 'colour': save(tmp_path, 'cover.png', 'RGB', value=(9, 99, 199))
    elif stray == 'size': save(tmp_path, 'cover.png', size=(60, 40))
    else: (tmp_path / 'cover.png').write_bytes(b'no picture')
    with pytest.warns(UserWarning, match='cover.png and 0 more images are left out'):
        images = image_folder(tmp_path, 'train')
    assert len(images) == 1 and images.shape == (1, 4, 6)

def test_a_name_that_could_be_two(tmp_path, monkeypatch):
    "A zip of the data folder and a folder here: asked for by path, or refused"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('DRAW_DATA', str(tmp_path / 'data'))
    for i in range(3):
        save(tmp_path / 'pics', f'{i}.png')
        save(tmp_path / 'packed', f'{i}.png', value=7)
    (tmp_path / 'data').mkdir()
    with zipfile.ZipFile(tmp_path / 'data/pics.zip', 'w') as archive:
        for path in (tmp_path / 'packed').iterdir(): archive.write(path, path.name)
    assert find('./pics', 'train').pixels.unique().tolist() == [100]
    assert find(Path('pics'), 'train').pixels.unique().tolist() == [100]
    with pytest.raises(ValueError, match=r'pics is here, and .*pics.zip has .*: write ./pics'):
        find('pics', 'train')
    (tmp_path / 'pics').rename(tmp_path / 'other')
    assert find('pics', 'train').pixels.unique().tolist() == [7]
    with pytest.raises(ValueError, match='no data set and no path is given'): find('', 'train')

def test_missing_valid_is_cut_from_train(tmp_path):
    for i in range(30): save(tmp_path, f'train/{i}.png', value=i)
    for i in range(4): save(tmp_path, f'test/{i}.png', value=200 + i)
    values = {split: image_folder(tmp_path, split).pixels[:, 0, 0, 0].tolist() for split in SPLITS}
    assert values['test'] == [200, 201, 202, 203] and len(values['valid']) == 3
    assert sorted(values['train'] + values['valid']) == list(range(30))


def test_cut_is_the_same_for_ever():
    cut = split_files([f'{i}.png' for i in range(20)])
    assert (cut['valid'], cut['test']) == (['0.png', '4.png'], ['16.png', '3.png'])


def test_linked_folders_are_followed(tmp_path):
    for name in 'abc': save(tmp_path, f'elsewhere/{name}.png')
    (tmp_path/'here').mkdir()
    (tmp_path/'here/link').symlink_to(tmp_path/'elsewhere')
    assert len(image_folder(tmp_path/'here', 'train')) == 1


def test_links_neither_hang_nor_multiply(tmp_path):
    """Two links of a folder into itself, a link beside its aim and one that comes before it:
    every image counts once, under its own folder"""
    for split in SPLITS:
        for name in 'abc': save(tmp_path, f'{split}/{name}.png')
    for link, aim in {
        'loop': '.', 'train/loop': '..', 'again': 'test', 'train/again': '../test',
    }.items():
        (tmp_path/link).symlink_to(aim, target_is_directory=True)
    assert list(module.keep_images(module.files_below(tmp_path))) == [
        f'{split}/{name}.png' for split in sorted(SPLITS) for name in 'abc'
    ]
    assert [len(image_folder(tmp_path, split)) for split in SPLITS] == [3, 3, 3]
    (tmp_path/'train/gone.png').symlink_to('nowhere.png')
    with pytest.raises(ValueError, match='train/gone.png cannot be used') as error:
        image_folder(tmp_path, 'train')
    assert one_line(error)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_named_pipes_are_no_images(tmp_path):
    for name in 'abc': save(tmp_path, f'{name}.png')
    os.mkfifo(tmp_path/'pipe.png')
    os.mkfifo(tmp_path/'pipe.zip')
    assert len(image_folder(tmp_path, 'train')) == 1
    for read in (image_folder, find):
        with pytest.raises(ValueError, match='neither a folder nor a zip'):
            read(tmp_path/'pipe.zip', 'train')


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    for name in ('a', 'b', 'c', 'locked/d'): save(tmp_path, f'{name}.png')
    scandir = os.scandir
    def refuse(path):
        if Path(path).name == 'locked': raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(ValueError, match='locked cannot be read.*Permission denied') as error:
        image_folder(tmp_path, 'train')
    assert one_line(error)


def test_no_other_formats(three, monkeypatch):
    "A PostScript file is not handed to Ghostscript, whatever its name"
    from PIL import EpsImagePlugin
    def called(*arguments, **more): pytest.fail('Ghostscript was called')
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', called)
    (three / 'train/a.png').write_bytes(
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 1\n%%EndComments\nshowpage\n%%EOF\n'
    )
    said = 'train/a.png cannot be used as an image.*cannot identify'
    with pytest.raises(ValueError, match=said) as error: image_folder(three, 'train')
    assert one_line(error)


@pytest.mark.parametrize('packed', [False, True])
def test_headers_are_read_once_for_all_splits(tmp_path, monkeypatch, packed):
    """30 headers and 30 images, not three times 30 headers; what changes is looked at again, and
    the channels are still those of all splits"""
    folder, opened = tmp_path/'photos', []
    path = tmp_path/'photos.zip' if packed else folder
    def put(name, **options):
        save(folder, name, **options)
        if packed:
            with zipfile.ZipFile(path, 'w') as archive:
                for file in folder.rglob('*.png'): archive.write(file, file.relative_to(folder))
    for i in range(30): put(f'{i}.png', value=i)
    once = module.open_image
    def counted(path, open_file, name):
        opened.append(name)
        return once(path, open_file, name)
    monkeypatch.setattr(module, 'open_image', counted)
    assert {image_folder(path, split).shape for split in SPLITS} == {(1, 4, 6)}
    assert len(opened) == 60
    put('7.png', mode='RGB', value=(1, 2, 3))
    assert {image_folder(path, split).shape for split in SPLITS} == {(3, 4, 6)} and len(
        opened
    ) == 120
    put('8.png', size=(4, 6))
    for split in SPLITS:
        with pytest.raises(ValueError, match='differ in size'): image_folder(path, split)
        assert image_folder(path, split, size=4).shape == (3, 4, 4)


@pytest.fixture
def three(tmp_path):
    "A folder with a plain image in valid and test, so that `train` can hold the one under test"
    for split in ('valid', 'test'): save(tmp_path, f'{split}/plain.png', size=(2, 1))
    (tmp_path/'train').mkdir()
    return tmp_path


def test_sixteen_bits(three):
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(three/'train/a.png')
    Image.fromarray(np.array([[32768, 65407]], np.uint16)).save(three/'train/b.tiff')
    images = image_folder(three, 'train')
    assert images.pixels.flatten().tolist() == [0, 255, 128, 255] and images.shape == (1, 1, 2)
    assert image_folder(three, 'train', channels=3).shape == (3, 1, 2)


def test_floats(three):
    Image.fromarray(np.array([[0, 1]], np.float32)).save(three/'train/a.tiff')
    assert image_folder(three, 'train').pixels.flatten().tolist() == [0, 255]
    for bad in ([[0, 1.5]], [[-.1, 1]], [[float('nan'), 1]]):
        Image.fromarray(np.array(bad, np.float32)).save(three/'train/b.tiff')
        with pytest.raises(ValueError, match=r'outside 0\.\.1') as error:
            image_folder(three, 'train')
        assert one_line(error) and 'b.tiff' in str(error.value)


def test_palette_and_alpha(three):
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), 'P')
    palette.putpalette([10, 10, 10, 250, 250, 250])
    palette.save(three/'train/a.png')
    Image.fromarray(np.array([[[200, 255], [200, 0]]], np.uint8), 'LA').save(three/'train/b.png')
    images = image_folder(three, 'train')
    # grey palettes are grey; transparency lies on black
    assert images.pixels.flatten().tolist() == [10, 250, 200, 0]
    Image.fromarray(np.array([[[255, 0, 0, 255], [255, 255, 255, 0]]], np.uint8), 'RGBA').save(
        three / 'train/c.png'
    )
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(three/'train/d.png', transparency=1)
    images = image_folder(three, 'train')
    assert images.shape == (3, 1, 2)
    assert (
        images.pixels[2].flatten().tolist()
        == images.pixels[3].flatten().tolist()
        == [255, 0, 0, 0, 0, 0]
    )


def test_channels_agree_between_splits(three):
    save(three, 'train/grey.png', size=(2, 1))
    save(three, 'test/colour.png', 'RGB', size=(2, 1), value=(1, 2, 3))
    assert image_folder(three, 'train').shape == (3, 1, 2)
    assert image_folder(three, 'test', channels=1).shape == (1, 1, 2)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tiff'])
def test_photographs_are_turned_upright(three, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6   # turn by 90 degrees to see it upright
    image = Image.new('L', (16, 32))
    image.paste(255, (0, 0, 16, 16))
    image.save(three/f'train/a.{suffix}', exif=exif)
    for split in ('valid', 'test'): save(three, f'{split}/plain.png', size=(32, 16))
    pixels = image_folder(three, 'train').pixels[0, 0]
    assert pixels.shape == (16, 32) and pixels[:, 20:].min() > 200 and pixels[:, :12].max() < 50


def test_first_frame(three):
    frames = [Image.new('L', (2, 1), v) for v in (30, 220)]
    frames[0].save(three/'train/a.gif', save_all=True, append_images=frames[1:])
    assert image_folder(three, 'train').pixels.flatten().tolist() == [30, 30]


@pytest.mark.parametrize('mode', ['L', 'I;16', 'F'])
def test_resize_keeps_the_middle(tmp_path, mode):
    """A 40 x 80 image, black, with a white middle of 40 x 40, which is all that a square keeps;
    a half keeps its mean"""
    scale, dtype = {'L': (255, np.uint8), 'I;16': (65535, np.uint16), 'F': (1, np.float32)}[mode]
    values = np.zeros((40, 80))
    values[:, 20:60] = scale
    values[:20] = 0
    for name in 'abc': Image.fromarray(values.astype(dtype)).save(tmp_path/f'{name}.tiff')
    images = image_folder(tmp_path, 'train', size=10)
    assert images.shape == (1, 10, 10)
    assert (
        images[0][0, :4].max() == 0
        and images[0][0, 6:, 1:-1].min() == 1
        and abs(images[0].mean() - 0.5) < 0.02
    )
    assert image_folder(tmp_path, 'train', size=(20, 40)).shape == (1, 20, 40)


def png_header(width, height):
    def chunk(kind, body):
        return (
            struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
        )
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b''))
        + chunk(b'IEND', b'')
    )


@pytest.mark.parametrize('side', [10_000, 60_000])
@pytest.mark.parametrize('packed', [False, True])
def test_absurdly_large(three, side, packed):
    (three/'train/huge.png').write_bytes(png_header(side, side))
    path = three
    if packed:
        path = three/'all.zip'
        with zipfile.ZipFile(path, 'w') as archive:
            for name in ('train/huge.png', 'valid/plain.png', 'test/plain.png'):
                archive.write(three/name, name)
    with pytest.raises(ValueError, match='decompression bomb') as error:
        image_folder(path, 'train', size=8)
    assert one_line(error) and 'train/huge.png' in str(error.value)


def test_too_many_pixels(tmp_path, monkeypatch):
    for name in 'abcd': save(tmp_path, f'{name}.png', size=(10, 10))
    monkeypatch.setattr(module, 'MEMORY', 199)
    with pytest.raises(ValueError, match='smaller size') as error: image_folder(tmp_path, 'train')
    assert one_line(error)
    assert len(image_folder(tmp_path, 'train', size=5)) == 2


def test_unreadable(three):
    for content in (
        b'', b'no image', png_header(2, 1),
        save(three, 'whole.png', 'RGB', (50, 50), (1, 2, 3)).read_bytes()[:60],
    ):
        (three/'whole.png').unlink(missing_ok=True)
        (three/'train/bad.png').write_bytes(content)
        with pytest.raises(ValueError, match='cannot be used as an image') as error:
            image_folder(three, 'train', size=4)
        assert one_line(error) and 'train/bad.png' in str(error.value)


def test_encrypted_and_damaged_zip(tmp_path):
    for name in 'abc': save(tmp_path, f'{name}.png', size=(40, 40))
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as archive:
        for name in 'abc': archive.write(tmp_path/f'{name}.png', f'{name}.png')
    whole = (tmp_path/'z.zip').read_bytes()
    flagged = bytearray(whole)
    # the bit that says "encrypted", in the first local header and the first entry of the directory
    flagged[6] |= 1
    flagged[whole.index(b'PK\x01\x02') + 8] |= 1
    for broken in (
        bytes(flagged), whole.replace(b'IDAT', b'XXXX'), whole[len(whole) // 2 :],
        whole.replace(b'PK\x01\x02', b'PK\x00\x00'),
    ):
        (tmp_path/'z.zip').write_bytes(broken)
        with pytest.raises(ValueError) as error: image_folder(tmp_path/'z.zip', 'train')
        assert one_line(error)


def test_mixed_sizes(tmp_path):
    for name, size in dict(a=(6, 4), b=(6, 4), c=(4, 6)).items():
        save(tmp_path, f'{name}.png', size=size)
    with pytest.raises(ValueError, match='a.png is 4 x 6, c.png is 6 x 4') as error:
        image_folder(tmp_path, 'test')
    assert one_line(error)


def test_paths_and_options(tmp_path):
    with pytest.raises(FileNotFoundError, match='no such folder') as error:
        image_folder(tmp_path/'nowhere', 'train')
    assert one_line(error)
    with pytest.raises(ValueError, match='no images') as error: image_folder(tmp_path, 'train')
    assert one_line(error)
    (tmp_path/'a.zip').write_text('text')
    with pytest.raises(ValueError, match='neither a folder nor a zip'):
        image_folder(tmp_path/'a.zip', 'train')
    for wrong in (dict(size=0), dict(size=(1, 2, 3)), dict(channels=2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            image_folder(tmp_path, 'train', **wrong)
    with pytest.raises(ValueError, match='unknown split'): image_folder(tmp_path, 'val')


@pytest.mark.skipif(
    not CIFAR.is_file(), reason='needs DRAW_DATA to name a folder with cifar10_jpeg.zip'
)
def test_cifar_zip(tmp_path):
    """The real zip: the splits of all of its names, and every twentieth image, pixel by pixel;
    the headers of all 60,000 would take twenty seconds"""
    with zipfile.ZipFile(CIFAR) as whole, zipfile.ZipFile(tmp_path/'some.zip', 'w') as some:
        names = sorted(o for o in whole.namelist() if Path(o).suffix.lower() in SUFFIXES)
        test, part = {*split_files(names)['test']}, names[::20]
        assert len(test) == 10_000
        for name in part: some.writestr(name, whole.read(name))
        wanted = [whole.read(name) for name in part if name in test]
    images = image_folder(tmp_path/'some.zip', 'test')
    assert len(images) == len(wanted) > 400 and images.shape == (3, 32, 32)
    assert 'JPEG' in images.note
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(o)).convert('RGB')) for o in wanted])
    assert np.array_equal(images.pixels, pixels.transpose(0, 3, 1, 2))
    mean = images.mean().mean((1, 2))
    assert torch.allclose(mean, torch.tensor([0.4942, 0.4851, 0.4504]), atol=0.03)

def test_training_and_testing(tmp_path):
    "Folders of these names are splits too, as in copies of MNIST"
    for i in range(20): save(tmp_path, f'Training/{i % 3}/{i}.png', value=i)
    for i in range(5): save(tmp_path, f'Testing/{i % 3}/{i}.png', value=100 + i)
    sets = {split: image_folder(tmp_path, split) for split in SPLITS}
    assert [len(sets[split]) for split in SPLITS] == [18, 2, 5]
    assert sets['test'].pixels.min() == 100 > sets['train'].pixels.max()


def test_zip_with_backslashes(tmp_path):
    "As old programs on Windows made them"
    with zipfile.ZipFile(tmp_path/'w.zip', 'w') as archive:
        for split, count in zip(SPLITS, (6, 2, 3)):
            for i in range(count):
                path = save(tmp_path, f'made/{split}{i}.png', value=20*i)
                archive.write(path, f'mine\\{split}\\{i}.png')
    for split, count in zip(SPLITS, (6, 2, 3)):
        images = image_folder(tmp_path/'w.zip', split)
        assert images.pixels[:, 0, 0, 0].tolist() == [20*i for i in range(count)]
