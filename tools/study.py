"""What the choices of training do to the bound: results/study.json.

    python tools/study.py OUT [--only NAME ...]     OUT keeps the runs: one that is there goes on, or is only read

MNIST on the fixed binarisation without attention, 8 glimpses, three epochs; one choice at a time differs from the base. The last rows are the network with
attention at 16 glimpses: three seeds, and the choices that may matter more there; then the recipe of `draw train mnist`, its first window, optimisers,
rates, clipping, and its stages beside those of the recipe before it; the path of the window, for two first windows;
last classifiers. Rows named with --only are run and replace those of the same name in the file; those that are not in `VARIANTS` are from `draw train`.
About five hours of one core; the test images are not used."""
import argparse, json, subprocess, sys
from dataclasses import replace
from math import log
from pathlib import Path
import torch
from torch import nn
from draw_nbdev.classifier import CLASSIFIERS, ClassifyTask, DifferentiableRAM
from draw_nbdev.data_sets import find
from draw_nbdev.files import write_text
from draw_nbdev.model import DRAW, DRAWConfig, preset
from draw_nbdev.options import RECIPES, TrainOptions
from draw_nbdev.checkpoints import read_metrics
from draw_nbdev.runs import machine
from draw_nbdev.training import Task, train
from record import read_path

BASE = TrainOptions(epochs=3, learning_rate=1.5e-3, precision='bf16')
ATTENTION = dict(attention=True, glimpses=16)
RECIPE = replace(RECIPES['mnist'], seed=0, epochs=3, growth=(), decay=0.01, weight_decay=0., precision='bf16', valid_images=5000) # Its optimiser and first window, for three epochs at 16 steps and a constant rate
ADAM = replace(RECIPE, optimizer='adam')
STAGES = dict(growth=((16, 2), (32, 2)), epochs=6)
FALLING = replace(RECIPE, epochs=18, decay=1., average=0.999) # A rate that falls from the first update to the last
OUT = Path('results/study.json')
SHOWN = 'epochs', 'learning_rate', 'batch_size', 'kl_warmup', 'clip_norm', 'average', 'precision' # Choices of the base that the file names

class Normal(Task):
    "Every weight from N(0, 0.01^2), biases zero"
    def start(self, config, train_set):
        model = super().start(config, train_set)
        for layer in model.modules():
            if not isinstance(layer, nn.Linear): continue
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        return model

class Orthogonal(Task):
    "The weights from h to each gate orthogonal"
    def start(self, config, train_set):
        model = super().start(config, train_set)
        for cell in (model.encoder, model.decoder):
            for gate in cell.gates.weight.data[:, -config.hidden_size:].chunk(4): nn.init.orthogonal_(gate)
        return model

class FirstWindow(Task):
    "Filters of fresh windows `share` of their distance wide, and at least a pixel"
    def __init__(self, share): self.share = share
    def start(self, config, train_set):
        model = super().start(config, train_set)
        for window, size in ((model.read.window, config.read_size), (model.write.window, config.write_size)):
            with torch.no_grad(): window.bias[2] = 2 * log(max(1, self.share * (config.width - 1) / (size - 1)))
        return model

class Watched(Task):
    "Logs where the read window lies, step by step, after every epoch"
    def validate(self, model, data, glimpses, limit):
        path = [[round(value, 1) for value in place] for place in read_path(model, data).tolist()]
        return {**super().validate(model, data, glimpses, limit), 'read_path': path}

class SmallWindows(Watched):
    "Fresh windows 6 pixels wide for reading and 9 for writing, instead of as wide as the image"
    def start(self, config, train_set):
        model = super().start(config, train_set)
        for window, side in ((model.read.window, 6), (model.write.window, 9)):
            with torch.no_grad(): window.bias[3] = log(side / (config.width - 1))
        return model

class Begun(Watched):
    "Goes on from another run of this study, whose window has found its way"
    runs: Path # Folder of all runs, known when the first begins
    def __init__(self, name: str): self.name = name # Of that run, in `VARIANTS`
    def start(self, config, train_set): return DRAW.from_pretrained(self.runs / folder_of(self.name))

class WeightNormDRAW(DRAW):
    "Each row of both cells' gates as a direction and a length (Salimans and Kingma, 2016)"
    def __init__(self, config: DRAWConfig):
        super().__init__(config)
        for cell in (self.encoder, self.decoder): nn.utils.parametrizations.weight_norm(cell.gates)

class WeightNorm(Task):
    network = WeightNormDRAW

PIXEL = FirstWindow(0)

