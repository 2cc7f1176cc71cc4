"""Put mistakes into a copy of the package, one at a time, and see which test notices.

    python tools/mutate.py [MODULE ...] [--like TEXT] [--seconds N] [--no-notebook] [--check]

The mistakes and the tests of every module are in tools/mutations.py. A mistake goes into the module
and into the notebook that it comes from, both in a temporary copy; then the tests run, and if they
pass, the notebook, as `nbdev_test` runs it. A mistake that neither notices has survived, and the
exit code is 1. Before that, everything must pass without a mistake. A text that does not stand in
the module exactly once is an error: --check looks for that alone. Run by hand: a module takes
minutes, all of them hours."""
import argparse, importlib, json, multiprocessing, os, re, shlex, shutil, signal, sys, tempfile
import time
from pathlib import Path
import pytest
from mutations import MUTATIONS, TESTS

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = '.git', '__pycache__', '_docs', '_proc', '.hypothesis', '.pytest_cache', 'runs', 'shared'
IMPORTED = ( # once, for all processes that are forked; nothing of the package itself
    'torch', 'torchvision', 'hypothesis', 'pandas', 'matplotlib.pyplot', 'nbdev.test', 'accelerate',
    'h5py',
)

def change(
    source: str, # Of a module or a cell
    old: str, # What stands in it once, whatever the blanks and line ends
    new: str, # What stands there afterwards
) -> str:
    "The source with one mistake; raises `LookupError` where the text is not there exactly once"
    pattern = re.compile(r'\s*'.join(map(re.escape, re.findall(r'\w+|\S', old))))
    found = len(pattern.findall(source))
    if found != 1:
        raise LookupError(f'{old!r} stands there {found} times: mend tools/mutations.py')
    return pattern.sub(lambda _: new, source)

def mutate(
    top: Path, # Of the repository, or of a copy
    module: str, # Name in `MUTATIONS`
    old: str, # What stands in it
    new: str, # The mistake
) -> dict[Path, str]: # File -> its text with the mistake: the module and its notebook
    "Both texts of a mistake; raises `LookupError` where they cannot be made"
    file, notebook = top / f'draw_nbdev/{module}.py', top / 'nbs' / notebook_of(module)
    mutated = change(file.read_text(encoding='utf-8'), old, new)
    try: compile(mutated, file, 'exec')
    except SyntaxError as error:
        raise LookupError(f'{new!r} is no code there ({error}): mend tools/mutations.py') from None
    held = json.loads(notebook.read_text(encoding='utf-8'))
    for cell in held['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and source.startswith('#| export'):
            try: cell['source'] = change(source, old, new)
            except LookupError: pass
    return {file: mutated, notebook: json.dumps(held)}

def child(top, job, said):
    "What a forked process does: the tests of a module, or its notebook, in the copy"
    os.setsid()
    os.chdir(top)
    os.environ |= {'PYTHONPATH': str(top), 'PYTHONDONTWRITEBYTECODE': '1', 'MPLBACKEND': 'Agg'}
    sys.dont_write_bytecode, sys.path[:0] = True, [str(top)]
    sys.stdout = sys.stderr = open(said, 'w', buffering=1, encoding='utf-8')
    for stream in (1, 2): os.dup2(sys.stdout.fileno(), stream)
    if not job.endswith('.ipynb'):
        os._exit(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *shlex.split(f'tests/{job}')]))
    from nbdev.config import get_config
    from nbdev.test import test_nb
    passed, _ = test_nb(top / 'nbs' / job, skip_flags=get_config().tst_flags.split(), basepath=top)
    os._exit(not passed)

def notices(
    top: Path, # The copy
    job: str, # Arguments of pytest, or a notebook
    seconds: float, # After which it counts as hanging
) -> str | None: # What has failed, None for nothing
    "Run one job in a process of its own"
    said = top / 'said'
    process = multiprocessing.get_context('fork').Process(target=child, args=(top, job, said))
    process.start()
    process.join(seconds)
    late, code = process.is_alive(), process.exitcode
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.join()
    text = said.read_text(errors='replace')
    if late: return f'{job}: still running after {seconds:g} s'
    if code in (4, 5): raise ValueError(f'no such tests: {job}\n{text[-2000:]}')
    failed = re.search(r'^(?:FAILED|ERROR) tests/(\S+)', text, re.MULTILINE)
    return None if code == 0 else failed[1] if failed else job

def try_out(
    top: Path, # A copy of the repository
    module: str, # Name in `MUTATIONS`
    old: str, # What stands in it
    new: str, # The mistake
    jobs: list[str], # Arguments of pytest, and notebooks
    seconds: float, # For each job
    sound: set[str], # Jobs that have passed without a mistake, added to
) -> str | None: # What has noticed, None for nothing
    "Run the jobs with a mistake until one of them fails; the copy is as before afterwards"
    files = mutate(top, module, old, new)
    before = {file: file.read_bytes() for file in files}
    for job in jobs:
        if job not in sound and (failed := notices(top, job, 2 * seconds)):
            raise ValueError(f'{failed} fails without any mistake')
        sound.add(job)
        for file, text in files.items(): file.write_text(text, encoding='utf-8')
        by = notices(top, job, seconds)
        for file, held in before.items(): file.write_bytes(held)
        if by: return by
    return None

def notebook_of(module):
    "Name of the notebook that a module comes from"
    text = (ROOT / f'draw_nbdev/{module}.py').read_text(encoding='utf-8')
    return re.search(r'File to edit: \.\./nbs/(\S+\.ipynb)', text)[1]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('modules', nargs='*', metavar='MODULE', help=f'of {", ".join(MUTATIONS)}; default: all')
    add('--like', default='', metavar='TEXT', help='mistakes with this in their name')
    add('--seconds', type=float, default=300, help='for the tests and for the notebook')
    add('--no-notebook', action='store_true', help='the tests alone')
    add('--check', action='store_true', help='only see that every text is there once')
    o = parser.parse_args()
    unknown = [m for m in o.modules if m not in MUTATIONS]
    if unknown: parser.error(f'no mistakes for {unknown[0]}: choose of {", ".join(MUTATIONS)}')
    modules = o.modules or MUTATIONS
    chosen = [(m, *row) for m in modules for row in MUTATIONS[m] if o.like in row[0]]
    if not chosen: parser.error(f'no mistake has {o.like!r} in its name')
    problems = []
    for module, name, old, new in chosen:
        try: mutate(ROOT, module, old, new)
        except LookupError as error: problems.append(f'{module}, {name}: {error}')
    if problems or o.check: sys.exit('\n'.join(problems) or None)
    for name in IMPORTED: importlib.import_module(name)
    survived, sound, left_out = 0, set(), shutil.ignore_patterns(*LEFT_OUT)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(shutil.copytree(ROOT, Path(folder) / 'copy', ignore=left_out)).resolve()
        for module, name, old, new in chosen:
            jobs = [*TESTS[module], *([] if o.no_notebook else [notebook_of(module)])]
            start = time.monotonic()
            by = try_out(top, module, old, new, jobs, o.seconds, sound)
            survived += by is None
            verdict = f'killed by {by}' if by else 'SURVIVED'
            print(f'{module:12} {name:52} {time.monotonic() - start:4.0f} s  {verdict}', flush=True)
    print(f'{survived} of {len(chosen)} survived')
    sys.exit(survived > 0)
