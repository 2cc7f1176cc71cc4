"""What holds for the project as a whole: its metadata, its notebooks as files, and what its
package ships"""
import ast, importlib, importlib.metadata as metadata, json, re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
import draw_nbdev
from draw_nbdev._modidx import d

ROOT = Path(__file__).parents[1]
NAME = 'draw_nbdev'
ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = ini['DEFAULT']
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))

def cells(file): return json.loads(file.read_text(encoding='utf-8'))['cells']
def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)
each_notebook = pytest.mark.parametrize('file', NOTEBOOKS, ids=lambda o: o.stem)

# ---- metadata

def test_version():
    assert draw_nbdev.__version__ == metadata.version(NAME) == SETTINGS['version']
    assert f"[{SETTINGS['version']}]" in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')

def test_metadata_comes_from_settings():
    found = metadata.metadata(NAME)
    assert found['Requires-Python'] == f">={SETTINGS['min_python']}"
    assert found['Summary'] == SETTINGS['description']
    commands = [
        f'{o.name}={o.value}'
        for o in metadata.distribution(NAME).entry_points
        if o.group == 'console_scripts'
    ]
    assert commands == shlex.split(SETTINGS['console_scripts'])

def test_requirements_are_uncapped_and_constrained():
    """Users get no upper limits; whoever wants the tried environment gets an exact version of
    everything"""
    def normal(name): return re.sub(r'[-_.]+', '-', name).lower()
    constrained = {
        normal(o.partition('==')[0])
        for o in (ROOT / 'constraints.txt').read_text().splitlines()
        if '==' in o
    }
    required = shlex.split(SETTINGS['requirements'])
    assert not [o for o in required if re.search('<|==|~', o)]
    for key in ('requirements', 'dev_requirements', 'docs_requirements'):
        missing = [
            o
            for o in shlex.split(SETTINGS[key])
            if normal(re.match(r'[\w.-]+', o)[0]) not in constrained
        ]
        assert not missing, f'{key} without a line in constraints.txt: {missing}'

def test_import_is_light():
    "The command line does not pull in torch, so that it can answer --help at once"
    program = "import sys, draw_nbdev.cli; assert 'torch' not in sys.modules"
    run(sys.executable, '-c', program, cwd=ROOT)

# ---- notebooks as files

def test_notebooks_and_package_agree(tmp_path):
    "Exporting a copy of the notebooks gives the modules that are committed"
    shutil.copy(ROOT/'settings.ini', tmp_path)
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*'))
    (tmp_path/NAME).mkdir()
    shutil.copy(ROOT/NAME/'__init__.py', tmp_path/NAME) # of which nbdev writes the version alone
    run(
        sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()',
        cwd=tmp_path,
    )
    exported = {o.name: o.read_text(encoding='utf-8') for o in (tmp_path/NAME).glob('*.py')}
    committed = {o.name: o.read_text(encoding='utf-8') for o in (ROOT/NAME).glob('*.py')}
    assert sorted(exported) == sorted(committed)
    different = [name for name in exported if exported[name] != committed[name]]
    assert not different, f'run nbdev_export: {different}'

def test_sidebar_lists_every_notebook():
    listed = re.findall(
        r'^ *- (\S+\.ipynb)$', (ROOT / 'nbs/sidebar.yml').read_text(encoding='utf-8'), re.MULTILINE
    )
    assert sorted(listed) == [o.name for o in NOTEBOOKS]

@each_notebook
def test_first_cell_is_title_and_subtitle(file):
    "nbdev makes the page's heading of the first cell and drops whatever else the cell says"
    first = cells(file)[0]
    if first['cell_type'] == 'raw': return # The same as a YAML block
    lines = [
        o for o in ''.join(first['source']).splitlines() if o.strip() and not o.startswith('- ')
    ]
    assert lines[0].startswith('# ') and lines[1].startswith('> ') and len(lines) == 2, lines

