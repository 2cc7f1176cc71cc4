"""Write down what came out of a finished run: results/NAME.json.

    python tools/record.py RUN NAME                 the run's own history and its validation curve
    python tools/record.py RUN NAME --test 50       the same, and the test set: 5 seeds and 50 importance samples

The test set is for weights that were chosen on validation images, and is used once."""
import argparse, json, os, platform
from dataclasses import asdict
from pathlib import Path
import torch
from draw_nbdev.data import load
from draw_nbdev.evaluation import evaluate
from draw_nbdev.model import DRAW
from draw_nbdev.training import read_metrics

def hardware() -> str: # Processor, cores and threads
    "What this machine computes with"
    file = Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in file.read_text().splitlines() if line.startswith('model name')] if file.is_file() else []
    return f'{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads'

def record(
    run: Path, # Folder of the run
    name: str, # What the result is called
    samples: int | None, # Importance samples for the test set, or None to leave it alone
) -> dict: # The outcome
    "History, validation curve and test bounds of a run"
    history = json.loads((run / 'best/training.json').read_text(encoding='utf-8'))
    rows = [row for row in read_metrics(run) if row['split'] == 'valid']
    chosen = next(row for row in rows if row['bound'] == history['valid_bound'])
    result = {'name': name, 'data': history['data']['name'], 'data_note': history['data']['note'], 'checksums': {k: history['data'][k] for k in ('train', 'valid')},
              'seed': history['options']['seed'], 'epochs': history['epochs'], 'cpu_hours': history['cpu_seconds'] / 3600, 'hours': history['seconds'] / 3600,
              'valid_bound': history['valid_bound'], 'valid_bound_se': chosen['bound_se'], 'valid_reconstruction': chosen['reconstruction'], 'valid_latent': chosen['latent'],
              'kl_per_step': chosen['kl_per_step'], 'config': history['config'], 'options': history['options'], 'version': history['version'],
              'software': f'Python {platform.python_version()}, torch {torch.__version__}', 'hardware': hardware(),
              'curve': [{key: row[key] for key in ('epoch', 'step', 'glimpses', 'bound', 'reconstruction', 'latent', 'seconds')} for row in rows]}
    if samples:
        test = evaluate(DRAW.from_pretrained(run), load(history['data']['name'], 'test'), seeds=5, samples=samples)
        result.update(test_bound=test.bound, test_bound_se=test.bound_se, test_bound_spread=test.bound_spread, iw_bound=test.iw_bound, iw_bound_se=test.iw_bound_se, iw_k=samples, test=asdict(test))
    return result

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path)
    parser.add_argument('name')
    parser.add_argument('--test', type=int, metavar='K', help='use the test set, with K importance samples')
    arguments = parser.parse_args()
    out = Path('results') / f'{arguments.name}.json'
    partial = out.with_suffix('.tmp')
    partial.write_text(json.dumps(record(arguments.run, arguments.name, arguments.test), indent=1) + '\n', encoding='utf-8')
    partial.replace(out)
    print(out)
