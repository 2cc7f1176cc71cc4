"""The command line: no option is parsed and then ignored, and numbers come in the units they name

Spies stand in place of the functions behind the verbs. The options of training are in
test_tools.py."""
import inspect, json, shlex, warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from draw_nbdev import benchmark, classifier, cli, data_sets, demo, evaluation, reproduce
from draw_nbdev.classifier import Classification, DifferentiableRAM, RAMConfig, glimpse_grid
from draw_nbdev.digits import LabelledImages
from draw_nbdev.evaluation import Evaluation
from draw_nbdev.model import DRAW, DRAWConfig
from draw_nbdev.plots import image_grid, sequence_grid
from draw_nbdev.training import FineTuneTask, Task
import test_tools

SIZES = DRAWConfig(height=6, width=9, glimpses=4, hidden_size=8, latent_size=2, read_size=1,
                   write_size=2)
BOUND = Evaluation(data='here', split='test', note='made up', images=1234, glimpses=4, seeds=2,
                   bound=90.125, bound_se=0.25, bound_spread=0.0625, reconstruction=70.0625,
                   latent=20.0625, kl_per_step=[1.], iw_samples=5, iw_bound=88.5, iw_bound_se=0.375)
ERROR = Classification(data='here', split='test', note='made up', images=1234, glimpses=4,
                       error=0.125, error_se=0.0225, cross_entropy=0.25)

class Spy:
    "Stands in place of a function: keeps the arguments by their names, and gives an answer"
    def __init__(self, function, answer):
        self.signature, self.answer, self.calls = inspect.signature(function), answer, []

    def __call__(self, *arguments, **more):
        given = self.signature.bind(*arguments, **more)
        given.apply_defaults()
        self.calls.append(dict(given.arguments))
        return self.answer(self.calls[-1]) if callable(self.answer) else self.answer

@pytest.fixture
def spy(monkeypatch):
    "`spy(module, name, answer)` puts a spy into a module"
    def put(module, name, answer=None):
        found = Spy(getattr(module, name), answer)
        monkeypatch.setattr(module, name, found)
        return found
    return put

@pytest.fixture
def weights(tmp_path, monkeypatch):
    "The working folder, with the weights of a DRAW network in `draw` and of a classifier in `ram`"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DRAW(SIZES)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.5)
    model.save_pretrained(tmp_path / 'draw')
    DifferentiableRAM(RAMConfig(glimpses=2, hidden_size=8)).save_pretrained(tmp_path / 'ram')
    return tmp_path

def draw(line): cli.app(shlex.split(line), standalone_mode=False)

def small_set(split, shape=(1, 6, 9)):
    "Eight images, others for every split"
    random = torch.Generator().manual_seed(len(split))
    return LabelledImages(torch.rand(8, *shape, generator=random), torch.arange(8), 'here', split)


# ---- draw evaluate

@pytest.mark.parametrize('changes', [{}, dict(seeds=3), dict(samples=5), dict(limit=6),
                                     dict(glimpses=2)], ids=str)
def test_options_of_an_evaluation(changes, weights, spy):
    "Every option of the bound, alone"
    spy(data_sets, 'find', lambda given: small_set(given['split']))
    seen = spy(evaluation, 'evaluate', BOUND)
    draw('evaluate draw --data mnist ' + ' '.join(f'--{k} {v}' for k, v in changes.items()))
    given, = seen.calls
    usual = dict(glimpses=None, seeds=1, samples=None, limit=None)
    assert {key: given[key] for key in usual} == usual | changes
    assert given['data'].split == 'valid' and given['model'].config == SIZES

@pytest.mark.parametrize('changes', [{}, dict(limit=6), dict(glimpses=3)], ids=str)
def test_options_of_a_classification(changes, weights, spy):
    "The same for a classifier"
    spy(data_sets, 'find', lambda given: small_set(given['split']))
    seen = spy(classifier, 'classification_error', ERROR)
    draw('evaluate ram --split test ' + ' '.join(f'--{k} {v}' for k, v in changes.items()))
    given, = seen.calls
    usual = dict(glimpses=None, limit=None)
    assert {key: given[key] for key in usual} == usual | changes and given['data'].split == 'test'

