"Files and the list of data sets: faults while writing, what is imported from where"
import ast, errno, json, os, subprocess, sys, tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from typer.testing import CliRunner

import draw_nbdev
from draw_nbdev import cache, data, files
from draw_nbdev.cli import app, find_data
from draw_nbdev.data import FIXED_FILE, FIXED_TEXTS
from draw_nbdev.data_sets import DATA_SETS, find
from draw_nbdev.files import is_partial, one_line, remove_partial, replacing, reraise_as
from draw_nbdev.files import write_json, write_text

PACKAGE = Path(draw_nbdev.__file__).parent


# Writing

def full_disk(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('function', [(os, 'replace'), (Path, 'write_text')])
def test_full_disk_leaves_the_old_file(function, tmp_path, monkeypatch):
    path = tmp_path / 'table.csv'
    write_text(path, 'old')
    with monkeypatch.context() as patch:
        patch.setattr(*function, full_disk)
        with pytest.raises(OSError, match=f"No space.*{path.name}"): write_text(path, 'new')
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['table.csv']


def test_nothing_is_there_until_it_is_whole(tmp_path):
    path = tmp_path / 'deep' / 'table.csv'
    with replacing(path) as partial:
        partial.write_text('half')
        assert not path.exists() and is_partial(partial) and partial.parent == path.parent
        partial.write_text('whole')
    assert path.read_text() == 'whole' and not partial.exists()


def test_two_writers_have_files_of_their_own(tmp_path):
    "The one that ends last wins, whichever began first"
    path = tmp_path / 'table.csv'
    with replacing(path) as first:
        with replacing(path) as second:
            first.write_text('first')
            second.write_text('second')
        assert path.read_text() == 'second'
    assert path.read_text() == 'first' and os.listdir(tmp_path) == ['table.csv']


def test_killed_writers(tmp_path):
    "What they leave is found by its name, and nothing else goes with it"
    path = tmp_path / 'run.json'
    write_text(path, '{}')
    program = ('import os, sys\nfrom pathlib import Path\nfrom draw_nbdev.files import replacing\n'
               'with replacing(Path(sys.argv[1])) as partial:\n'
               '    partial.write_text("half")\n    os._exit(9)')
    for _ in range(2):
        assert subprocess.run([sys.executable, '-c', program, str(path)]).returncode == 9
    assert path.read_text() == '{}' and sum(map(is_partial, tmp_path.iterdir())) == 2
    others = ['.hidden', '.notes.tmp', 'notes.tmp', '.run.json.0123.tmp', 'x.01234567.tmp']
    for name in others: (tmp_path / name).write_text('mine')
    remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(['run.json', *others])


def test_files_obey_the_umask(tmp_path):
    old = os.umask(0o022)
    try: write_text(tmp_path / 'a', '')
    finally: os.umask(old)
    assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o644


plain = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
nested = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))

@settings(max_examples=50, deadline=None)
@given(nested)
def test_json_comes_back(values):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'values.json'
        write_json(path, values)
        assert json.loads(path.read_text(encoding='utf-8')) == values


# One line

def test_other_errors_pass():
    with pytest.raises(KeyError), reraise_as(ValueError, 'damaged', OSError): {}['x']


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_one_line(text):
    line = one_line(ValueError(text))
    assert 0 < len(line) <= files.LONGEST and len(line.splitlines()) == 1 and line == line.strip()


# What is imported from where

def test_no_private_name_is_imported_across_modules():
    for file in [*PACKAGE.glob('*.py'), *(PACKAGE.parent / 'tools').glob('*.py')]:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom): continue
            own = node.level or (node.module or '').partition('.')[0] == 'draw_nbdev'
            private = [o.name for o in node.names if o.name[0] == '_' and o.name != '__version__']
            assert not (own and private), f'{file.name} imports {private}'


def test_files_import_nothing_slow():
    program = ('import sys, draw_nbdev.files\n'
               'print([m for m in sys.modules if m.startswith("draw_nbdev.")],\n'
               '      [m for m in ("torch", "numpy", "tqdm", "safetensors") if m in sys.modules])')
    said = subprocess.check_output([sys.executable, '-c', program], text=True)
    assert said.strip() == "['draw_nbdev.files'] []"


# The list of data sets

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "An empty data folder, and no cache beside it"
    monkeypatch.setenv('DRAW_DATA', str(tmp_path))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path


def test_official_names():
    "A set's own, but for the short name of the fixed binarisation"
    others = [entry for entry in DATA_SETS.values() if entry.name != 'mnist']
    assert all(entry.official == entry.name for entry in others)
    assert DATA_SETS['mnist'].official == DATA_SETS['mnist_fixed'].official == 'mnist_fixed'


def test_a_new_entry_is_known_everywhere(folder, monkeypatch):
    "In find, in the list that the command prints, and in its message for a mistyped name"
    entry = replace(DATA_SETS['mnist_once'], name='mine', what='a copy')
    with pytest.raises(FileNotFoundError): find('mine', 'test')
    monkeypatch.setitem(DATA_SETS, 'mine', entry)
    assert find('mine', 'test').name == 'mnist_once'
    listed = CliRunner().invoke(app, ['data']).output
    assert f'\nmine: {entry.images}\n  packaged\n' in listed
    with pytest.raises(ValueError, match=r'choose one of .*\bmine\b'):
        find_data('mien', None, None, 'test', None)


def test_state_names_what_is_missing(folder):
    "Of three text files one is there; the packed file is as good as all three"
    entry = DATA_SETS['mnist_fixed']
    (folder / FIXED_TEXTS['valid']).write_text('')
    found, missing = entry.state().split('; missing: ')
    assert found == f'found: {folder / FIXED_TEXTS["valid"]}'
    assert [name in missing for name in FIXED_TEXTS.values()] == [True, False, True]
    (folder / FIXED_FILE).write_bytes(b'')
    (folder / FIXED_TEXTS['valid']).unlink()
    assert entry.state() == f'found: {folder / FIXED_FILE}'


def test_substitutes_say_so(folder, capsys, monkeypatch):
    "Whoever asked for the fixed binarisation by its short name hears what came instead"
    def offline(*_, **__): raise OSError('offline')
    monkeypatch.setattr(cache, 'urlopen', offline)
    data.has_fixed.cache_clear()
    try: images = find_data(None, None, None, 'test', 'mnist')
    finally: data.has_fixed.cache_clear()
    assert images.name == 'mnist_once'
    assert 'mnist_fixed is not at hand, mnist_once takes its place' in capsys.readouterr().err
