"""Tools: the commands that stand beside results are commands that the command line accepts, and they mean what was run"""
import json, shlex, sys
from dataclasses import asdict, replace
from pathlib import Path
import pytest
import typer
from draw_nbdev.classifier import CLASSIFIERS
from draw_nbdev.cli import app, plan
from draw_nbdev.model import PRESETS
from draw_nbdev.options import PAPER_RECIPES, RECIPES, TrainOptions, recipe

ROOT = Path(__file__).parent.parent
NETWORKS = {**PRESETS, **CLASSIFIERS}

@pytest.fixture
def record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import record
    return record

def parsed(line):
    "Configuration and options that the command line makes of a command"
    _, verb, *words = shlex.split(line)
    given = typer.main.get_command(app).commands[verb].make_context(verb, words).params
    sizes = {name: given.get(name) for name in ('hidden_size', 'latent_size', 'read_size', 'write_size')} | {'layer_norm': given.get('layer_norm') or None}
    options = {name: given[name] for name in asdict(TrainOptions()) if name in given and name != 'epochs'}
    return plan(NETWORKS, given['preset'], given['recipe'], given['glimpses'], given['epochs'], sizes, options)

RESULTS = [file.stem for file in sorted((ROOT / 'results').glob('*.json')) if 'command' in json.loads(file.read_text())]

@pytest.mark.parametrize('name', RESULTS)
def test_commands_of_results(name, record):
    "The command in a result gives the configuration and the options that were recorded beside it"
    result = json.loads((ROOT / f'results/{name}.json').read_text())
    config, options = parsed(result['command'])
    assert asdict(config) == result['config']
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
        assert parsed(line) == (NETWORKS[network], options), line
    if not changes: assert line.split()[2:] in ([network], [network, '--recipe', 'paper'])
