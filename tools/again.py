"""Compare a run made with the command of results/NAME.json with that file: results/again.json.

    python tools/again.py RUN NAME         RUN is the folder of the second run, made in a clone of the repository and an environment of its own

Validation values only: the test images have had their one use. Where the chosen epoch and all validation values are equal, so are the weights."""
import argparse, json
from pathlib import Path
from record import record

OUT = Path('results/again.json')

def again(
    run: Path, # Folder of the second run
    name: str, # Of the result
) -> dict: # One row
    "What came out the first time and now; raises `ValueError` for a run with other options"
    first, second = json.loads(Path(f'results/{name}.json').read_text(encoding='utf-8')), record(run, name, None)
    if second['command'] != first['command']: raise ValueError(f'{run} was made with: {second["command"]}, and {name} with: {first["command"]}')
    score = 'valid_error' if 'valid_error' in first else 'valid_bound'
    values = [[row[score.removeprefix('valid_')] for row in r['curve']] for r in (first, second)]
    return {'name': name, 'command': first['command'], 'value': score, 'first': first[score], 'se': first[f'{score}_se'], 'again': second[score],
            'epochs': [first['epochs'], second['epochs']], 'largest_difference_of_curves': max(abs(a - b) for a, b in zip(*values, strict=True)),
            'cpu_hours': second['cpu_hours'], 'hardware': second['hardware'], 'software': second['software']}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path)
    parser.add_argument('name')
    arguments = parser.parse_args()
    rows = {row['name']: row for row in json.loads(OUT.read_text(encoding='utf-8'))} if OUT.is_file() else {}
    rows[arguments.name] = again(arguments.run, arguments.name)
    partial = OUT.with_suffix('.tmp')
    partial.write_text(json.dumps(list(rows.values()), indent=1) + '\n', encoding='utf-8')
    partial.replace(OUT)
    print(json.dumps(rows[arguments.name], indent=1))