@pytest.mark.parametrize('options, expected', [
    ('--data mnist_once', ('mnist_once', 'valid', None)),
    ('--data mnist_once --split test', ('mnist_once', 'test', None)),
    ('--images mine --split train', ('mine', 'train', None)),
    ('--images mine --size 5', ('mine', 'valid', 5)),
    ('', ('mnist', 'valid', None)),
])
def test_images_of_an_evaluation(options, expected, weights, spy):
    "Which set is asked for, which part of it, and in which size"
    (weights / 'mine').mkdir()
    spy(evaluation, 'evaluate', BOUND)
    seen = spy(data_sets, 'find', lambda given: small_set(given['split']))
    draw(f'evaluate draw {options}')
    given, = seen.calls
    assert (str(given['data']), given['split'], given['size']) == expected

def test_unverified_house_numbers_are_looked_for_as_svhn(weights, spy):
    (weights / 'draw/training.json').write_text('{"data": {"name": "svhn_unverified"}}')
    spy(evaluation, 'evaluate', BOUND)
    seen = spy(data_sets, 'find', lambda given: small_set(given['split']))
    draw('evaluate draw')
    assert [given['data'] for given in seen.calls] == ['svhn']

def test_help_without_arguments(monkeypatch, capsys):
    "As with --help, in its lines"
    said = []
    for arguments in ([], ['--help']):
        monkeypatch.setattr('sys.argv', ['draw', *arguments])
        with pytest.raises(SystemExit) as ended: cli.main()
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0].splitlines()) > 10

def test_numbers_of_an_evaluation(weights, spy, capsys):
    "Nats as they are, shares in per cent; the file holds what was computed"
    spy(data_sets, 'find', lambda given: small_set(given['split']))
    spy(evaluation, 'evaluate', BOUND)
    spy(classifier, 'classification_error', ERROR)
    draw('evaluate draw --data mnist --out numbers')
    said = capsys.readouterr().out
    for text in ('1,234 images, T = 4: made up', '90.12 ± 0.25 nats', 'over 2 seeds 0.062',
                 '70.06 nats', '20.06 nats', '88.50 ± 0.38 nats'): assert text in said, said
    held = json.loads((weights / 'numbers/evaluation.json').read_text())
    assert held == {'model': 'draw', **asdict(BOUND)}
    draw('evaluate ram')
    said = capsys.readouterr().out
    for text in ('12.50 ± 2.25 %', '0.250 nats per image'): assert text in said, said


# ---- draw generate

def pixels(file): return np.asarray(Image.open(file).convert('RGB'))

@pytest.mark.parametrize('options, count, glimpses, seed', [
    ('', 64, 4, 0), ('--count 5', 5, 4, 0), ('--count 5 --glimpses 2', 5, 2, 0),
    ('--count 5 --seed 7', 5, 4, 7)])
def test_options_of_drawing(options, count, glimpses, seed, weights):
    "The pictures are those that the network draws from this seed, in so many steps"
    draw(f'generate draw --out pictures {options}')
    model, random = DRAW.from_pretrained(weights / 'draw'), torch.Generator().manual_seed(seed)
    drawing = model.generate(count, glimpses, random)
    expected = image_grid(model.images(drawing.canvases[-1]), zoom=2)
    assert np.array_equal(pixels(weights / 'pictures/samples.png'), np.asarray(expected))
    few = drawing.first(8)
    expected = sequence_grid(model.images(few.canvases), few.windows, SIZES.write_size)
    assert np.array_equal(pixels(weights / 'pictures/sequence.png'), np.asarray(expected))
    held = json.loads((weights / 'pictures/generate.json').read_text())
    assert held == {'model': 'draw', 'count': count, 'glimpses': glimpses, 'seed': seed}


# ---- draw demo

@pytest.mark.parametrize('options, model, port', [
    ('', None, 8000), ('draw', 'draw', 8000), ('--port 0', None, 0)])