VARIANTS = { # name: (what is varied, changed options, changed sizes, task)
    'base': ('base', {}, {}, Task()),
    'seed 1': ('base', dict(seed=1), {}, Task()),
    'seed 2': ('base', dict(seed=2), {}, Task()),
    'rate 5e-4': ('learning rate', dict(learning_rate=5e-4), {}, Task()),
    'rate 3e-3': ('learning rate', dict(learning_rate=3e-3), {}, Task()),
    'batch 50': ('batch', dict(batch_size=50), {}, Task()),
    'batch 200': ('batch', dict(batch_size=200), {}, Task()),
    'N(0, 0.01^2)': ('initial weights', {}, {}, Normal()),
    'orthogonal': ('initial weights', {}, {}, Orthogonal()),
    'layer norm': ('layer norm', {}, dict(layer_norm=True), Task()),
    'no warm-up of the KL': ('KL warm-up', dict(kl_warmup=0), {}, Task()),
    'not averaged': ('averaging', dict(average=0.), {}, Task()),
    'float32': ('precision', dict(precision='no'), {}, Task()),
    'T = 2, 4, 8': ('growth', dict(growth=((2, 4), (4, 2)), epochs=7), {}, Task()),
    **{f'attention, seed {seed}': ('with attention', dict(seed=seed), ATTENTION, PIXEL) for seed in range(3)},
    'attention, no warm-up': ('with attention', dict(kl_warmup=0), ATTENTION, PIXEL),
    'attention, layer norm': ('with attention', {}, ATTENTION | dict(layer_norm=True), PIXEL),
    'attention, T = 4, 8, 16': ('with attention', dict(growth=((4, 4), (8, 2)), epochs=7), ATTENTION, PIXEL),
}

def around(options, **changes): return {name: value for name, value in {**vars(options), **changes}.items() if value != getattr(BASE, name)}

VARIANTS |= {
    **{f'recipe, seed {seed}': ('recipe', around(RECIPE, seed=seed), ATTENTION, Task()) for seed in range(5)},
    **{f'1 pixel, seed {seed}': ('first window', around(RECIPE, seed=seed), ATTENTION, PIXEL) for seed in range(3)},
    'adam 3e-3': ('optimiser and rate', around(ADAM), ATTENTION, Task()),
    'adam 1.5e-3': ('optimiser and rate', around(ADAM, learning_rate=1.5e-3), ATTENTION, Task()),
    'adam 6e-3': ('optimiser and rate', around(ADAM, learning_rate=6e-3), ATTENTION, Task()),
    'muon 1.5e-3': ('optimiser and rate', around(RECIPE, learning_rate=1.5e-3), ATTENTION, Task()),
    'muon 6e-3': ('optimiser and rate', around(RECIPE, learning_rate=6e-3), ATTENTION, Task()),
    **{f'adam 3e-3, seed {seed}': ('optimiser and rate', around(ADAM, seed=seed), ATTENTION, Task()) for seed in (1, 2)},
    'stages, recipe': ('stages', around(RECIPE, **STAGES), ATTENTION | dict(glimpses=64), Task()),
    'stages, before': ('stages', around(ADAM, learning_rate=1.5e-3, kl_warmup=1000, average=0.999, decay=1., **STAGES), ATTENTION | dict(glimpses=64), PIXEL),
    **{f'half a distance, seed {seed}': ('first window', around(RECIPE, seed=seed), ATTENTION, FirstWindow(0.5)) for seed in range(3)},
    'muon, no clipping': ('clipping', around(RECIPE, clip_norm=None), ATTENTION, Task()),
    'muon, clip 100': ('clipping', around(RECIPE, clip_norm=100.), ATTENTION, Task()),
    'adam 3e-3, no clipping': ('clipping', around(ADAM, clip_norm=None), ATTENTION, Task()),
    'adam 3e-3, clip 100': ('clipping', around(ADAM, clip_norm=100.), ATTENTION, Task()),
    'adam 3e-3, weight norm': ('weight normalisation', around(ADAM), ATTENTION, WeightNorm()),
    'muon, KL warm-up': ('KL warm-up with attention', around(RECIPE, kl_warmup=1000), ATTENTION, Task()),
    'T = 64 from the start': ('stages', around(RECIPE, epochs=1), ATTENTION | dict(glimpses=64), Task()), # in the time of three epochs at 16
    '18 epochs at T = 64, falling rate': ('falling rate', around(FALLING), ATTENTION | dict(glimpses=64), Watched()),
    '18 epochs at T = 64, falling rate, weight decay': ('falling rate', around(FALLING, weight_decay=0.1), ATTENTION | dict(glimpses=64), Watched()),
    'T = 64 from the start, 1 pixel': ('stages', around(RECIPE, epochs=1), ATTENTION | dict(glimpses=64), PIXEL),
}

EIGHT = replace(RECIPES['mnist'], seed=0, epochs=8, precision='bf16')
VARIANTS |= {f'path, seed {seed}': ('path', around(EIGHT, seed=seed), ATTENTION, Watched()) for seed in range(3)}
VARIANTS |= {f'path, small windows, seed {seed}': ('path', around(EIGHT, seed=seed), ATTENTION, SmallWindows()) for seed in range(4)}

