"""Compare what was made a second time with results/NAME.json: results/again.json.

    python tools/again.py FOLDER NAME      FOLDER comes from a clone of the repository and an environment of its own:
                                           a run, made with the command of results/NAME.json, or what
                                           `draw evaluate NAME --split test --out FOLDER` left there, with --seeds 5 --samples 50 for a DRAW network

Runs are compared by validation values: the test images have had their one use, and choosing is over. Where the chosen epoch and all validation
values are equal, so are the weights. Evaluations are compared by the test value of the packaged weights."""
import argparse, json
from pathlib import Path
import torch
from draw_nbdev.files import write_text
from draw_nbdev.runs import machine
from record import record

OUT = Path('results/again.json')

def trained(
    folder: Path, # Of the second run
    name: str, # Of the result
    first: dict, # The result
) -> dict: # Part of a row
    "What a training came to the first time and now; raises `ValueError` for a run with other options"
    second = record(folder, name)
    if second['command'] != first['command']: raise ValueError(f'{folder} was made with: {second["command"]}, and {name} with: {first["command"]}')
    score = 'error' if 'valid_error' in first else 'bound'
    curves = [[row[score] for row in r['curve']] for r in (first, second)]
    return {'command': first['command'], 'value': f'valid_{score}', 'first': first[f'valid_{score}'], 'se': first[f'valid_{score}_se'], 'again': second[f'valid_{score}'],
            'epochs': [first['epochs'], second['epochs']], 'largest_difference_of_curves': max(abs(a - b) for a, b in zip(*curves, strict=True)),
            'cpu_hours': second['cpu_hours']}

def evaluated(
    folder: Path, # With evaluation.json
    name: str, # Of the result and of the packaged weights
    first: dict, # The result
) -> dict: # Part of a row
    "What the test set said the first time and now; raises `ValueError` for an evaluation of something else"
    second, kept = json.loads((folder / 'evaluation.json').read_text(encoding='utf-8')), first['test']
    same = ('data', 'split', 'images', 'glimpses', *(('seeds', 'iw_samples') if 'seeds' in kept else ()))
    differing = [key for key in same if second[key] != kept[key]]
    if second['model'] != name or differing: raise ValueError(f'{folder} is not what results/{name}.json has under "test": {", ".join(differing) or second["model"]}')
    score = 'bound' if 'bound' in kept else 'error'
    row = {'command': f'draw evaluate {name} --split test', 'value': f'test_{score}', 'first': kept[score], 'se': kept[f'{score}_se'], 'again': second[score]}
    if score == 'error': return row
    row['command'] += f' --seeds {kept["seeds"]} --samples {kept["iw_samples"]}'
    return row | {'spread': kept['bound_spread'], 'iw_bound': [kept['iw_bound'], second['iw_bound']]}

def again(
    folder: Path, # Of a run or of an evaluation
    name: str, # Of the result
) -> dict: # One row
    "The same number twice, and where the second comes from"
    first = json.loads(Path(f'results/{name}.json').read_text(encoding='utf-8'))
    part = (evaluated if (folder / 'evaluation.json').is_file() else trained)(folder, name, first)
    made = first if 'epochs' in part else first | first.get('tested_on', {}) # trained on one machine, evaluated on another
    return {'name': name, **part, **{key: [made[key], value] for key, value in machine(torch.device('cpu')).items()}}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('name')
    arguments = parser.parse_args()
    rows = {(row['name'], row['value']): row for row in json.loads(OUT.read_text(encoding='utf-8'))} if OUT.is_file() else {}
    try: row = again(arguments.folder, arguments.name)
    except (ValueError, OSError) as error: parser.error(str(error))
    rows[row['name'], row['value']] = row
    write_text(OUT, json.dumps([rows[key] for key in sorted(rows)], indent=1) + '\n')
    print(json.dumps(row, indent=1))