def test_options_of_the_demonstration(options, model, port, spy, capsys):
    "The network that comes first, and the port; Ctrl-C closes the server"
    closed = []
    class Server:
        "Interrupted as soon as it serves"
        server_port = 4321
        def serve_forever(self): raise KeyboardInterrupt
        def __enter__(self): return self
        def __exit__(self, *_): closed.append(True)
    server = Server()
    written = spy(demo, 'live_files', lambda given: given['out'])
    made = spy(demo, 'make_server', server)
    draw(f'demo {options}')
    assert [call['model'] for call in written.calls] == [model]
    assert made.calls == [dict(folder=written.calls[0]['out'], port=port)]
    assert closed and 'http://127.0.0.1:4321/' in capsys.readouterr().out


def test_a_port_that_is_none_is_refused_at_once(spy):
    written = spy(demo, 'live_files', None)
    with pytest.raises(ValueError, match='port 99999 cannot be used'): draw('demo --port 99999')
    assert not written.calls

@pytest.mark.parametrize('pixels, cautioned', [([0, 255], False), ([0, 9, 255], True)])
def test_a_bound_of_grey_pictures_is_called_a_cost(pixels, cautioned, weights, capsys):
    for i in range(12):
        values = np.resize(np.roll(pixels, i), (6, 9)).astype(np.uint8)
        (weights / 'mine').mkdir(exist_ok=True)
        Image.fromarray(values).save(weights / f'mine/{i:02}.png')
    draw('evaluate draw --images mine')
    assert ('a cost, no likelihood' in capsys.readouterr().out) == cautioned

def test_a_reproduction_that_is_interrupted(spy, monkeypatch):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr(reproduce, 'reproduce', stop)
    with pytest.raises(cli.Interrupted, match='the same command goes on'): draw('reproduce')

# ---- draw reproduce, draw benchmark

@pytest.mark.parametrize('options, expected', [
    ('', ('reproduction', 'smoke', 0)), ('--scale paper', ('reproduction', 'paper', 0)),
    ('--seed 3', ('reproduction', 'smoke', 3)), ('--out there', ('there', 'smoke', 0))])
def test_options_of_the_reproduction(options, expected, spy):
    seen = spy(reproduce, 'reproduce', Path('index.html'))
    draw(f'reproduce {options}')
    given, = seen.calls
    assert (str(given['out']), given['scale'], given['seed']) == expected
    assert given['names'] == tuple(reproduce.EXPERIMENTS)

@pytest.mark.parametrize('options, changes', [
    ('', {}), ('--preset svhn --preset cifar10', dict(presets=('svhn', 'cifar10'))),
    ('--batch 7 --batch 9', dict(batches=(7, 9))), ('--glimpses 3', dict(glimpses=(3,))),
    ('--attention', dict(attention=(True,))), ('--no-attention', dict(attention=(False,))),
    ('--side 14 --side 42', dict(sides=(14, 42))), ('--seconds 1.5', dict(seconds=1.5))])
def test_options_of_the_benchmark(options, changes, spy):
    seen = spy(benchmark, 'benchmark', [])
    draw(f'benchmark {options}')
    given, = seen.calls
    usual = dict(presets=('mnist',), batches=(100, 256), glimpses=(16, 32, 64),
                 attention=(True, False), sides=(None,), seconds=20.)
    assert given == usual | changes

def test_table_of_the_benchmark(spy, tmp_path, capsys):
    "Rounded where it is shown, exact in the file"
    rows = [dict(scan='fused', images_per_s=123.456, floor_share=0.5678, peak_mb=876.54)]
    spy(benchmark, 'benchmark', rows)
    draw(f'benchmark --json {tmp_path}/rows.json')
    said = capsys.readouterr().out
    *table, legend = said.splitlines()
    assert ' '.join(table).split() == ['scan', 'images_per_s', 'floor_share', 'peak_mb', 'fused',
                                       '123.5', '0.57', '877.0']
    assert all(row in legend for row in ('floor', 'products', *benchmark.SCANS))
    assert json.loads((tmp_path / 'rows.json').read_text()) == rows


# ---- draw train, draw classify

@pytest.mark.parametrize('options, data, size', [
    ('', 'mnist', None), ('--data mnist_redrawn', 'mnist_redrawn', None),
    ('--images mine', 'mine', None), ('--images mine --size 7', 'mine', 7)])
