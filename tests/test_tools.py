"""Tools: the commands that stand beside results are commands that the command line accepts, and
they mean what was run"""
import base64, importlib, json, random, shlex, shutil, subprocess, sys
from dataclasses import asdict, replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from draw_nbdev import benchmark, cli
from draw_nbdev.classifier import CLASSIFIERS, Classification
from draw_nbdev.data import Images
from draw_nbdev.evaluation import Evaluation
from draw_nbdev.loading import PRETRAINED
from draw_nbdev.model import DRAW, DRAWConfig, PRESETS
from draw_nbdev.options import RECIPES, TrainOptions, recipe
from draw_nbdev.training import FineTuneTask

ROOT = Path(__file__).parent.parent
NETWORKS = {**PRESETS, **CLASSIFIERS}

@pytest.fixture
def tool(monkeypatch):
    "`tool(name)`: a file of tools/ as a module"
    monkeypatch.syspath_prepend(ROOT / 'tools')
    return importlib.import_module

@pytest.fixture
def record(tool): return tool('record')

class Seen(Exception):
    "Stops a verb where training would begin, and carries what it would have begun with"

def parsed(line, shape=None):
    """Configuration and options that a verb has made of a command when it comes to training;
    `shape` is that of the images, where it does not go without saying"""
    def spy(train, config, options, *rest): raise Seen(config, options, *rest)
    data = SimpleNamespace(shape=shape, name='data')
    with mock.patch.object(cli, 'run', spy), mock.patch.object(
        cli, 'find_data', lambda *_: data
    ), mock.patch('draw_nbdev.data_sets.find', lambda *_: data):
        with pytest.raises(Seen) as seen: cli.app(shlex.split(line)[1:], standalone_mode=False)
    return seen.value.args

RESULTS = [
    file.stem
    for file in sorted((ROOT / 'results').glob('*.json'))
    if 'command' in json.loads(file.read_text())
]

@pytest.mark.parametrize('name', RESULTS)
def test_commands_of_results(name, record):
    "The command in a result gives the configuration and the options that were recorded beside it"
    result = json.loads((ROOT / f'results/{name}.json').read_text())
    c = result['config']
    config, options, *_ = parsed(result['command'], (c['channels'], c['height'], c['width']))
    assert config == type(config)(**result['config'])
    recorded, chosen = TrainOptions(**result['options']), result.get('segments')
    # the last two change nothing that is learned
    same = dict(
        precision=options.precision, save_every=options.save_every, log_every=options.log_every
    )
    assert options == replace(recorded, **same)
    assert options.precision == recorded.precision or chosen and options.precision == 'auto'
    history = {**result, 'data': {'name': result['data']}}
    if not chosen: history.pop('segments', None)
    assert record.command(history, name) == result['command']

@pytest.mark.parametrize('network', RECIPES)
@pytest.mark.parametrize(
    'changes',
    [
        {}, dict(epochs=7, growth=((4, 3),)), dict(clip_norm=None, average=0.9999999),
        dict(seed=3, decay=0.25, rate_warmup=0), dict(every_glimpse=True),
        dict(optimizer='adam', learning_rate=1e-4, final_rate=0.5),
        dict(layer_norm=True, hidden_size=24),
    ],
    ids=str,
)
def test_commands_of_any_run(network, changes, record):
    "Whatever differs from the recipes is said, and nothing else"
    for kind in ('own', 'paper'):
        # not for these
        if (
            'growth' in changes
            and network == 'cluttered_convolutional'
            or 'every_glimpse' in changes
            and network in PRESETS
        ):
            continue
        sizes = {key: changes[key] for key in changes if key in ('layer_norm', 'hidden_size')}
        if 'layer_norm' in sizes and network not in PRESETS: continue
        config = replace(NETWORKS[network], **sizes)
        learned = {key: changes[key] for key in changes if key not in sizes}
        options = replace(recipe(network, kind), **learned)
        history = {
            'config': asdict(config), 'options': json.loads(json.dumps(asdict(options))),
            'data': {'name': 'mnist_fixed'}, 'segments': [],
        }
        line = record.command(history, network)
        assert parsed(line)[:2] == (config, options), line
    if not changes: assert line.split()[2:] in ([network], [network, '--recipe', 'paper'])

