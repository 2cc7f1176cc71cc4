"""Write down what came out of a finished run: results/NAME.json.

    python tools/record.py RUN NAME        the run's own history and its validation curve; for a network with a window on the fixed binarisation,
                                           whose images must be at hand, where it looks

Values of a DRAW network are in nats per image, errors of a classifier are shares between 0 and 1.
The test values come from tools/use_test_set.py."""
import argparse, json
from dataclasses import asdict
from pathlib import Path
import torch
from torch import Tensor
from draw_nbdev.classifier import CLASSIFIERS
from draw_nbdev.data import Images
from draw_nbdev.data_sets import DATA_SETS, find
from draw_nbdev.files import write_text
from draw_nbdev.model import DRAW, PRESETS
from draw_nbdev.options import TrainOptions, recipe, with_epochs
from draw_nbdev.checkpoints import read_metrics

def command(
    history: dict, # As training.json holds it: config, options, data
    name: str, # What the result is called
) -> str: # One line
    "What makes the same run again: the network, and what differs from the recipe that is nearer"
    config, recorded = history['config'], {**asdict(TrainOptions()), **history['options']}
    networks = CLASSIFIERS if name.startswith('cluttered') else PRESETS
    network = max((n for n in networks if name.startswith(n)), key=len, default=None)
    if network is None: raise ValueError(f'{name!r} does not begin with the name of a network: {", ".join(networks)}')
    sizes = {key: value for key, value in config.items() if value != asdict(networks[network])[key]}
    flags = min((flags_for(recorded, config, sizes, network, kind, 'segments' in history) for kind in ('own', 'paper')), key=len)
    images = [] if networks is CLASSIFIERS or history['data']['name'] in DATA_SETS else ['--images', history['data']['name'] + '.zip']
    begin = ['--from', begun_with(history)] if begun_with(history) else []
    return ' '.join(['draw', 'classify' if networks is CLASSIFIERS else 'train', network, *begin, *images, *flags])

def begun_with(history: dict) -> str | None:
    "The weights that a run began with; older runs have the name of their task alone"
    task = history.get('task')
    return task.get('start_from') if isinstance(task, dict) else None

def told(value: float) -> str:
    "As short as it can be without being another number"
    return short if float(short := f'{value:g}') == value else repr(value)

def flags_for(recorded, config, sizes, network, kind, chosen):
    "Options of the command line for everything that a recipe does not say; `chosen`: precision auto has been tried out, and the hardware has chosen"
    options, usual = TrainOptions(**recorded), recipe(network, kind)
    told_by_images = 'height', 'width', 'channels'
    given = {key: value for key, value in sizes.items() if key != 'glimpses' and key not in told_by_images and value is not True}
    switches = [f'--{key.replace("_", "-")}' for key, value in sizes.items() if value is True]
    if 'glimpses' not in sizes and options.growth == with_epochs(usual, options.epochs).growth:
        if options.epochs != usual.epochs: given['epochs'] = options.epochs
    else:
        stages = [*options.growth, (config['glimpses'], options.epochs - sum(epochs for _, epochs in options.growth))]
        given['glimpses'] = ','.join(f'{glimpses}:{epochs}' for glimpses, epochs in stages)
    apart = 'epochs', 'growth', 'log_every', 'save_every', 'every_glimpse', *(['precision'] if chosen and usual.precision == 'auto' else [])
    given |= {key: value for key, value in asdict(options).items() if value != getattr(usual, key) and key not in apart}
    words = [word for key, value in given.items() for word in (f'--{key.replace("_", "-")}', 'none' if value is None else told(value) if isinstance(value, float) else str(value))]
    if options.every_glimpse != usual.every_glimpse: words.append('--every-glimpse' if options.every_glimpse else '--no-every-glimpse')
    return (['--recipe', 'paper'] if kind == 'paper' else []) + words + switches

@torch.no_grad()
def read_path(
    model: DRAW, # With attention
    data: Images, # Images to read
    count: int = 1000, # The first so many of them
) -> Tensor: # Of the read windows, means over images: centre x, centre y and side, in pixels, shape (glimpses, 3)
    "Where a network looks, step by step"
    images, T = data.batch(torch.arange(min(count, len(data)))), model.config.glimpses
    noise = torch.randn(T, len(images), model.config.latent_size, generator=torch.Generator().manual_seed(0))
    windows = model.eval().reconstruct(images, noise).read_windows
    side = (model.config.read_size - 1) * windows.stride
    return torch.stack([windows.center_x, windows.center_y, side], dim=-1).mean(1)

def record(
    run: Path, # Folder of the run
    name: str, # What the result is called
) -> dict: # The outcome
    "History and validation curve of a run"
    history = json.loads((run / 'best/training.json').read_text(encoding='utf-8'))
    score, others = ('error', ('cross_entropy',)) if 'valid_error' in history else ('bound', ('reconstruction', 'latent'))
    rows = [row for row in read_metrics(run) if row['split'] == 'valid']
    unpacked, segments = run / 'unpacked.json', history['segments']
    chosen = next(row for row in rows if row['epoch'] + 1 == history['epochs'])
    return {'name': name, 'data': history['data']['name'], 'data_note': history['data']['note'],
            'checksums': {k: history['data'][k] for k in ('train', 'valid')},
            'seed': history['options']['seed'], 'epochs': history['epochs'],
            'cpu_hours': history['cpu_seconds'] / 3600, 'hours': history['seconds'] / 3600,
            **{f'valid_{key}': chosen[key] for key in (score, f'{score}_se', *others)},
            **{key: chosen[key] for key in ('kl_per_step',) if key in chosen},
            'command': command(history, name), 'config': history['config'], 'options': history['options'], 'version': history['version'],
            **{key: segments[-1][key] for key in ('hardware', 'software')}, 'segments': segments,
            **({'task': history['task']} if begun_with(history) else {}),
            **({'unpacked': json.loads(unpacked.read_text(encoding='utf-8'))} if unpacked.is_file() else {}), # See tools/unpack.py
            'curve': [{key: row[key] for key in ('epoch', 'step', 'glimpses', score, *others, 'seconds', 'cpu_seconds')} for row in rows]}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', type=Path)
    parser.add_argument('name')
    arguments = parser.parse_args()
    out = Path('results') / f'{arguments.name}.json'
    if out.is_file() and 'test' in json.loads(out.read_text(encoding='utf-8')):
        parser.error(f'{out} has test values, which must not be lost: give that result, and its file, another name first')
    try: result = record(arguments.run, arguments.name)
    except (ValueError, OSError) as error: parser.error(str(error))
    if result['data'] == 'mnist_fixed' and result['config']['attention']:
        result['read_path'] = read_path(DRAW.from_pretrained(arguments.run / 'best'), find('mnist_fixed', 'valid')).tolist()
    write_text(out, json.dumps(result, indent=1) + '\n')
    print(out)