def test_images_of_a_training(options, data, size, weights, spy):
    "It learns from train and chooses by valid, and the network takes the shape of one's own images"
    (weights / 'mine').mkdir()
    found = spy(data_sets, 'find', lambda given: small_set(given['split'], (3, 6, 9)))
    seen = spy(cli, 'run')
    draw(f'train mnist {options}')
    assert [(str(g['data']), g['split'], g['size']) for g in found.calls] == [
        (data, 'train', size), (data, 'valid', size)]
    given, = seen.calls
    assert (given['train_set'].split, given['valid_set'].split) == ('train', 'valid')
    config = given['config']
    shape = (3, 6, 9) if 'images' in options else (1, 28, 28)
    assert (config.channels, config.height, config.width) == shape

@pytest.mark.parametrize('options, task', [('', Task), ('--from draw', FineTuneTask)])
def test_start_of_a_training(options, task, weights, spy):
    "Fresh weights, or those that --from names"
    spy(data_sets, 'find', lambda given: small_set(given['split'], (1, 6, 9)))
    seen = spy(cli, 'run')
    draw('train mnist --images draw --hidden-size 8 --latent-size 2 --read-size 1 --write-size 2 '
         f'{options}')
    given, = seen.calls
    learned = given['train'].keywords['task']
    assert type(learned) is task
    begun = learned.start(given['config'], given['train_set']).state_dict()
    expected = DRAW.from_pretrained(weights / 'draw').state_dict()
    same = [torch.equal(begun[name], expected[name]) for name in expected]
    assert all(same) == bool(options)

def test_weights_that_do_not_fit_are_refused_before_anything_is_said(weights, spy):
    "The announcement of a run comes after all that can be known to be wrong"
    spy(data_sets, 'find', lambda given: small_set(given['split'], (1, 28, 28)))
    seen = spy(cli, 'run')
    with pytest.raises(ValueError, match='draw has height 6, and the run is to have 28'):
        draw('train mnist --from draw')
    assert not seen.calls

@pytest.mark.parametrize('split', ['valid', 'test'])
def test_split_of_a_classification(split, weights, spy, capsys):
    "After training, the part that was asked for is classified and shown, and no other"
    spy(data_sets, 'find', lambda given: small_set(given['split'], (1, 100, 100)))
    network = DifferentiableRAM.from_pretrained(weights / 'ram')
    trained = spy(cli, 'run', lambda given: network)
    seen = spy(classifier, 'classification_error', replace(ERROR, split=split))
    (weights / 'here').mkdir()
    (weights / 'here/run.json').write_text('{}')
    draw(f'classify cluttered_4 --out here --split {split}')
    given, = trained.calls
    assert (given['train_set'].split, given['valid_set'].split) == ('train', 'valid')
    given, = seen.calls
    assert given['data'].split == split and given['model'] is network and given['limit'] is None
    held = json.loads((weights / 'here/classification.json').read_text())
    assert held == {'model': 'here/best', **asdict(ERROR), 'split': split}
    random = torch.Generator().manual_seed(0)
    expected = glimpse_grid(network, small_set(split, (1, 100, 100)).batch(range(6), random))
    assert np.array_equal(pixels(weights / 'here/glimpses.png'), np.asarray(expected))
    assert '12.50 ± 2.25 %' in capsys.readouterr().out

def test_epochs_are_told_with_their_numbers(weights, spy, capsys):
    "As they come: epochs counted from 1, nats as they were measured"
    def train(config, train_set, valid_set, out, options, report):
        report(dict(epoch=0, bound=90.125))
        raise KeyboardInterrupt
    with pytest.raises(cli.Interrupted):
        cli.run(train, SIZES, SimpleNamespace(epochs=3, batch_size=3), small_set('train'),
                small_set('valid'), weights / 'run', lambda row: f'{row["bound"]:.2f} nats', 1)
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == 'epoch 1: 90.12 nats'
    assert '3 epochs of 2 updates, 1 process' in said.err

@pytest.mark.parametrize('text, epochs, expected', [
    ('8', None, (8, (), None)), ('8', 3, (8, (), 3)),
    ('16:10,32:20,64:80', None, (64, ((16, 10), (32, 20)), 110))])
