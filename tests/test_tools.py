"""Tools: the commands that stand beside results are commands that the command line accepts, and they mean what was run"""
import json, shlex
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest
from draw_nbdev import cli
from draw_nbdev.classifier import CLASSIFIERS
from draw_nbdev.model import PRESETS, PRETRAINED
from huggingface_hub import ModelCard
from draw_nbdev.options import RECIPES, TrainOptions, recipe

ROOT = Path(__file__).parent.parent
NETWORKS = {**PRESETS, **CLASSIFIERS}

@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import record
    return record

class Seen(Exception):
    "Stops a verb where training would begin, and carries what it would have begun with"

def parsed(line, shape=None):
    "Configuration and options that a verb has made of a command when it comes to training; `shape` is that of the images, where it does not go without saying"
    def spy(train, config, options, *rest): raise Seen(config, options, *rest)
    data = SimpleNamespace(shape=shape, name='data')
    with mock.patch.object(cli, 'run', spy), mock.patch.object(cli, 'find_data', lambda *_: data), mock.patch('draw_nbdev.data_sets.find', lambda *_: data):
        with pytest.raises(Seen) as seen: cli.app(shlex.split(line)[1:], standalone_mode=False)
    return seen.value.args

RESULTS = [file.stem for file in sorted((ROOT / 'results').glob('*.json')) if 'command' in json.loads(file.read_text())]

@pytest.mark.parametrize('name', RESULTS)
def test_commands_of_results(name, record):
    "The command in a result gives the configuration and the options that were recorded beside it"
    result = json.loads((ROOT / f'results/{name}.json').read_text())
    c = result['config']
    config, options, *_ = parsed(result['command'], (c['channels'], c['height'], c['width']))
    assert config == type(config)(**result['config'])
    recorded, chosen = TrainOptions(**result['options']), result.get('segments')
    same = dict(precision=options.precision, save_every=options.save_every, log_every=options.log_every) # the last two change nothing that is learned
    assert options == replace(recorded, **same)
    assert options.precision == recorded.precision or chosen and options.precision == 'auto'
    history = {**result, 'data': {'name': result['data']}}
    if not chosen: history.pop('segments', None)
    assert record.command(history, name) == result['command']

@pytest.mark.parametrize('network', RECIPES)
@pytest.mark.parametrize('changes', [{}, dict(epochs=7, growth=((4, 3),)), dict(clip_norm=None, average=0.5), dict(seed=3, decay=0.25, rate_warmup=0), dict(every_glimpse=True),
                                     dict(optimizer='adam', learning_rate=1e-4, final_rate=0.5)], ids=str)
def test_commands_of_any_run(network, changes, record):
    "Whatever differs from the recipes is said, and nothing else"
    for kind in ('own', 'paper'):
        if 'growth' in changes and network == 'cluttered_convolutional' or 'every_glimpse' in changes and network in PRESETS: continue # not for these
        options = replace(recipe(network, kind), **changes)
        history = {'config': asdict(NETWORKS[network]), 'options': json.loads(json.dumps(asdict(options))), 'data': {'name': 'mnist_fixed'}, 'segments': []}
        line = record.command(history, network)
        assert parsed(line)[:2] == (NETWORKS[network], options), line
    if not changes: assert line.split()[2:] in ([network], [network, '--recipe', 'paper'])

OPTIONS = dict(batch_size=50, optimizer='adam', learning_rate=0.25, final_rate=0.5, decay=0.125, rate_warmup=7, kl_warmup=9, clip_norm=3.5, every_glimpse=True, average=0.75,
               precision='fp16', valid_images=11, save_every=13, seed=17)
SIZES = dict(hidden_size=21, latent_size=22, read_size=23, write_size=24, layer_norm=True)

@pytest.mark.parametrize('name', [*OPTIONS, *SIZES])
def test_every_option_arrives(name):
    "No option of a training verb is parsed and then ignored, and each changes one thing"
    value, flag = {**OPTIONS, **SIZES}[name], '--' + name.replace('_', '-')
    text = flag if value is True else f'{flag} {value}'
    verbs = [('train', 'mnist')] * (name != 'every_glimpse') + [('classify', 'cluttered_4')] * (name not in ('kl_warmup', 'latent_size', 'write_size', 'layer_norm'))
    for verb, network in verbs:
        config, options, *_ = parsed(f'draw {verb} {network} {text}')
        usual = NETWORKS[network], recipe(network)
        assert (config, options) == ((usual[0], replace(usual[1], **{name: value})) if name in OPTIONS else (replace(usual[0], **{name: value}), usual[1]))

def test_folder_and_processes_arrive():
    "What is not an option of training"
    for verb, network in (('train', 'mnist'), ('classify', 'cluttered_4')):
        *_, out, _, count = parsed(f'draw {verb} {network} --out here/there --processes 4')
        assert out == Path('here/there') and count == 4
        assert parsed(f'draw {verb} {network}')[-3] == Path('runs') / network

@pytest.mark.parametrize('name', sorted(folder.name for folder in PRETRAINED.iterdir()))
def test_model_cards(name, monkeypatch):
    "Every packaged network has a card that the Hub can read, and that says what its files say"
    monkeypatch.syspath_prepend(ROOT / 'tools')
    from cards import card
    text = (PRETRAINED / name / 'README.md').read_text(encoding='utf-8')
    assert text == card(name), 'run tools/cards.py'
    front = ModelCard(text).data
    assert front.license == 'mit' and front.library_name == 'draw_nbdev'
    history = json.loads((PRETRAINED / name / 'training.json').read_text())
    value = f'{history["valid_bound"]:.2f}' if 'valid_bound' in history else f'{100 * history["valid_error"]:.2f} %'
    assert f'| validation | {value} |' in text and history['data']['train'] in text
