"""Put the weights of a run into the package: draw_nbdev/pretrained/NAME.

    python tools/package.py RUN NAME       NAME as in draw_nbdev.reproduce.EXPERIMENTS: mnist, cluttered_8, svhn_sample, ...,
                                           or with an ending: mnist_150_epochs

Weights are stored in half precision where that moves the value on validation images by less than the limits below, else as they are.
The curve of the run goes along, thinned, and a model card (tools/cards.py)."""
import argparse, json, tempfile
from pathlib import Path
from cards import card
from safetensors.torch import load_file, save_file
from draw_nbdev.classifier import classification_error, load_classifier
from draw_nbdev.data_sets import find
from draw_nbdev.evaluation import evaluate
from draw_nbdev.files import write_json, write_text
from draw_nbdev.loading import PRETRAINED
from draw_nbdev.model import DRAW, DRAWConfig
from draw_nbdev.reproduce import EXPERIMENTS, Experiment
from draw_nbdev.checkpoints import read_metrics, save_weights

LIMITS = {'bound': 0.02, 'error': 0.0005} # What half precision may cost, in nats per image and as a share of images
POINTS = 200 # Rows of training metrics that are kept

def score(model, data, kind):
    "The value on validation images that weights are chosen by"
    return (evaluate(model, data).bound if kind == 'bound' else classification_error(model, data).error)

def thinned(rows: list[dict]) -> list[dict]: # At most about `POINTS` of training and all of validation, in order
    "Means of as many training rows as it takes"
    train, valid = ([row for row in rows if row['split'] == split] for split in ('train', 'valid'))
    size = max(1, -(-len(train) // POINTS))
    groups = [train[i:i + size] for i in range(0, len(train), size)]
    means = [{**group[-1], **{key: sum(row[key] for row in group) / len(group) for key, value in group[-1].items() if isinstance(value, float)}} for group in groups]
    def short(value): return float(f'{value:.6g}') if isinstance(value, float) else value
    return [{key: short(value) for key, value in row.items() if key != 'kl_per_step'} for row in sorted(means + valid, key=lambda row: row['step'])]

def experiment_for(
    name: str, # Of packaged weights
) -> Experiment: # The longest name that it begins with, so that a network can have several trainings
    "What the network is for; raises `ValueError` where it is none of the paper's"
    named = {e.weights or e.name: e for e in EXPERIMENTS.values()}
    begun = [known for known in named if name.startswith(known)]
    if not begun: raise ValueError(f'{name!r} does not begin with the name of a network: {", ".join(named)}')
    return named[max(begun, key=len)]

def package(
    run: Path, # Folder of a run
    name: str, # Of the packaged weights
):
    "Copy, halve where that does no harm, and say what it cost"
    experiment = experiment_for(name)
    kind, load = ('bound', DRAW.from_pretrained) if isinstance(experiment.full.config, DRAWConfig) else ('error', load_classifier)
    model, valid, out = load(run), find(experiment.data, 'valid'), PRETRAINED / name
    history = json.loads((run / 'best/training.json').read_text(encoding='utf-8'))
    out.mkdir(exist_ok=True, parents=True)
    before = score(model, valid, kind)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder: # what is packaged stays until its successor is complete
        made = Path(folder)
        save_weights(model, made, history)
        whole, file = load_file(made / 'model.safetensors'), made / 'model.safetensors'
        metadata = {'format': 'pt', 'draw_nbdev': history['version'], 'train': history['data']['train']} # the checksum of what was learned from
        save_file({key: value.half() for key, value in whole.items()}, file, metadata)
        moved = abs(score(load(made), valid, kind) - before)
        harmless = moved < LIMITS[kind] # not so, if it is not a number
        if not harmless: save_file(whole, file, metadata)
        file.chmod((made / 'config.json').stat().st_mode)
        history['half_precision'] = {'used': harmless, 'moves_valid_by': moved}
        write_json(made / 'training.json', history)
        write_text(made / 'metrics.jsonl', ''.join(json.dumps(row) + '\n' for row in thinned(read_metrics(run))))
        for part in sorted(made.iterdir()): part.replace(out / part.name)
    write_text(out / 'README.md', card(name))
    print(f'{out.relative_to(Path.cwd())}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB, valid {before:.4f}, half precision moves it by {moved:.4f}')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path)
    parser.add_argument('name')
    arguments = parser.parse_args()
    try: package(arguments.run, arguments.name)
    except ValueError as error: parser.error(str(error))