def test_stages(text, epochs, expected): assert cli.parse_glimpses(text, epochs) == expected

def test_no_epochs():
    "Not the recipe's, whatever the glimpses"
    with pytest.raises(ValueError, match='epochs must be at least 1'):
        cli.build_run(classifier.CLASSIFIERS, 'cluttered_8', 'own', '8', 0, {}, {})

@pytest.mark.parametrize('options, told', [
    ('reproduce --seed -1', '--seed must be between'),
    ('reproduce --seed 99999999999999999999999', '--seed must be between'),
    ('benchmark --batch 99999999999999999999999', 'choose smaller numbers'),
    ('benchmark --batch 2 --glimpses 2 --side 100000', 'choose smaller numbers')])
def test_numbers_beyond_everything(options, told):
    with pytest.raises(ValueError, match=told): draw(options)

def test_processes_of_a_launcher(weights, capsys, monkeypatch):
    "Their number is the launcher's; a rank of something else counts for nothing"
    def train(config, train_set, valid_set, out, options, report): pass
    for rank, size, told in (('0', '3', '3 processes'), ('1', '3', ''), ('1', None, '1 process,')):
        monkeypatch.setenv('RANK', rank)
        monkeypatch.delenv('WORLD_SIZE', raising=False)
        if size: monkeypatch.setenv('WORLD_SIZE', size)
        cli.run(train, SIZES, SimpleNamespace(epochs=3, batch_size=3), small_set('train'),
                small_set('valid'), weights / 'none', str, 1)
        said = capsys.readouterr().err
        assert told in said if told else not said

def test_memory(monkeypatch):
    "Four bytes a number"
    memory = SimpleNamespace(total=2 * 2**30)
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: memory)
    cli.check_memory('this', 2**29 - 1)
    with pytest.raises(ValueError, match='^this would need 4 GB of memory, and this machine has 2'):
        cli.check_memory('this', 2**30)


# ---- draw data

def test_list_of_data_sets(spy, monkeypatch, tmp_path, capsys):
    "The folder in use, and every row whole"
    monkeypatch.setenv('DRAW_DATA', str(tmp_path))
    entry = SimpleNamespace(name='a name', images='1 / 2 / 3', state=lambda: 'nowhere',
                            size='4 GB', licence='none')
    monkeypatch.setattr(data_sets, 'DATA_SETS', {'a name': entry})
    draw('data')
    said = capsys.readouterr().out
    assert str(tmp_path) in said.splitlines()[0]
    rows, weights = said.splitlines()[1:-2], said.splitlines()[-1]
    assert rows == ['', 'a name: 1 / 2 / 3', '  nowhere', '  4 GB; licence: none']
    assert 'Packaged weights' in weights and ' mnist, ' in weights

@pytest.mark.parametrize('line, said', [
    ('train mnist --foo 1', '(draw train --help lists'), ('train', '(draw train --help lists'),
    ('trian', '(draw --help lists')])
def test_usage_errors_name_the_help_of_the_verb(line, said, monkeypatch, capsys):
    monkeypatch.setattr(cli.sys, 'argv', ['draw', *line.split()])
    with pytest.raises(SystemExit) as ended: cli.main()
    error, = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said in error

@pytest.mark.parametrize('line', ['-h', 'train -h', 'train --help', '--help'])
def test_help(line, monkeypatch, capsys):
    monkeypatch.setattr(cli.sys, 'argv', ['draw', *line.split()])
    with pytest.raises(SystemExit) as ended: cli.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and '-h, --help' in said
    cut = [verb for verb in said.splitlines()[1:] if verb.endswith('...')]
    assert 'train' in line or not cut

def test_warnings_are_told_once_in_a_line(monkeypatch, capsys):
    "As errors are, without the place in the source"
    def verb(*_, **__):
        for _ in range(2): warnings.warn(f'left out {verb}', stacklevel=1)
    monkeypatch.setattr(cli, 'app', verb)
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter('always')
        cli.main()
    assert capsys.readouterr().err == f'draw: left out {verb}\n'


# ---- all verbs