def test_command_of_a_run_that_began_with_weights(record):
    "They are named, and the verb takes them"
    history = {'config': asdict(PRESETS['mnist']), 'data': {'name': 'mnist_fixed'}, 'segments': [],
               'options': json.loads(json.dumps(asdict(replace(RECIPES['mnist'], epochs=9)))),
               'task': FineTuneTask('mnist_paper').__dict__}
    line = record.command(history, 'mnist')
    assert line == 'draw train mnist --from mnist_paper --epochs 9'
    assert parsed(line)[:2] == (PRESETS['mnist'], replace(RECIPES['mnist'], epochs=9))
    for older in ('Task', {}):
        assert '--from' not in record.command({**history, 'task': older}, 'mnist')

OPTIONS = dict(
    batch_size=50, optimizer='adam', learning_rate=0.25, final_rate=0.5, decay=0.125, rate_warmup=7,
    kl_warmup=9, weight_decay=0.25, clip_norm=3.5, every_glimpse=True, average=0.75,
    precision='fp16', valid_images=11, save_every=13, seed=17,
)
SIZES = dict(hidden_size=21, latent_size=22, read_size=23, write_size=24, layer_norm=True)

@pytest.mark.parametrize('name', [*OPTIONS, *SIZES])
def test_every_option_arrives(name):
    "No option of a training verb is parsed and then ignored, and each changes one thing"
    value, flag = {**OPTIONS, **SIZES}[name], '--' + name.replace('_', '-')
    text = flag if value is True else f'{flag} {value}'
    verbs = [('train', 'mnist')] * (name != 'every_glimpse') + [('classify', 'cluttered_4')] * (
        name not in ('kl_warmup', 'latent_size', 'write_size', 'layer_norm')
    )
    for verb, network in verbs:
        config, options, *_ = parsed(f'draw {verb} {network} {text}')
        usual = NETWORKS[network], recipe(network)
        assert (config, options) == (
            (usual[0], replace(usual[1], **{name: value}))
            if name in OPTIONS
            else (replace(usual[0], **{name: value}), usual[1])
        )

def test_folder_and_processes_arrive():
    "What is not an option of training"
    for verb, network in (('train', 'mnist'), ('classify', 'cluttered_4')):
        *_, out, _, count = parsed(f'draw {verb} {network} --out here/there --processes 4')
        assert out == Path('here/there') and count == 4
        assert parsed(f'draw {verb} {network}')[-3] == Path('runs') / network

@pytest.mark.parametrize('name', sorted(folder.name for folder in PRETRAINED.iterdir()))
def test_model_cards(name, tool):
    "Every packaged network has a card that the Hub can read, and that says what its files say"
    card = tool('cards').card
    text = (PRETRAINED / name / 'README.md').read_text(encoding='utf-8')
    assert text == card(name), 'run tools/cards.py'
    front = ModelCard(text).data
    assert front.license == 'mit' and front.library_name == 'draw_nbdev'
    history = json.loads((PRETRAINED / name / 'training.json').read_text())
    value = (
        f'{history["valid_bound"]:.2f}'
        if 'valid_bound' in history
        else f'{100 * history["valid_error"]:.2f} %'
    )
    assert f'| validation | {value} |' in text and history['data']['train'] in text


# ---- results of runs

TINY = DRAWConfig(height=6, width=7, glimpses=3, hidden_size=8, latent_size=2, read_size=2,
                  write_size=2)
OUTCOME = Evaluation(data='mnist_fixed', split='test', note='made up', images=10, glimpses=3,
                     seeds=5, bound=90., bound_se=1., bound_spread=.25, reconstruction=70.,
                     latent=20., kl_per_step=[1.], iw_samples=7, iw_bound=89., iw_bound_se=2.)
ERROR = Classification(data='cluttered_mnist', split='test', note='drawn', images=10, glimpses=4,
                       error=0.1, error_se=0.02, cross_entropy=0.5)

def row(epoch, split='valid', **values):
    "A line of metrics"
    return dict(step=6 * (epoch + 1), epoch=epoch, split=split, glimpses=3, **values,
                seconds=60. * epoch, cpu_seconds=100. * epoch)

