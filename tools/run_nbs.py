"""Run notebooks in place and keep their outputs.

    python tools/run_nbs.py [NAME...] [--flags FLAG...]

NAME is a file under nbs/, as in `16_filterbank` or `nbs/16_filterbank.ipynb`; none means all of them. Saved outputs always come from here,
never from Jupyter, which draws figures at another resolution: a seeded notebook run twice is then the same file, byte for byte.
JupyterLab is told to fold the cells between the question of an exercise and the end of its solution, as the site does.
Cells with a flag of `tst_flags` (settings.ini) are skipped and keep the outputs they have, as `nbdev_test` skips them, unless --flags names it."""
import argparse, os, re
from pathlib import Path
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import extract_directives

def close_solutions(
    notebook, # As `read_nb` returns it
):
    "Mark the cells of solutions, all of which lie between a cell that opens one and a cell that begins with its end"
    inside = False
    for cell in notebook.cells:
        tags = re.findall('<details class="solution">|</details>', cell.source) if cell.cell_type == 'markdown' else []
        cell.metadata.pop('jupyter', None)
        if inside and not tags: cell.metadata['jupyter'] = {'source_hidden': True} | ({'outputs_hidden': True} if cell.cell_type == 'code' else {})
        if tags: inside = tags[-1] != '</details>'

def run(
    file: Path, # Notebook
    skip: set, # Flags whose cells are not run
):
    "Run one notebook in its own folder, save it, clean it"
    def skipped(cell):
        if cell.cell_type != 'code': return True
        directives = extract_directives(cell, remove=False)
        not_evaluated = directives.get('eval:', [''])[0].lower() == 'false'
        return not_evaluated or 'nbdev_export'+'(' in cell.source or bool(skip & directives.keys())
    notebook = read_nb(file)
    shell = CaptureShell(file, mpl_format='png')
    with working_directory(file.parent): shell.run_all(notebook, exc_stop=True, preproc=skipped)
    close_solutions(notebook)
    write_nb(notebook, file)
    nbdev_clean.__wrapped__(fname=str(file))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Run notebooks in place and keep their outputs')
    parser.add_argument('names', nargs='*', metavar='NAME', help='notebooks under nbs/ (default: all)')
    parser.add_argument('--flags', nargs='*', default=[], metavar='FLAG', help='run the cells with these flags too')
    args = parser.parse_args()
    cfg = get_config()
    os.environ['IN_TEST'] = '1'
    files = [cfg.nbs_path/f'{Path(name).stem}.ipynb' for name in args.names] or sorted(cfg.nbs_path.glob('*.ipynb'))
    for file in files:
        if not file.is_file(): parser.error(f'no notebook {file}')
    for file in files:
        print(file.name, flush=True)
        run(file, set(cfg.tst_flags.split()) - set(args.flags))