@each_notebook
def test_is_short(file):
    "Text and examples; definitions have a cell each, so that a heading above a source is its name"
    others = '#| hide', '#| export', '#| default_exp'
    answers = {'jupyter': {'source_hidden': True}} # Text of solutions, in cells of its own
    sources = [''.join(cell['source']) for cell in cells(file) if cell['metadata'] != answers]
    told = [s for s in sources if not s.startswith(others) and s != '</details>']
    assert len(told) <= 40

@each_notebook
def test_solutions_are_closed(file):
    "In JupyterLab as on the site: nobody reads an answer before the question"
    inside = False
    for cell in cells(file):
        source, opening = ''.join(cell['source']), '<details class="solution">'
        text = cell['cell_type'] == 'markdown'
        if inside: inside = not (text and source.startswith('</details>'))
        hidden = {'source_hidden': True} if text else dict(source_hidden=True, outputs_hidden=True)
        assert cell['metadata'] == ({'jupyter': hidden} if inside else {}), 'run tools/run_nbs.py'
        if text and opening in source: inside = '</details>' not in source.split(opening)[-1]

@each_notebook
def test_is_saved_clean(file):
    "With a kernel, or JupyterLab asks for one; without errors, progress bars or run numbers"
    saved = json.loads(file.read_text(encoding='utf-8'))['metadata']
    assert saved['kernelspec']['name'] == 'python3'
    for number,cell in enumerate(cells(file)):
        if cell['cell_type'] != 'code': continue
        assert cell['execution_count'] is None, f'cell {number}: run nbdev_clean'
        for output in cell['outputs']:
            assert output['output_type'] != 'error', f'cell {number} is saved with an error'
            assert (
                output.get('name') != 'stderr'
            ), f"cell {number} is saved with a warning or a progress bar: {''.join(output['text'])}"

def test_imports_stand_alone(): run(sys.executable, 'tools/check_imports.py', cwd=ROOT)

def test_linked_names_are_public():
    """The site makes a link of a module's name in backticks, and only public ones have a place
    on its page"""
    hidden = set()
    for module,names in d['syms'].items():
        names = {o.removeprefix(f'{module}.') for o in names}
        hidden |= names - set(importlib.import_module(module).__all__)
    linked = [
        (file.name, name)
        for file in NOTEBOOKS
        for cell in cells(file)
        if cell['cell_type'] == 'markdown'
        for name in re.findall('`(.+?)`', ''.join(cell['source']))
    ]
    assert not [o for o in linked if '.' not in o[1] and o[1] in hidden]

@each_notebook
def test_no_links_inside_of_signatures(file):
    """nbdev makes links of names in backticks in what `show_doc` shows, its code block included,
    where a link stays Markdown: docments name functions without them"""
    public = {
        o.removeprefix(f'{module}.') for module, names in d['syms'].items() for o in names
        if o.removeprefix(f'{module}.') in importlib.import_module(module).__all__
    }
    docments = [
        line.partition(' # ')[2]
        for cell in cells(file)
        if cell['cell_type'] == 'code' and ''.join(cell['source']).startswith('#| export')
        for line in cell['source']
        if line.partition(' # ')[0].rstrip().endswith((',', '(', ':')) or line.startswith(')')
    ]
    assert not public & {name for text in docments for name in re.findall('`([^`]+)`', text)}

@each_notebook
def test_links_between_notebooks(file):
    "Links name the notebook: that works in Jupyter, on GitHub and, rewritten, on the site"
    text = '\n'.join(''.join(o['source']) for o in cells(file) if o['cell_type'] == 'markdown')
    assert not re.findall(
        r'\[`[^`]*`\]\(', text
    ), 'nbdev makes a link of the name in backticks: leave out the outer one'
    local = [o.partition('#')[0] for o in re.findall(r'\]\(([^)\s:]+)\)', text)]
    missing = [o for o in local if o and not (file.parent/o).is_file()]
    assert not missing, missing

# ---- modules