TRAINING = 'recipe epochs glimpses out processes'.split() # with those of test_tools.py
TRIED = {
    'train': {*test_tools.OPTIONS, *test_tools.SIZES, *TRAINING, 'data', 'images', 'size',
              'start_from'} - {'every_glimpse'},
    'classify': {*test_tools.OPTIONS, *TRAINING, 'hidden_size', 'read_size', 'split'}
                - {'kl_warmup'},
    'evaluate': {*'data images size split glimpses seeds samples limit out'.split()},
    'generate': {*'count glimpses out seed'.split()},
    'reproduce': {*'scale out seed'.split()},
    'benchmark': {*'preset batch glimpses attention side seconds json_file'.split()},
    'data': set(),
    'demo': {'port'},
}

def test_no_option_is_forgotten():
    "Whoever adds an option to a verb adds it here, and a test that something comes of it"
    verbs = cli.typer.main.get_command(cli.app).commands
    found = {name: {p.name for p in verb.params if p.param_type_name == 'option'} - {'help'}
             for name, verb in verbs.items()}
    assert found == TRIED

# ---- what is closed, and what is no number

def test_results_are_written_before_they_are_told(weights, spy, monkeypatch):
    "A reader who has gone away, as `head` has, loses nothing"
    spy(data_sets, 'find', lambda given: small_set(given['split']))
    spy(evaluation, 'evaluate', BOUND)
    def gone(*_, err=False):
        if not err: raise BrokenPipeError
    monkeypatch.setattr(cli.typer, 'echo', gone)
    with pytest.raises(BrokenPipeError): draw('evaluate draw --data mnist --out result')
    assert json.loads((weights / 'result/evaluation.json').read_text())['bound'] == BOUND.bound

def test_bounds_and_drawings_that_are_no_numbers(weights, spy):
    "Are not given out as results"
    spy(data_sets, 'find', lambda given: small_set(given['split']))
    spy(evaluation, 'evaluate', replace(BOUND, bound=float('nan')))
    with pytest.raises(ValueError, match='what draw computes is not finite'):
        draw('evaluate draw --data mnist --out result')
    model = DRAW.from_pretrained('draw')
    with torch.no_grad():
        for p in model.parameters(): p.fill_(3e38)
    model.save_pretrained('large')
    with pytest.raises(ValueError, match='what large computes is not finite'):
        draw('generate large --count 2 --out pictures')
    assert not (weights / 'result').exists() and not (weights / 'pictures').exists()

def test_windows_of_the_write_part(weights):
    "Are drawn wherever there are some, whatever reads"
    config = replace(SIZES, attention=False, write_part='attentive')
    DRAW(config).save_pretrained('mixed')
    draw('generate mixed --count 2 --out pictures')
    assert np.ptp(np.asarray(Image.open('pictures/sequence.png')).astype(int), axis=2).max() > 0

@pytest.mark.parametrize('closed', ['stdout', 'stderr'])
def test_streams_that_are_closed(closed, weights, spy, monkeypatch):
    "By a caller who wants to see nothing: progress bars have nowhere to go"
    spy(data_sets, 'find', lambda given: small_set(given['split']))
    line = 'draw evaluate draw --data mnist --samples 2 --out result'
    monkeypatch.setattr('sys.argv', line.split())
    monkeypatch.setattr(f'sys.{closed}', None)
    with pytest.raises(SystemExit) as ended: cli.main()
    assert ended.value.code == 0 and (weights / 'result/evaluation.json').is_file()

@pytest.mark.parametrize('option', ['epochs', 'batch-size', 'glimpses', 'hidden-size'])
def test_numbers_without_end(option, weights):
    with pytest.raises(ValueError) as caught:
        draw(f'train mnist --data mnist --out run --{option} 1{"0" * 400}')
    assert '\n' not in str(caught.value) and not (weights / 'run').exists()

@pytest.mark.parametrize('option', ['read-size', 'write-size'])
def test_windows_of_a_network_that_has_none(option, weights):
    with pytest.raises(ValueError, match=f'has no windows: leave --{option} out'):
        draw(f'train mnist_no_attention --data mnist --{option} 3')
