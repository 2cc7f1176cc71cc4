"The page of `draw reproduce`: units, rows, nearest images, and what a model is trained with"
import html, json
from dataclasses import asdict, replace
import numpy as np
import pytest
import torch
from draw_nbdev import reproduce as module
from draw_nbdev.classifier import CLASSIFIERS, Classification
from draw_nbdev.data import Images
from draw_nbdev.evaluation import Evaluation
from draw_nbdev.model import DRAW, DRAWConfig, PRESETS
from draw_nbdev.options import RECIPES, TrainOptions
from draw_nbdev.plots import samples_with_neighbours, sequence_grid
from draw_nbdev.reproduce import (
    EXPERIMENTS, Model, draw_figures, obtain, pictures, provenance, reproduce, table_1, table_2,
    table_3,
)

BOUND = Evaluation(data='mnist_fixed', split='test', note='made up', images=1234, glimpses=64,
                   seeds=1, bound=90.125, bound_se=0.375, bound_spread=None, reconstruction=70.0625,
                   latent=20.0625, kl_per_step=[1.])
ERROR = Classification(data='cluttered_mnist', split='test', note='drawn', images=4321, glimpses=8,
                       error=0.03125, error_se=0.0025, cross_entropy=0.25)

def history(network, **more):
    "What training.json says, in seconds and shares"
    config = {**PRESETS, **CLASSIFIERS}[network]
    return {'config': asdict(config), 'options': {'seed': 7}, 'epochs': 9, 'seconds': 120.,
            'cpu_seconds': 390., 'version': '1.2.3', 'origin': 'made here',
            'data': {'name': 'a set', 'note': 'a note'}, **more}

MACHINES = [{'hardware': name} for name in ('two cores', 'a GPU', 'two cores')]
RESULTS = {'mnist': (BOUND, history('mnist', valid_bound=88.0625, segments=MACHINES)),
           'cluttered_8': (ERROR, history('cluttered_8', valid_error=0.0225))}


# ---- units

def test_provenance():
    "Minutes, nats and per cent, each from what was measured"
    table = provenance(RESULTS)
    assert list(table) == ['mnist', 'cluttered_8']
    for name in table:
        row = table[name]
        assert row['training time'] == '2.0 min, 6.5 min of CPU'
        assert row['hardware'] == ('two cores, a GPU' if name == 'mnist' else 'not known')
        assert row['epochs'] == 9 and row['training seed'] == 7 and row['version'] == '1.2.3'
        assert row['weights'] == 'made here' and row['training data'] == 'a set: a note'
    row = table['mnist']
    assert row['validation'] == '88.06 nats on a set'
    assert row['test'] == '90.12 ± 0.38 nats: reconstruction 70.06, KL 20.06'
    assert row['test data'] == 'mnist_fixed, 1,234 images: made up'
    assert row['network'] == 'T 64, h 256, z 100, read 2, write 5'
    row = table['cluttered_8']
    assert row['validation'] == '2.25 % on a set' and row['test'] == '3.12 ± 0.25 %'
    assert row['test data'] == 'cluttered_mnist, 4,321 images: drawn'
    assert row['network'] == 'T 8, h 256, read 12'

def test_tables():
    "Numbers beside the paper's, in their own rows; a surrogate is named"
    table = table_1(RESULTS)
    assert list(table) == ['paper', 'here, cluttered_mnist']
    assert table.loc['Differentiable RAM, 8 glimpses, 12 x 12'].tolist() == [
        '3.36 %', '3.12 ± 0.25 % (T = 8, made here)']
    assert table.loc['Differentiable RAM, 4 glimpses, 12 x 12'].tolist() == ['4.18 %', 'not run']
    table = table_2(RESULTS)
    assert list(table) == ['paper', 'here, mnist_fixed']
    assert table.loc['DRAW'].tolist() == ['≤ 80.97', '≤ 90.12 ± 0.38 (T = 64, made here)']
    assert table.loc['DRAW without attention'].tolist() == ['≤ 87.40', 'not run']
    assert table.loc['NADE'].tolist() == ['88.33', '']
    other = replace(BOUND, data='mnist_once', note='surrogate for something')
    without = {'mnist_no_attention': (other, history('mnist_no_attention'))}
    table = table_2({**RESULTS, **without})
    assert list(table) == ['paper', 'here, mnist_fixed', 'here, mnist_once (surrogate)']
    assert table.loc['DRAW without attention'].tolist() == [
        '≤ 87.40', 'not run', '≤ 90.12 ± 0.38 (T = 64, made here)']
    assert table.loc['DRAW'].tolist()[2] == 'not run'

