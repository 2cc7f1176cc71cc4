"What the notebook on plots cannot test: faults while writing, and what an import costs."
import os, subprocess, sys

import matplotlib, pytest, torch
from PIL import Image

from draw_nbdev.plots import animation, can_write_mp4, save

OLD, NEW = Image.new('RGB', (4, 3), 'white'), Image.new('RGB', (4, 3), 'black')


class Unwritable:
    "A picture that fails half-way through"
    def save(self, path, **options):
        path.write_bytes(b'half a picture')
        raise OSError('no space left')


def test_failed_write_leaves_the_old_picture(tmp_path):
    path = save(OLD, tmp_path / 'samples.png')
    before = path.read_bytes()
    with pytest.raises(OSError, match='no space left'): save(Unwritable(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['samples.png']


def test_killed_while_writing_leaves_the_old_picture(tmp_path):
    path = save(OLD, tmp_path / 'samples.png')
    before = path.read_bytes()
    program = (
        'import os, sys\nfrom draw_nbdev.plots import save\n'
        'class Picture:\n    def save(self, path, **options):\n'
        '        path.write_bytes(b"half"); os._exit(9)\n'
        'save(Picture(), sys.argv[1])'
    )
    assert subprocess.run([sys.executable, '-c', program, str(path)]).returncode == 9
    assert path.read_bytes() == before
    save(NEW, path)
    with Image.open(path) as image: assert image.getpixel((0, 0)) == (0, 0, 0)


def test_failing_ffmpeg_leaves_the_old_film(tmp_path):
    "Told in one line, as when the disk is full"
    program, film = tmp_path / 'ffmpeg', tmp_path / 'film' / 'drawing.mp4'
    program.write_text(
        '#!/bin/sh\n[ "$2" = -encoders ] && echo libx264 && exit\nfor last; do :; done\n'
        'echo half a film > "$last"\necho a warning >&2\n'
        'echo "No space left on device" >&2\nexit 1\n'
    )
    program.chmod(0o755)
    film.parent.mkdir()
    film.write_bytes(b'the old film')
    with matplotlib.rc_context({'animation.ffmpeg_path': str(program)}), pytest.raises(
        OSError
    ) as caught:
        animation(torch.zeros(5, 1, 1, 8, 8), film)
    assert str(caught.value) == 'ffmpeg could not write drawing.mp4: No space left on device'
    assert film.read_bytes() == b'the old film' and os.listdir(film.parent) == ['drawing.mp4']


def test_film_replaces_the_old_one_and_obeys_the_umask(tmp_path):
    if not can_write_mp4(): pytest.skip('no ffmpeg here')
    film = tmp_path / 'new' / 'drawing.mp4'
    old = os.umask(0o022)
    try:
        for images in (torch.zeros(3, 1, 1, 8, 8), torch.zeros(3, 1, 3, 9, 7)):
            assert animation(images, film) == film
    finally: os.umask(old)
    assert film.read_bytes()[4:8] == b'ftyp' and film.stat().st_mode & 0o777 == 0o644
    assert os.listdir(film.parent) == ['drawing.mp4']


def test_saved_pictures_obey_the_umask(tmp_path):
    old = os.umask(0o022)
    try: path = save(NEW, tmp_path / 'samples.png')
    finally: os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


def test_import_leaves_slow_libraries_alone():
    program = (
        'import sys, draw_nbdev.plots\n'
        'slow = ("matplotlib", "torchvision", "pandas", '
        '"draw_nbdev.model", "draw_nbdev.filterbank")\n'
        'print([m for m in slow if m in sys.modules])'
    )
    assert subprocess.check_output([sys.executable, '-c', program], text=True).strip() == '[]'


def test_curves_need_no_display(tmp_path):
    program = (
        'import sys\nfrom draw_nbdev.plots import learning_curves, save\n'
        'row = dict(step=1, epoch=1, split="valid", bound=90., reconstruction=70., latent=20.)\n'
        'save(learning_curves([row]), sys.argv[1] + "/curves.png")\n'
        'save(learning_curves([row]), sys.argv[1] + "/curves.svg")'
    )
    environment = {
        k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')
    }
    subprocess.run([sys.executable, '-c', program, str(tmp_path)], check=True, env=environment)
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.getpixel((0, 0))[:3] == (255, 255, 255)
    assert (tmp_path / 'curves.svg').read_text().rstrip().endswith('</svg>')


@pytest.mark.parametrize('name', ['a.psd', 'a.xyz', 'a'])
def test_a_format_that_cannot_be_written(tmp_path, name):
    "Pillow reads more formats than it writes"
    with pytest.raises(ValueError, match='end the name in .png or .gif'): save(OLD, tmp_path / name)
    assert not os.listdir(tmp_path)
