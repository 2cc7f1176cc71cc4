"""Print a command that README.md gives its readers, so that what is tested is what is written.

    python tools/readme_command.py NAME

The command is the code block that follows the comment `<!-- command: NAME -->`; its lines are joined by `&&`."""
import re, sys
from pathlib import Path

def command(
    text: str, # README.md
    name: str, # Name in the comment
) -> str: # One line of shell
    "The block after the comment, as one line"
    found = re.search(rf'<!-- command: {re.escape(name)} -->\s*^```[^\n]*\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    if not found: raise ValueError(f'README.md has no code block after <!-- command: {name} -->: add the comment to nbs/index.ipynb')
    return ' && '.join(line.strip() for line in found[1].splitlines() if line.strip() and not line.startswith('#'))

if __name__ == '__main__':
    try: print(command(Path('README.md').read_text(encoding='utf-8'), sys.argv[1]))
    except ValueError as error: sys.exit(str(error))