def test_sizes():
    "Table 3 as the paper prints it"
    table = table_3({'svhn': history('cifar10')})
    assert table['paper'].to_dict() == {
        '100 x 100 MNIST classification': 'T 8, h 256, read 12',
        'MNIST': 'T 64, h 256, z 100, read 2, write 5',
        'SVHN': 'T 32, h 800, z 100, read 12, write 12',
        'CIFAR-10': 'T 64, h 400, z 200, read 5, write 5'}
    assert table['here'].to_dict() == {
        '100 x 100 MNIST classification': 'not run', 'MNIST': 'not run',
        'SVHN': 'T 64, h 400, z 200, read 5, write 5', 'CIFAR-10': 'not run'}


# ---- where a model comes from

TINY = DRAWConfig(height=6, width=7, glimpses=12, hidden_size=8, latent_size=2, read_size=2,
                  write_size=2)

def a_set(split, count=40, name='a set'):
    "Images that differ from split to split"
    random = torch.Generator().manual_seed(len(split))
    return Images(torch.rand(count, 1, 6, 7, generator=random), name, split, 'a note')

LINE = {'step': 3, 'epoch': 0, 'split': 'valid'} # Of metrics.jsonl

def save(folder, **more):
    "Weights with their history"
    torch.manual_seed(0)
    model = DRAW(TINY)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.7)
    model.save_pretrained(folder)
    told = {**history('mnist', valid_bound=1.), 'config': asdict(TINY), **more}
    (folder / 'training.json').write_text(json.dumps(told))

@pytest.fixture
def trained(monkeypatch, tmp_path):
    "No packaged weights; what `train` was called with"
    seen = []
    def train(config, train_set, valid_set, out, options):
        seen.append((config, train_set.split, valid_set.split, options))
        save(out / 'best')
        (out / 'metrics.jsonl').write_text(json.dumps(LINE) + '\n')
    monkeypatch.setattr(module, 'train', train)
    monkeypatch.setattr(module, 'PRETRAINED', tmp_path / 'packaged')
    return seen

@pytest.mark.parametrize('scale, count, passes', [('smoke', 50_000, 1), ('smoke', 12_000, 4),
                                                  ('smoke', 99_999, 1), ('paper', 12_000, 1)])
def test_training_of_an_experiment(scale, count, passes, trained, tmp_path):
    "The network and the options of the scale, the seed, and as many passes as make 50,000 images"
    experiment = replace(EXPERIMENTS['mnist'], full=EXPERIMENTS['mnist'].full._replace(
        options=TrainOptions(epochs=5, seed=2)))
    sets = {split: a_set(split) for split in ('train', 'valid')}
    sets['train'].pixels = sets['train'].pixels[:1].expand(count, -1, -1, -1)
    model = obtain(experiment, scale, sets.get, tmp_path / 'run', seed=3)
    chosen = experiment.smoke if scale == 'smoke' else experiment.full
    seed, epochs = chosen.options.seed + 3, chosen.options.epochs * passes
    options = replace(chosen.options, seed=seed, epochs=epochs)
    assert trained == [(chosen.config, 'train', 'valid', options)]
    assert model.history['origin'] == f'trained here at {scale} scale'
    assert model.metrics == [LINE] and model.network.config == TINY

def test_full_experiments():
    "At full scale everything is the network of its name and its own recipe"
    for name, experiment in EXPERIMENTS.items():
        config = {**PRESETS, **CLASSIFIERS}[name]
        assert experiment.name == name and experiment.full == (config, RECIPES[name])
        assert experiment.smoke.options.epochs < experiment.full.options.epochs

def test_packaged_weights(trained, tmp_path):
    "Taken at smoke scale, by their own name, and never at full scale"
    save(tmp_path / 'packaged/svhn_sample')
    experiment, sets = EXPERIMENTS['svhn'], {s: a_set(s) for s in ('train', 'valid')}
    model = obtain(experiment, 'smoke', None, tmp_path / 'run')
    assert not trained and model.history['origin'] == 'packaged weights'
    model = obtain(experiment, 'paper', sets.get, tmp_path / 'run')
    assert model.history['origin'] == 'trained here at paper scale' and len(trained) == 1


# ---- figures

@pytest.fixture
def model(tmp_path):
    "A network with weights that make every sample another"
    save(tmp_path / 'weights')
    return Model(DRAW.from_pretrained(tmp_path / 'weights'), history('mnist'), [])