def test_modules_import_only_upwards():
    "In this order; data and plots use none of the model"
    data = 'files', 'cache', 'data', 'images', 'archives', 'digits', 'colour', 'cifar', 'data_sets'
    order = (
        *data, 'plots', 'filterbank', 'attention', 'diagrams', 'scan_weights', 'scan', 'compiled',
        'loading', 'model', 'loss', 'benchmark', 'processes',
        'evaluation', 'muon', 'options', 'checkpoints', 'graph', 'runs', 'training', 'classifier',
        'demo', 'reproduce', 'cli',
    )
    allowed = {name: set(order[:i]) for i, name in enumerate(order)} | {
        'plots': {'files'}, 'filterbank': set(),
    }
    there = {file.stem: file for file in (ROOT/NAME).glob('*.py')}
    assert {*order} == there.keys() - {'__init__', '_modidx'}
    def imported(tree):
        "Modules of the package, in whichever form they are imported"
        for node in ast.walk(tree):
            if isinstance(node, ast.Import): found = [o.name for o in node.names]
            elif not isinstance(node, ast.ImportFrom): continue
            else:
                module = '.'.join([NAME] * bool(node.level) + [node.module] * bool(node.module))
                found = [f'{module}.{o.name}' for o in node.names]
            for name in found:
                package, *rest = name.split('.')
                if package == NAME and rest[0] in there: yield rest[0]
    for name,above in allowed.items():
        own = {*imported(ast.parse(there[name].read_text(encoding='utf-8')))}
        assert own <= above, f'{name} imports {own - above}'

# ---- what is shipped

def test_source_distribution(tmp_path):
    "What the tests and the pages read is in there"
    run(sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path), cwd=ROOT)
    packed = set(next(tmp_path.glob('*/SOURCES.txt')).read_text(encoding='utf-8').split('\n'))
    folders = 'nbs/*.ipynb', 'nbs/images/*', 'results/*.json', 'tests/*', 'tools/*'
    needed = {str(file.relative_to(ROOT)) for pattern in folders for file in ROOT.glob(pattern)
              if file.is_file()}
    needed |= {'settings.ini', 'setup.py', 'constraints.txt', 'README.md', 'CONTRIBUTING.md'}
    assert not needed - packed

def test_description_has_no_relative_links(tmp_path):
    run(sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path), cwd=ROOT)
    said = next(tmp_path.glob('*/PKG-INFO')).read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)]+)\)', said)
    assert links and not [link for link in links if not link.startswith(('https://', '#'))]

def test_package_ships_data_and_weights(tmp_path):
    "Every file under assets/ and pretrained/ is built into the package"
    pytest.importorskip('setuptools')
    run(
        sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', str(tmp_path), 'build',
        '--build-base', str(tmp_path / 'build'), cwd=ROOT,
    )
    built = next(tmp_path.glob('build/lib*'))/NAME
    wanted = [
        o.relative_to(ROOT / NAME)
        for part in ('assets', 'pretrained')
        for o in (ROOT / NAME / part).rglob('*')
        if o.is_file()
    ]
    missing = [o for o in [*wanted, Path('py.typed')] if not (built/o).is_file()]
    assert wanted and not missing, f'not shipped: {missing}'

def test_names_of_the_package():
    """What most programs use comes from the package itself, when it is asked for; importing the
    package imports nothing else"""
    code = (
        "import sys, draw_nbdev; assert 'torch' not in sys.modules and 'DRAW' in dir(draw_nbdev)\n"
        "from draw_nbdev import *; import draw_nbdev.model as m, draw_nbdev.training as t\n"
        "assert DRAW is m.DRAW and train is t.train and set(draw_nbdev.__all__) <= set(globals())\n"
        "try: draw_nbdev.DARW\nexcept AttributeError as error: assert 'DARW' in str(error)\n"
        "else: raise SystemExit('no AttributeError')"
    )
    run(sys.executable, '-c', code, cwd=ROOT)

def test_card_of_an_upload():
    "Names the paper, the code and the pages, at the addresses of settings.ini"
    from draw_nbdev.model import DRAW, DRAWConfig
    card = DRAW(DRAWConfig(glimpses=1, hidden_size=2)).generate_model_card().content
    pages = SETTINGS['doc_host'] + SETTINGS['doc_baseurl']
    for address in (SETTINGS['git_url'], pages, '1502.04623'): assert address in card