def finished(out, kind='bound', **more):
    "A finished run whose best epoch is the second of three"
    torch.manual_seed(0)
    DRAW(TINY).save_pretrained(out / 'best')
    values = dict(cross_entropy=0.5) if kind == 'error' else dict(reconstruction=70., latent=20.)
    rows = []
    for epoch, value in enumerate((5., 3., 4.)):
        rows += [row(epoch, 'train', **{kind: 6.}, **values),
                 row(epoch, **{kind: value, f'{kind}_se': value / 10}, **values)]
    history = {
        'config': asdict(TINY if kind == 'bound' else CLASSIFIERS['cluttered_4']),
        'options': asdict(TrainOptions(epochs=3, seed=9)), 'epochs': 2, 'glimpses': 3,
        f'valid_{kind}': 3., 'seconds': 1800., 'cpu_seconds': 7200., 'version': '1.2.3',
        'data': {'name': 'mnist_fixed' if kind == 'bound' else 'cluttered_mnist',
                 'note': 'a note', 'train': '0a', 'valid': '0b'},
        'segments': [{'from_step': step, 'hardware': name, 'software': 'torch'}
                     for step, name in ((0, 'a CPU'), (5, 'a GPU'))], **more}
    (out / 'best/training.json').write_text(json.dumps(history))
    (out / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return history

def test_record(record, tmp_path):
    "The chosen epoch's values, hours for seconds, the whole curve, and nothing of the test set"
    history = finished(tmp_path)
    with mock.patch('draw_nbdev.data_sets.find', side_effect=AssertionError('a data set')):
        result = record.record(tmp_path, 'mnist')
    assert result['hours'] == 0.5 and result['cpu_hours'] == 2 and result['seed'] == 9
    assert (result['epochs'], result['valid_bound'], result['valid_bound_se']) == (2, 3., .3)
    assert result['checksums'] == {'train': '0a', 'valid': '0b'} and 'test_bound' not in result
    assert [point['bound'] for point in result['curve']] == [5., 3., 4.]
    assert result['config'] == history['config'] and result['options']['epochs'] == 3
    assert result['hardware'] == 'a GPU' and result['segments'] == history['segments']

def test_read_path(record):
    "Mean centre and side of the read windows at every step"
    config = DRAWConfig(height=9, width=7, glimpses=3, hidden_size=6, latent_size=4, read_size=3)
    torch.manual_seed(0)
    model = DRAW(config)
    images = Images(torch.randint(2, (5, 1, 9, 7), dtype=torch.uint8), 'toy', 'valid', levels=1)
    path = record.read_path(model, images)
    noise = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    steps = list(model.steps(images.batch(torch.arange(5)), noise))
    for place, step in zip(path, steps, strict=True):
        w = step.read_window
        expected = [w.center_x.mean(), w.center_y.mean(), 2 * w.stride.mean()]
        torch.testing.assert_close(place, torch.stack(expected))

@pytest.mark.parametrize('kind, name, outcome', [
    ('bound', 'mnist', OUTCOME), ('bound', 'two_digits', OUTCOME), ('error', 'cluttered_4', ERROR)])
def test_use_of_the_test_set(kind, name, outcome, record, tool, tmp_path):
    """The packaged weights are measured, whose run was recorded: an error; or a bound with 5 seeds
    and 50 importance samples, of the fixed binarisation with 500 too"""
    tool, seen = tool('use_test_set'), []
    finished(tmp_path / name, kind)
    (tmp_path / name / 'training.json').write_bytes(
        (tmp_path / name / 'best/training.json').read_bytes())
    result = record.record(tmp_path / name, name)
    test_set = SimpleNamespace(name='mnist_fixed' if name == 'mnist' else name)
    def measured(model, data, **more):
        seen.append((model, data, more))
        return outcome
    with mock.patch.multiple(tool, PRETRAINED=tmp_path, evaluate=measured,
                             classification_error=measured,
                             load_classifier=lambda packaged: packaged,
                             DRAW=SimpleNamespace(from_pretrained=lambda packaged: packaged)):
        values = tool.tested(result, test_set)
        for key, other in (('epochs', 1), ('options', {}), (f'valid_{kind}', 4.)):
            with pytest.raises(ValueError, match='come from different runs'):
                tool.tested({**result, key: other}, test_set)
    assert all(part[:2] == (name, test_set) for part in seen)
    assert values['test'] == asdict(outcome) and values[f'test_{kind}'] == getattr(outcome, kind)
    assert values[f'test_{kind}_se'] == getattr(outcome, f'{kind}_se')
    if kind == 'error': return
    first = [dict(seeds=5, samples=k, limit=1000) for k in (50, 500)] if name == 'mnist' else []
    assert [part[2] for part in seen] == [dict(seeds=5, samples=50), *first]
    assert values['test_first'] == [asdict(outcome)] * len(first)
    assert values['test_bound_spread'] == .25
    assert (values['iw_bound'], values['iw_bound_se'], values['iw_k']) == (89., 2., 50)

def test_the_same_run_again(tool, tmp_path):
    "Both values, the largest distance between the curves; another command is refused"
    again = tool('again')
    curve = [dict(bound=value) for value in (5., 3., 4.)]
    first = dict(command='draw train mnist', valid_bound=3., valid_bound_se=.3, epochs=2,
                 curve=curve)
    second = {**first, 'valid_bound': 3.25, 'epochs': 3, 'cpu_hours': 2.,
              'curve': [dict(bound=value) for value in (5.5, 3.25, 3.25)]}
    with mock.patch.object(again, 'record', lambda *_: second):
        made = again.trained(tmp_path, 'mnist', first)
        assert (made['first'], made['again'], made['se'], made['epochs']) == (3., 3.25, .3, [2, 3])
        assert made['largest_difference_of_curves'] == 0.75
        with pytest.raises(ValueError, match='was made with: draw train mnist, and mnist with: x'):
            again.trained(tmp_path, 'mnist', {**first, 'command': 'x'})

def test_the_same_evaluation_again(tool, tmp_path):
    "Test values of the same images, seeds and samples; anything else is refused"
    again, file = tool('again'), tmp_path / 'evaluation.json'
    first = {'test': asdict(OUTCOME)}
    second = {'model': 'mnist', **asdict(OUTCOME), 'bound': 90.5, 'iw_bound': 89.5}
    file.write_text(json.dumps(second))
    made = again.evaluated(tmp_path, 'mnist', first)
    assert (made['first'], made['again'], made['iw_bound']) == (90., 90.5, [89., 89.5])
    assert made['command'] == 'draw evaluate mnist --split test --seeds 5 --samples 7'
    for changes, named in ((dict(images=9), 'images'), (dict(seeds=1), 'seeds'),
                           (dict(model='other'), 'other'), (dict(split='valid'), 'split')):
        file.write_text(json.dumps({**second, **changes}))
        with pytest.raises(ValueError, match=named): again.evaluated(tmp_path, 'mnist', first)

def test_thinned_curves(tool):
    "Means of neighbouring training rows, all validation rows as they are, in the order of steps"
    package = tool('package')
    rows = [dict(step=i + 1, epoch=0, split='train', bound=float(i)) for i in range(450)]
    rows.insert(400, dict(step=400, epoch=0, split='valid', bound=1 / 3, kl_per_step=[1.]))
    thin = package.thinned(rows)
    train = [r for r in thin if r['split'] == 'train']
    assert len(train) == 150 and [r['bound'] for r in train[:3]] == [1., 4., 7.]
    assert [r['step'] for r in train[:3]] == [3, 6, 9] and train[-1]['bound'] == 448.
    assert [r for r in thin if r['split'] == 'valid'] == [
        dict(step=400, epoch=0, split='valid', bound=0.333333)]
    assert [r['step'] for r in thin] == sorted(r['step'] for r in thin)

def test_thinned_curves_without_training(tool):
    "A run shorter than the distance between training rows has validation rows alone, or none"
    thinned = tool('package').thinned
    valid = [dict(step=5, epoch=0, split='valid', bound=2.), dict(step=10, epoch=1, split='valid',
                                                                 bound=1.)]
    assert thinned(valid) == valid and thinned([]) == []

@pytest.mark.parametrize('cost, halved', [(0.0, True), (0.019, True), (0.021, False)])
def test_half_precision_of_packaged_weights(cost, halved, tool, tmp_path, monkeypatch):
    "Taken where it moves the bound by less than 0.02 nats; the folder loads either way"
    package = tool('package')
    monkeypatch.chdir(tmp_path)
    scores = iter((3., 3. + cost))
    monkeypatch.setattr(package, 'PRETRAINED', tmp_path / 'pretrained')
    monkeypatch.setattr(package, 'find', lambda *_: None)
    monkeypatch.setattr(package, 'score', lambda *_: next(scores))
    monkeypatch.setattr(package, 'card', lambda name: f'card of {name}')
    finished(tmp_path / 'run')
    package.package(tmp_path / 'run', 'mnist')
    out = tmp_path / 'pretrained/mnist'
    held = load_file(out / 'model.safetensors')
    assert {v.dtype for v in held.values()} == {torch.float16 if halved else torch.float32}
    told = json.loads((out / 'training.json').read_text())
    assert told['half_precision'] == {'used': halved, 'moves_valid_by': pytest.approx(cost)}
    assert told['valid_bound'] == 3. and (out / 'README.md').read_text() == 'card of mnist'
    assert len((out / 'metrics.jsonl').read_text().splitlines()) == 6
    loaded = DRAW.from_pretrained(out).state_dict()
    for name, value in DRAW.from_pretrained(tmp_path / 'run').state_dict().items():
        torch.testing.assert_close(loaded[name].float(), value, rtol=1e-3, atol=1e-4)

def test_packaged_weights_stay_until_others_are_complete(tool, tmp_path, monkeypatch):
    package = tool('package')
    monkeypatch.chdir(tmp_path)
    def score(network, *_):
        if score.calls: raise KeyboardInterrupt
        score.calls = True
        return 3.
    score.calls = False
    for name, value in dict(PRETRAINED=tmp_path / 'pretrained', score=score,
                            find=lambda *_: None).items():
        monkeypatch.setattr(package, name, value)
    finished(tmp_path / 'run')
    (tmp_path / 'pretrained/mnist').mkdir(parents=True)
    (tmp_path / 'pretrained/mnist/model.safetensors').write_bytes(b'the old ones')
    with pytest.raises(KeyboardInterrupt): package.package(tmp_path / 'run', 'mnist')
    there = [p for p in (tmp_path / 'pretrained').rglob('*') if p.is_file()]
    assert [p.name for p in there] == ['model.safetensors']
    assert there[0].read_bytes() == b'the old ones'

@pytest.mark.parametrize('line, said', [
    ('record.py run mnist', 'has test values, which must not be lost'),
    ('record.py run mnits', "'mnits' does not begin with the name of a network"),
    ('use_test_set.py mnist', 'has its test values'),
    ('unpack.py cluttered_8 there', 'holds a network of type'),
    ('again.py run mnits', 'No such file')])
def test_what_a_tool_refuses(line, said, tmp_path):
    "In one line, with exit code 2 and nothing written"
    finished(tmp_path / 'run')
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results/mnist.json').write_text('{"test": {"bound": 80.0}}')
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    script, *arguments = line.split()
    done = subprocess.run([sys.executable, ROOT / 'tools' / script, *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before

@pytest.mark.parametrize('name, network', [
    ('mnist', 'mnist'), ('mnist_150_epochs', 'mnist'), ('svhn_sample', 'svhn'),
    ('mnist_no_attention', 'mnist_no_attention'), ('mnist_no_attention_2', 'mnist_no_attention')])
def test_experiment_of_packaged_weights(name, network, tool):
    "A network can be packaged more than once, with an ending after its name"
    assert tool('package').experiment_for(name).name == network

def test_packaged_weights_of_no_experiment(tool):
    refusal = "^'mnits' does not begin with the name of a network: .*mnist"
    with pytest.raises(ValueError, match=refusal):
        tool('package').experiment_for('mnits')


# ---- the study

def test_fresh_networks_of_the_study(tool):
    "Each task changes what it names, and nothing else of a fresh network"
    study = tool('study')
    def fresh(task):
        torch.manual_seed(0)
        return task.start(replace(TINY, width=30), Images(torch.zeros(2, 1, 6, 30), 'a', 'train'))
    usual, h = fresh(study.Task()), 8
    normal = fresh(study.Normal())
    named = dict(normal.named_parameters())
    weights = torch.cat([p.flatten() for name, p in named.items() if name.endswith('.weight')])
    assert abs(weights.std() - 0.01) < 0.001
    assert all(p.eq(0).all() for name, p in named.items() if name.endswith('.bias'))
    orthogonal = fresh(study.Orthogonal())
    for cell in (orthogonal.encoder, orthogonal.decoder):
        for gate in cell.gates.weight[:, -h:].chunk(4):
            torch.testing.assert_close(gate @ gate.T, torch.eye(h), atol=1e-5, rtol=0)
    assert torch.equal(orthogonal.posterior.weight, usual.posterior.weight)
    for share, expected in ((0.5, 2 * log(0.5 * 29)), (0, 0)):
        first = fresh(study.FirstWindow(share))
        assert first.read.window.bias[2].item() == pytest.approx(expected)
        assert first.write.window.bias[2].item() == pytest.approx(expected)

def test_row_of_the_study(tool, tmp_path, monkeypatch):
    "The last epoch's values of a run with the options that its name promises"
    study, seen = tool('study'), []
    def train(config, train_set, valid_set, folder, options, task):
        seen.append((config, train_set, valid_set, options, task))
        finished(folder)
    monkeypatch.setattr(study, 'train', train)
    monkeypatch.setattr(study, 'find', lambda name, split: (name, split))
    made = study.run('rate 3e-3', tmp_path)
    (config, train_set, valid_set, options, task), = seen
    assert config == replace(PRESETS['mnist_no_attention'], glimpses=8)
    assert (train_set, valid_set) == (('mnist_fixed', 'train'), ('mnist_fixed', 'valid'))
    assert options == replace(study.BASE, learning_rate=3e-3) and type(task) is study.Task
    assert (made['valid_bound'], made['epochs'], made['cpu_seconds']) == (4., 3, 200.)
    assert made['part'] == 'learning rate' and made['changes'] == {'learning_rate': 3e-3}


# ---- measuring and breaking

def test_commands_that_measure_speed(tool):
    "Every one is accepted, and the first measures what its page shows"
    seen = []
    with mock.patch.object(benchmark, 'benchmark', lambda *given: seen.append(given) or []):
        for options in tool('measure_speed').RUNS:
            cli.app(['benchmark', *options], standalone_mode=False)
    assert seen[0][:4] == (('mnist',), (100, 256), (16, 32, 64), (True, False))
    assert seen[1][0] == ('svhn', 'cifar10', 'two_digits') and seen[2][4] == (14, 42, 56, 84)

@pytest.mark.parametrize('code, said, lost, expected', [
    (0, 'weights: run/best\n', False, 'ended well'),
    (2, 'draw: no preset\n', False, 'refused with one line'),
    (2, 'epoch 1: 3 nats\ndraw: no room\n', False, 'refused with one line'),
    (2, 'draw: one\ndraw: two\n', False, 'lost'), (2, 'draw: one\nand more\n', False, 'lost'),
    (2, '', False, 'lost'), (2, 'draw: ' + 'x' * 1500, False, 'lost'),
    (2, 'draw: no preset\n', True, 'lost'), (0, 'Traceback (most recent', False, 'lost'),
    (1, 'draw: no preset\n', False, 'lost'), (None, '', False, 'lost')])
def test_verdicts_of_faults(code, said, lost, expected, tool, tmp_path):
    "One line and nothing lost, or lost"
    file = tmp_path / 'letters'
    file.write_text('Dear')
    before = tool('faults').contents(tmp_path)
    if lost: file.write_text('Nothing')
    assert tool('faults').verdict(code, said, before, tmp_path) == expected
    if code == 0:
        file.unlink()
        assert tool('faults').verdict(code, said, before, tmp_path) == 'lost'

def test_faults_are_the_same_for_a_seed(tool, tmp_path):
    "Commands of known verbs and options; damage to a file of the run and nowhere else"
    faults = tool('faults')
    def commands(seed):
        chance = random.Random(seed)
        return [faults.command(chance) for _ in range(20)]
    assert commands(1) == commands(1) != commands(2)
    known = {verb: {option for p in command.params for option in p.opts + p.secondary_opts}
             for verb, command in cli.typer.main.get_command(cli.app).commands.items()}
    for line in commands(1) + commands(2):
        assert {word for word in line[1:] if word.startswith('--')} <= known[line[0]], line
    for name in ('run', 'letters'): (tmp_path / name).mkdir()
    for name in ('run/a', 'run/b', 'letters/c'): (tmp_path / name).write_text(name * 9)
    for seed in range(20):
        copy = Path(shutil.copytree(tmp_path, tmp_path.parent / f'{tmp_path.name}-{seed}'))
        what, line = faults.damage(copy, random.Random(seed))
        assert (copy / 'letters/c').read_text() == 'letters/c' * 9 and line.split()[0] in known
        assert what.split()[0] in ('run/a', 'run/b')


# ---- notebooks, pages and README.md

def notebook(file, *cells):
    "A notebook of cells (kind, source, outputs)"
    held = [dict(cell_type=kind, metadata={}, source=source, id=f'{i:08}', **(
            dict(outputs=outputs, execution_count=None) if kind == 'code' else {}))
            for i, (kind, source, outputs) in enumerate(cells)]
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    file.write_text(json.dumps(dict(cells=held, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return file

def shown(text): return [dict(output_type='stream', name='stdout', text=text)]

def test_run_notebooks(tool, tmp_path, monkeypatch):
    "Outputs are new, those of skipped cells stay, and the working folder is the notebook's"
    monkeypatch.chdir(ROOT)
    run = tool('run_nbs').run
    file = notebook(tmp_path / 'a.ipynb', ('code', 'import os\nprint(os.getcwd())', []),
                    ('code', '#| slow\nprint(2)', shown('kept')),
                    ('code', '#| eval: false\n1 / 0', []), ('code', 'print(3)', shown('old')))
    run(file, {'slow'})
    held = json.loads(file.read_text())['cells']
    texts = [''.join(line for o in cell['outputs'] for line in o['text']).strip() for cell in held]
    assert texts == [str(tmp_path), 'kept', '', '3']
    assert {cell['execution_count'] for cell in held} == {None}
    run(file, set())
    assert '2' in ''.join(json.loads(file.read_text())['cells'][1]['outputs'][0]['text'])
    file = notebook(tmp_path / 'b.ipynb', ('code', 'assert False', []), ('code', 'print(1)', []))
    before = file.read_text()
    with pytest.raises(AssertionError): run(file, set())
    assert file.read_text() == before

def test_readme_of_a_notebook(tool, tmp_path, monkeypatch):
    "Title, text with links that start at the top, code, outputs, and figures as files"
    build, nbs = tool('build_readme'), tmp_path / 'nbs'
    monkeypatch.chdir(tmp_path)
    nbs.mkdir()
    (nbs / 'page.ipynb').write_text('{}')
    def cell(kind, source, *data):
        outputs = dict(outputs=[dict(data=o) for o in data])
        return SimpleNamespace(cell_type=kind, source=source, get=outputs.get)
    figure = {'image/png': base64.b64encode(b'PNG').decode()}
    cells = [
        cell('raw', '---\ntitle: A name\ndescription: What it is\n---'),
        cell('markdown', '[a](page.ipynb#b) [c](https://d.e) [f](g.txt)'),
        cell('code', '#| a directive\n1 + 1', {'text/plain': ['2']}, {'text/markdown': ['| 2 |']}),
        cell('code', '#| echo: false\nplot()', figure)]
    text = build.readme(SimpleNamespace(cells=cells), Path('nbs'))
    assert text.split('\n\n') == [
        '# A name', build.WARNING, '> What it is',
        '[a](nbs/page.ipynb#b) [c](https://d.e) [f](g.txt)', '``` python\n1 + 1\n```', '    2',
        '| 2 |', '![](index_files/figure-3-0.png)\n']
    assert (tmp_path / 'index_files/figure-3-0.png').read_bytes() == b'PNG'

def test_commands_of_the_readme(tool):
    "The block behind a comment in one line, without its comments; the first of no other name"
    text = ('<!-- command: tests -->\n``` sh\npip install x\n# a comment\n\n  pytest\n```\n'
            '<!-- command: main -->\nmore\n```\nno\n```\n')
    command = tool('readme_command').command
    assert command(text, 'tests') == 'pip install x && pytest'
    for name in ('main', 'others'):
        with pytest.raises(ValueError, match=f'command: {name}'): command(text, name)
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'draw reproduce' in command(readme, 'main') and 'pytest' in command(readme, 'tests')

def test_links_of_a_site(tool, tmp_path):
    "Files and anchors that are not there are found; links to other sites are left alone"
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub/index.html').write_text('<a name="old"></a><a href="../a.html#here">up</a>')
    (tmp_path / 'a.html').write_text(
        '<p id="here"></p><a href="#here"></a><a href="#gone"></a><a href="sub"></a>'
        '<a href="sub#old"></a><img src="no.png"><a href="https://x.y/z"></a><a href="/a.html"></a>'
        '<a href="https://me.org/draw/sub/"></a><a href="https://me.org/draw/no.html"></a>'
        '<a href="../outside.html"></a><a href="a%2ehtml"></a>')
    (tmp_path.parent / 'outside.html').write_text('')
    count, broken = tool('check_links').broken_links(tmp_path, 'https://me.org/draw/')
    assert count == 11 and broken == [
        'a.html: #gone: no such anchor', 'a.html: no.png: no such file',
        'a.html: https://me.org/draw/no.html: no such file',
        'a.html: ../outside.html: no such file']
    count, broken = tool('check_links').broken_links(tmp_path)
    assert count == 9 and len(broken) == 3

def test_pages_without_quarto(tool, tmp_path):
    "Pages have the names that nbdev gives them, links follow, and KaTeX lies beside or is gone"
    pytest.importorskip('smalldocs')
    build, proc = tool('build_docs'), tmp_path / 'proc'
    proc.mkdir()
    notebook(proc / '16_filterbank.ipynb', ('raw', '---\noutput-file: filterbank.html\n---', []))
    notebook(proc / 'index.ipynb', ('markdown', '[a](16_filterbank.ipynb#b) '
                                    '[c](https://me.org/draw/attention.html)', []))
    (proc / 'sidebar.yml').write_text('- 16_filterbank.ipynb\n')
    assert build.page_names(proc) == {'16_filterbank.ipynb': 'filterbank.ipynb'}
    build.rename_pages(proc, 'https://me.org/draw/')
    names = {file.name for file in proc.iterdir()}
    assert names == {'filterbank.ipynb', 'index.ipynb', 'sidebar.yml'}
    text = (proc / 'index.ipynb').read_text()
    assert '[a](filterbank.ipynb#b) [c](attention.html)' in text
    assert (proc / 'sidebar.yml').read_text() == '- filterbank.ipynb\n'
    katex, site = tmp_path / 'dist', tmp_path / 'site'
    for name in ('katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js', 'fonts/a.woff2',
                 'fonts/a.ttf'):
        (katex / name).parent.mkdir(parents=True, exist_ok=True)
        (katex / name).write_text(name)
    build.add_katex(site, katex)
    found = {file.relative_to(site / build.KATEX).as_posix() for file in site.rglob('*.*')}
    assert found == {'katex.min.css', 'katex.min.js', 'contrib/auto-render.min.js', 'fonts/a.woff2'}
    tags = f'<link href="{build.KATEX}/katex.min.css">\n<script src="{build.KATEX}/a"></script>'
    (site / 'a.html').write_text(f'<head>{tags}<link href="own.css"></head>')
    build.drop_katex(site)
    assert (site / 'a.html').read_text() == '<head><link href="own.css"></head>'

@pytest.mark.skipif(shutil.which('git') is None, reason='no git here')
def test_checkout_must_be_clean(tmp_path):
    "Changes that are not committed are named before anything is run"
    (tmp_path / 'tools').mkdir()
    shutil.copy(ROOT / 'tools/check_sync.sh', tmp_path / 'tools')
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    done = subprocess.run(['tools/check_sync.sh'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and 'commit the changes first' in done.stderr


# ---- mistakes put in by hand

def test_mutations(tool, tmp_path, monkeypatch):
    "One that a test notices, one for the notebook, one that none notices, one that never ends"
    mutate = tool('mutate')
    for name in [name for name in sys.modules if name.split('.')[0] == 'draw_nbdev']:
        monkeypatch.delitem(sys.modules, name) # as in the tool, which imports nothing of it
    for name in ('draw_nbdev', 'nbs', 'tests'): (tmp_path / name).mkdir()
    source = ('def twice(v):\n    return (2 *\n            v)\n'
              'def thrice(v): return 3 * v\n')
    (tmp_path / 'draw_nbdev/toy.py').write_text(
        f'# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/00_toy.ipynb.\n{source}')
    (tmp_path / 'draw_nbdev/__init__.py').write_text('')
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text())
    (tmp_path / 'tests/test_toy.py').write_text(
        'import draw_nbdev.toy as toy\ndef test_twice(): assert toy.twice(4) == 8\n')
    notebook(tmp_path / 'nbs/00_toy.ipynb', ('code', f'#| export\n{source}', []),
             ('code', 'assert thrice(1) == 3', []))
    monkeypatch.setattr(mutate, 'ROOT', tmp_path)
    tests, page = 'test_toy.py', '00_toy.ipynb'
    before, sound = {file: file.read_bytes() for file in tmp_path.rglob('*.*')}, {tests, page}
    for old, new, job, by in (('2 * v', '3 * v', tests, 'test_toy.py::test_twice'),
                              ('3 * v', '4 * v', page, page), ('3 * v', 'v * 3', page, None)):
        assert mutate.try_out(tmp_path, 'toy', old, new, [job], 120, sound) == by
        assert all(file.read_bytes() == held for file, held in before.items())
    for old, count in (('no such text', 0), ('return', 2)):
        with pytest.raises(LookupError, match=f'{count} times'):
            mutate.mutate(tmp_path, 'toy', old, '')
    with pytest.raises(LookupError, match='no code there'):
        mutate.mutate(tmp_path, 'toy', '2 * v', '2 *')
    (tmp_path / 'tests/test_hangs.py').write_text('while True: pass\n')
    late = mutate.notices(tmp_path, 'test_hangs.py', 2)
    assert late == 'test_hangs.py: still running after 2 s'
    (tmp_path / 'tests/test_toy.py').write_text('def test_twice(): assert False\n')
    with pytest.raises(ValueError, match='fails without any mistake'):
        mutate.try_out(tmp_path, 'toy', '2 * v', '3 * v', [tests], 60, set())