def test_nearest_training_images(model):
    "Beside every row of ten stands the training image nearest to the last of it, in pixel L2"
    drawing, train_set = model.network.generate(80), a_set('train', 300)
    given = EXPERIMENTS['mnist'], model, drawing
    found = {kind: (number, picture) for number, kind, picture, _ in
             pictures(*given, {'train': train_set}.get)}
    for sets, said in (({'train': train_set}.get, True), (None, False)):
        *_, caption = list(pictures(*given, sets))[1]
        assert ('image of a set nearest' in caption) == said
        assert 'another set' not in caption
    model.history['data']['name'] = 'another'
    *_, caption = list(pictures(*given, {'train': train_set}.get))[1]
    assert 'The network learned from another set' in caption
    assert found.keys() == {'sequence', 'samples'} and found['samples'][0] == 6
    samples = drawing.canvases[-1].sigmoid()
    everything = train_set.batch(range(300)).numpy()
    nearest = [((everything - s.numpy())**2).sum((1, 2, 3)).argmin() for s in samples[9::10]]
    expected = samples_with_neighbours(samples, train_set.batch(nearest))
    assert np.array_equal(found['samples'][1], expected)
    few = drawing.first(8)
    expected = sequence_grid(few.canvases.sigmoid(), few.windows, TINY.write_size, 10)
    assert np.array_equal(found['sequence'][1], expected)

def test_seed_of_the_samples(model, tmp_path, monkeypatch):
    "Other pictures for another seed, the same for the same, and the caption says which"
    monkeypatch.setattr(module.plots, 'can_write_mp4', lambda: False)
    monkeypatch.setattr(module.plots, 'animation', lambda *arguments: None)
    seen = {}
    costs = dict(bound=9., reconstruction=6., latent=3.)
    rows = [{**LINE, **costs, 'step': step} for step in (3, 6)]
    model = model._replace(metrics=rows) # for learning curves, which no seed is behind
    for seed, name in ((0, 'a'), (3, 'b'), (3, 'c')):
        captions = draw_figures(EXPERIMENTS['mnist'], model, None, tmp_path / name, seed)
        assert f'the first of seed {seed}' in captions['figure_6_mnist.png']
        told = {file: 'seed' in text for file, text in captions.items()}
        assert told.pop('curves_mnist.png') is False and len(told) == 3 and all(told.values())
        seen[name] = (tmp_path / name / 'figure_6_mnist.png').read_bytes()
    assert seen['a'] != seen['b'] == seen['c']


# ---- the page

@pytest.mark.parametrize('names', [('mnist', 'nope'), 'mnist'])
def test_unknown_experiment(names, tmp_path):
    "One line, and nothing written"
    with pytest.raises(ValueError, match="^no experiment '(nope|m)': choose of .*mnist"):
        reproduce(tmp_path / 'page', names=names)
    with pytest.raises(ValueError, match="^no scale 'Smoke': choose smoke or paper$"):
        obtain(EXPERIMENTS['mnist'], 'Smoke', None, tmp_path)
    assert not list(tmp_path.iterdir())

def test_page(trained, tmp_path, monkeypatch):
    "Made of test images; what is not the paper's data, and what could not be had, is said on top"
    asked, evaluated = [], []
    def find(name, split):
        asked.append((name, split))
        if name != 'mnist': raise FileNotFoundError('<nowhere>')
        return a_set(split, name='mnist_once')
    def evaluate(network, data):
        evaluated.append((network.config, data.split))
        return replace(BOUND, data=data.name, note=data.note)
    monkeypatch.setattr(module, 'find', find)
    monkeypatch.setattr(module, 'evaluate', evaluate)
    monkeypatch.setattr(module, 'draw_diagrams', lambda out: {})
    monkeypatch.setattr(module, 'draw_figures', lambda *given: {f'figure_6_{given[-1]}.png': 'six'})
    said = []
    page = reproduce(tmp_path / 'page', 'smoke', 3, ('mnist', 'svhn'), said.append)
    text = html.unescape(page.read_text(encoding='utf-8'))
    assert evaluated == [(TINY, 'test')] and trained[0][3].seed == 3 and 'figure_6_3.png' in text
    for part in ('Numbers on mnist_once are not on the paper’s data', 'Not covered: svhn',
                 '<nowhere>', '2.0 min, 6.5 min of CPU',
                 '≤ 90.12 ± 0.38 (T = 64, trained here at smoke scale)'):
        assert part in text, part
    held = json.loads((page.parent / 'reproduce.json').read_text())
    assert (held['seed'], held['scale'], held['missing']) == (3, 'smoke', {'svhn': '<nowhere>'})
    assert held['results']['mnist']['outcome']['bound'] == 90.125
    assert held['results']['mnist']['training']['cpu_seconds'] == 390.
    monkeypatch.setattr(module, 'find', lambda name, split: a_set(split, name='mnist_fixed'))
    page = reproduce(tmp_path / 'official', 'smoke', 0, ('mnist',), said.append)
    assert 'are not on the paper’s data' not in page.read_text(encoding='utf-8')
