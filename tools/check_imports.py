"""Fail on a cell that mixes imports with other code.

    python tools/check_imports.py [FOLDER]

Building the site runs every cell that holds an import again, from the top of the repository. Such a cell must therefore hold imports and
nothing else. Exported cells are run too, but define things and do nothing, so they may mix."""
import ast, json, sys
from pathlib import Path

EXCUSED = '#| export', '#|export', '#| eval: false'

def mixes(
    source: str, # Source of a code cell
) -> bool: # Does it hold both an import and something else?
    "Look at the top level of the cell"
    try: statements = ast.parse('\n'.join(line for line in source.splitlines() if line[:1] not in '%!')).body
    except SyntaxError: return False
    imports = [isinstance(o, (ast.Import, ast.ImportFrom)) for o in statements]
    return any(imports) and not all(imports)

def mixed_cells(
    folder: Path, # Folder of notebooks
) -> list: # 'FILE, cell NUMBER' of each mixed cell
    "All cells that mix imports with other code"
    found = []
    for file in sorted(folder.rglob('*.ipynb')):
        for number,cell in enumerate(json.loads(file.read_text(encoding='utf-8'))['cells']):
            source = ''.join(cell['source'])
            excused = cell['cell_type'] != 'code' or source.startswith(EXCUSED) or 'nbdev_export()' in source
            if not excused and mixes(source): found.append(f'{file}, cell {number}')
    return found

if __name__ == '__main__':
    found = mixed_cells(Path(sys.argv[1] if len(sys.argv) > 1 else 'nbs'))
    print('\n'.join(found) or 'No cell mixes imports with other code.')
    sys.exit(bool(found))