SEARCH = replace(EIGHT, epochs=2, average=0.998)
FOUND = replace(SEARCH, epochs=4) # From the end of that search
for seed in (0, 2): # those of `small windows` above that go round the digit
    begin = f'same way, seed {seed}, search'
    VARIANTS[begin] = 'same way', around(SEARCH, seed=seed), ATTENTION, SmallWindows()
    VARIANTS |= {f'same way, seed {seed}, {name}': ('same way', around(FOUND, seed=seed, **options), ATTENTION, Begun(begin)) for name, options in {
        'muon 3e-3': {}, 'muon 6e-3': dict(learning_rate=6e-3), 'adam 3e-3': dict(optimizer='adam'), 'adam 6e-3': dict(optimizer='adam', learning_rate=6e-3),
        **({'muon 1.5e-3': dict(learning_rate=1.5e-3), 'muon 1.2e-2': dict(learning_rate=1.2e-2), 'adam 1.5e-3': dict(optimizer='adam', learning_rate=1.5e-3),
            'adam 1.2e-2': dict(optimizer='adam', learning_rate=1.2e-2)} if seed == 0 else {})}.items()}

READING = TrainOptions(epochs=12, learning_rate=2e-3, kl_warmup=0, clip_norm=1.0, decay=0.4, valid_images=5000)
SEARCHING = replace(RECIPES['cluttered_8'], epochs=8, decay=0.01, weight_decay=0., optimizer='adam', precision='bf16', valid_images=5000) # Eight glimpses at a constant rate

def reading(limit, every=False): return ClassifyTask(DifferentiableRAM, every, limit)

VARIANTS |= {f'classifier, {name}': ('classifier', around(READING, **options), {}, reading(4, options.get('every_glimpse', False))) for name, options in { # cluttered MNIST, four glimpses
    'adam 2e-3': {}, 'adam 4e-3': dict(learning_rate=4e-3), 'adam 2e-3, every glimpse': dict(every_glimpse=True),
    'muon 5e-4': dict(optimizer='muon', learning_rate=5e-4), 'muon 3e-3': dict(optimizer='muon', learning_rate=3e-3),
    'muon 3e-3, every glimpse': dict(optimizer='muon', learning_rate=3e-3, every_glimpse=True)}.items()}
VARIANTS |= {f'{optimizer}, limit {limit or "none"}': ('gradients through time', around(SEARCHING, optimizer=optimizer), dict(glimpses=8), reading(limit))
             for optimizer, limits in (('adam', (4, 16, 64, None)), ('muon', (4, 64))) for limit in limits}

def folder_of(
    name: str, # In `VARIANTS`
) -> str: # Of its run
    "A name that every file system takes"
    return ''.join(c if c.isalnum() else '_' for c in name)

def run(
    name: str, # In `VARIANTS`
    out: Path, # Folder of the runs
) -> dict: # One row of the study
    "Train, or read what is there"
    part, options, sizes, task = VARIANTS[name]
    folder, options = out / folder_of(name), replace(BASE, **options)
    Begun.runs = out
    classifies = isinstance(task, ClassifyTask)
    data, score, other = ('cluttered_mnist', 'error', 'cross_entropy') if classifies else ('mnist_fixed', 'bound', 'latent')
    config = CLASSIFIERS['cluttered_4'] if classifies else preset('mnist_no_attention', glimpses=8)
    train_set, valid_set = (find(data, split) for split in ('train', 'valid'))
    train(replace(config, **sizes), train_set, valid_set, folder, options, task)
    rows = [row for row in read_metrics(folder) if row['split'] == 'valid']
    return {'name': name, 'part': part, 'changes': VARIANTS[name][1] | sizes, **{f'valid_{key}': rows[-1][key] for key in (score, f'{score}_se', other)},
            'images': options.valid_images or len(valid_set), 'epochs': rows[-1]['epoch'] + 1, 'cpu_seconds': rows[-1]['cpu_seconds'],
            **machine(torch.device('cpu')), 'curve': [{key: row[key] for key in ('epoch', 'glimpses', score, 'cpu_seconds', 'read_path') if key in row} for row in rows]}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path)
    parser.add_argument('--only', nargs='*', default=list(VARIANTS), choices=list(VARIANTS))
    arguments = parser.parse_args()
    if len(arguments.only) > 1: # each in a process of its own, since Accelerate allows one precision in each
        for name in arguments.only: subprocess.run([sys.executable, __file__, arguments.out, '--only', name], check=True)
        sys.exit()
    torch.set_num_threads(1)
    row = run(arguments.only[0], arguments.out)
    known = {r['name']: r for r in json.loads(OUT.read_text(encoding='utf-8'))['rows']} if OUT.is_file() else {}
    known[row['name']] = row
    study = {'data': 'mnist_fixed', 'glimpses': 8, 'base': {key: getattr(BASE, key) for key in SHOWN},
             'rows': [known[name] for name in dict.fromkeys([*VARIANTS, *known]) if name in known]} # those of `draw train` stay
    write_text(OUT, json.dumps(study, indent=1) + '\n')
    value = f'{row["valid_bound"]:7.2f} nats' if 'valid_bound' in row else f'{100 * row["valid_error"]:7.2f} %'
    print(f'{row["name"]:24} {value}, {row["cpu_seconds"] / 60:5.1f} CPU minutes', flush=True)
