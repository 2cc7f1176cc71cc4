"""Training under faults: killed processes, full disks, strange files, several processes at once

A fork server imports PyTorch once; every training process below is forked from it, so that killing
and starting again is cheap.
The file is also a program: `test_training.py FOLDER` is the toy run that `torchrun` starts twice.
"""
import errno, gc, json, math, multiprocessing, os, pickle, random, resource, shutil, signal, socket
import subprocess, sys, threading, time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
import psutil
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
import draw_nbdev.checkpoints as checkpoints
import draw_nbdev.runs as runs
import draw_nbdev.training as training
from draw_nbdev.data import Images
from draw_nbdev.evaluation import evaluate
from draw_nbdev.model import DRAW, DRAWConfig
from draw_nbdev.muon import orthogonalize
from draw_nbdev.options import TrainOptions
from draw_nbdev.checkpoints import open_run, read_metrics
from draw_nbdev.training import train

CONFIG = DRAWConfig(
    height=5, width=7, channels=2, glimpses=3, hidden_size=8, latent_size=3, read_size=2,
    write_size=3,
)
# 3 epochs of 6 updates
OPTIONS = TrainOptions(
    epochs=3, batch_size=4, save_every=4, log_every=1, kl_warmup=4, rate_warmup=3,
    learning_rate=0.01,
)
LAST = 18 # Updates in all

def toy_images(split='train', kind=Images):
    "Binary noise in two colours"
    pixels = (
        torch.rand(
            {'train': 24, 'valid': 8}[split], 2, 5, 7, generator=torch.Generator().manual_seed(3)
        )
        < 0.3
    )
    return kind(pixels.to(torch.uint8), 'toy', split, levels=1)

class Failing(Images):
    "Images that fail when a given number of batches has been drawn"
    def batch(self, indices, generator=None):
        # the mean image is made from larger batches
        if len(indices) == OPTIONS.batch_size: self.left -= 1
        if self.left < 0: raise InterruptedError('the plug was pulled')
        return super().batch(indices, generator)

def toy_train(out, options=OPTIONS, batches=None, config=CONFIG):
    "The run of these tests, in this process; with `batches`, it fails after so many of them"
    images = toy_images(kind=Failing)
    images.left = math.inf if batches is None else batches
    return train(config, images, toy_images('valid'), out, options)

def timeless(row):
    return {
        k: v for k, v in row.items() if k not in ('images_per_s', 'seconds', 'cpu_seconds', 'files')
    }

def outcome(out):
    "Everything that a run leaves behind and that does not depend on the clock"
    state = sorted(out.glob('state-*'))[-1]
    optimizers = [
        torch.load(file, weights_only=True)['state']
        for file in sorted(state.glob('optimizer*.bin'))
    ]
    return {
        'best': (out / 'best/model.safetensors').read_bytes(),
        'config': (out / 'best/config.json').read_bytes(), 'state': state.name,
        'weights': (state / 'model.safetensors').read_bytes(),
        'averaged': (state / 'averaged.safetensors').read_bytes(),
        'moments': [
            [v.tolist() for v in moments.values()]
            for optimizer in optimizers
            for moments in optimizer.values()
        ],
        'progress': timeless(json.loads((state / 'progress.json').read_text())),
        'metrics': [timeless(row) for row in read_metrics(out)],
    }

def assert_same(out, reference):
    "Two runs ended with the same weights, moments, metrics and best bound, bit for bit"
    ours, theirs = outcome(out), outcome(reference)
    for key in theirs: assert ours[key] == theirs[key], key

def updates_saved(out, least=0):
    """Updates up to the newest state, at least as many as before; this state can be read, and so
    can the weights, once there are any"""
    states, step = sorted(out.glob('state-*')), 0
    if states:
        for name in ('model.safetensors', 'averaged.safetensors'): load_file(states[-1] / name)
        torch.load(states[-1] / 'optimizer.bin', weights_only=True)
        step = json.loads((states[-1] / 'progress.json').read_text())['step']
        assert step == int(states[-1].name[-8:])
    if all((out / 'best' / name).exists() for name in ('config.json', 'model.safetensors')):
        DRAW.from_pretrained(out)
    assert step >= least
    return step


# ---- training in processes of their own

def child(
    out, options=OPTIONS, environment={}, die_at=None, file_limit=None, slow_to_make=0,
    slow_to_look=0, report=None, cpu=None,
):
    "What a forked process does: train, and die or suffer on the way as asked"
    os.environ.update(environment)
    torch.set_num_threads(1)
    if file_limit: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    operations = 0
    def hook(event, arguments):
        "Count operations on the files of the run, and die before the one that was chosen"
        nonlocal operations
        if (
            event in ('os.remove', 'os.rmdir')
            or event in ('open', 'os.rename', 'os.mkdir', 'shutil.rmtree')
            and str(arguments[0]).startswith(str(out))
        ):
            operations += 1
            if operations == die_at: os.kill(os.getpid(), signal.SIGKILL)
        if event == 'os.rename' and Path(arguments[0]).name.startswith('.run.json.'):
            time.sleep(slow_to_make)
    sys.addaudithook(hook)
    def look(*arguments, **more):
        time.sleep(slow_to_look)
        return open_run(*arguments, **more)
    training.open_run = look
    if cpu: runs.process_time = partial(next, count(0, cpu)) # so much between two calls
    try: toy_train(out, options)
    except Exception as error:
        if report is None: raise
        report.write_text(json.dumps([[kind.__name__ for kind in type(error).__mro__], str(error)]))

@pytest.fixture(scope='session')
def start():
    "Start a training process: `start(out, ...)` with the arguments of `child`"
    here = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(here + [os.environ.get('PYTHONPATH', '')]))
        patch.setenv('OMP_NUM_THREADS', '1')
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(
            ['test_training', 'torch.utils.tensorboard', 'torch._dynamo', 'torch.onnx']
        )
        def start(out, **how):
            process = context.Process(target=child, args=(out,), kwargs=how)
            process.start()
            return process
        yield start

def finish(*processes, seconds=120):
    "Wait for processes and return their exit codes; negative ones are signals"
    for process in processes: process.join(seconds)
    late = [process for process in processes if process.is_alive()]
    for process in late: process.kill()
    assert not late, f'still running after {seconds} s'
    return [process.exitcode for process in processes]

@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory, start):
    "Folder of a run that nothing happened to"
    out = tmp_path_factory.mktemp('undisturbed') / 'run'
    assert finish(start(out)) == [0]
    assert [row['step'] for row in read_metrics(out) if row['split'] == 'train'] == list(
        range(1, LAST + 1)
    )
    return out

def test_in_another_process_the_run_is_the_same(undisturbed, tmp_path):
    "The reference of the tests below does not depend on where it ran"
    toy_train(tmp_path / 'run')
    assert_same(tmp_path / 'run', undisturbed)


# ---- kill -9

def test_killed_at_random_moments(start, undisturbed, tmp_path):
    """SIGKILL from outside, some moments after some update, again and again; then the run is
    left alone"""
    out, chance, codes, saved = tmp_path / 'run', random.Random(0), [], 0
    for _ in range(6):
        process, until = start(out), saved + chance.randint(1, 4)
        while (
            process.is_alive()
            and max([row['step'] for row in read_metrics(out)], default=0) < until
        ):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        codes += finish(process)
        saved = updates_saved(out, saved)
    assert set(codes) <= {-signal.SIGKILL, 0} and -signal.SIGKILL in codes
    assert finish(start(out)) == [0]
    assert_same(out, undisturbed)

def test_killed_again_and_again_before_a_file_operation(start, undisturbed, tmp_path):
    """SIGKILL just before the n-th time that a file of the run is opened, renamed or removed,
    for n = 1, 2, ..., until it ends"""
    out, saved = tmp_path / 'run', 0
    for n in range(1, 1000):
        # the first files one by one, later ones with gaps
        code, = finish(start(out, die_at=n + n // 10 * 8))
        saved = updates_saved(out, saved)
        if code == 0: break
        assert code == -signal.SIGKILL
    assert n > 20
    assert_same(out, undisturbed)

def test_killed_before_each_file_operation_of_saving(start, undisturbed, tmp_path):
    """SIGKILL just before the n-th operation, for every n until new states and better weights
    have replaced those that were there"""
    base, out = tmp_path / 'base', tmp_path / 'run'
    with pytest.raises(InterruptedError): toy_train(base, batches=9)
    assert updates_saved(base) == 8
    best, found = (base / 'best/model.safetensors').read_bytes(), set()
    for n in range(1, 1000):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(base, out)
        assert finish(start(out, die_at=n)) == [-signal.SIGKILL]
        saved = updates_saved(out, 8)
        DRAW.from_pretrained(out)
        found.add((saved, (out / 'best/model.safetensors').read_bytes() == best))
        if n % 10 == 0: # the run can go on from here
            toy_train(out)
            assert_same(out, undisturbed)
        if saved > 12: break
    assert n > 40 and found >= {(8, True), (8, False), (12, False)}

def test_remains_of_a_killed_process_do_no_harm(undisturbed, tmp_path):
    "Half-written files of every kind, and a line of metrics that was cut off"
    out = tmp_path / 'run'
    with pytest.raises(InterruptedError): toy_train(out, batches=11)
    for name in ('state.tmp', 'best.tmp'):
        (out / name).mkdir()
        (out / name / 'model.safetensors').write_bytes(b'half')
    (out / '.run.json.01234567.tmp').write_text('{"config": ')
    (out / '.metrics.jsonl.01234567.tmp').write_text('{"step": 1')
    with open(out / 'metrics.jsonl', 'a') as file: file.write('{"step": 11, "epo')
    toy_train(out)
    assert_same(out, undisturbed)
    assert {p.name for p in out.iterdir()} == {p.name for p in undisturbed.iterdir()}

def test_killed_before_there_was_a_run(undisturbed, tmp_path):
    "A folder that holds nothing but an unfinished run.json is the beginning of a run"
    out = tmp_path / 'run'
    out.mkdir()
    (out / '.run.json.01234567.tmp').write_text('{"config": ')
    toy_train(out)
    assert_same(out, undisturbed)


# ---- full disks

def full_disk(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')

def when(condition, function, failure):
    "`function`, except that `failure` is called where `condition` holds for its arguments"
    return lambda *arguments, **more: (failure if condition(*arguments) else function)(
        *arguments, **more
    )

def half_save_file(tensors, path):
    "Write half a file of weights before the disk is full"
    Path(path).write_bytes(b'half a file of weights')
    full_disk()

def calls(number):
    "A condition that holds from the given call on"
    counter = iter(range(10**9))
    return lambda *_: next(counter) >= number

# Where the disk is full -> what fails there, and how many updates are in the state that is left
FAULTS = {
    'run.json': (
        lambda patch: patch.setattr(
            Path, 'write_text',
            when(lambda path, *_: path.name.startswith('.run.json.'), Path.write_text, full_disk),
        ),
        0,
    ),
    'first state': (
        lambda patch: patch.setattr(
            Path, 'replace',
            when(lambda _, target: target.name.startswith('state-'), Path.replace, full_disk),
        ),
        0,
    ),
    'averaged weights': (
        lambda patch: patch.setattr(
            checkpoints, 'save_file', when(calls(2), checkpoints.save_file, half_save_file)
        ),
        6,
    ),
    'progress': (
        lambda patch: patch.setattr(
            Path, 'write_text',
            when(
                lambda path, *_: path.name == 'progress.json'
                and (path.parents[1] / 'state-00000006').exists(), Path.write_text, full_disk,
            ),
        ),
        6,
    ),
    'rename of a state': (
        lambda patch: patch.setattr(
            Path, 'replace',
            when(lambda _, target: target.name == 'state-00000008', Path.replace, full_disk),
        ),
        6,
    ),
    'best weights': (
        lambda patch: patch.setattr(
            DRAW, 'save_pretrained', when(calls(2), DRAW.save_pretrained, full_disk)
        ),
        8,
    ),
    'rename of the best weights': (
        lambda patch: patch.setattr(
            os, 'replace',
            when(
                lambda _, target: Path(target).parent.name == 'best' and Path(target).exists(),
                os.replace, full_disk,
            ),
        ),
        8,
    ),
}

@pytest.mark.parametrize('fault', FAULTS)
def test_full_disk(fault, undisturbed, tmp_path):
    """An OSError comes out, what was saved before can be read, and the run goes on once there is
    room"""
    out = tmp_path / 'run'
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault][0](patch)
        with pytest.raises(OSError, match='No space left'): toy_train(out)
    assert updates_saved(out) == FAULTS[fault][1]
    toy_train(out)
    assert_same(out, undisturbed)

@pytest.mark.parametrize('name', ['model.safetensors', 'optimizer.bin'])
def test_writing_fails_beneath_python(start, undisturbed, tmp_path, name):
    """The libraries that write weights and moments meet a real error of the file system: the
    message names it, and the run goes on"""
    out, report = tmp_path / 'run', tmp_path / 'report'
    size = next(undisturbed.glob(f'state-*/{name}')).stat().st_size
    assert finish(start(out, file_limit=size - 200, report=report)) == [0]
    kinds, message = json.loads(report.read_text())
    assert 'OSError' in kinds and '\n' not in message and str(out) in message, (kinds, message)
    assert updates_saved(out) == 0
    assert finish(start(out)) == [0]
    assert_same(out, undisturbed)


# ---- a network that breaks

@pytest.mark.parametrize('where', ['bound', 'gradient'])
def test_what_is_not_finite_is_not_saved(where, tmp_path, monkeypatch):
    """Training ends with one line as soon as it has gone wrong, before a broken state replaces
    the last good one"""
    genuine, updates = training.bound, []
    def breaking(output, images, likelihood):
        "The bound, until the ninth update"
        parts = genuine(output, images, likelihood)
        updates.append(1)
        if len(updates) < 9: return parts
        if where == 'bound':
            return parts._replace(
                total=parts.total * math.nan, reconstruction=parts.reconstruction * math.nan
            )
        output.canvas.register_hook(lambda slope: slope * math.nan)
        return parts
    monkeypatch.setattr(training, 'bound', breaking)
    out = tmp_path / 'run'
    with pytest.raises(ValueError, match='finite') as caught:
        toy_train(out, replace(OPTIONS, log_every=100, save_every=1))
    assert '\n' not in str(caught.value)
    state = sorted(out.glob('state-*'))[-1]
    assert state.name == 'state-00000008'
    assert all(
        value.isfinite().all()
        for name in ('model', 'averaged')
        for value in load_file(state / f'{name}.safetensors').values()
    )


# ---- several processes

def ranks(port):
    "Environments of two processes that work together, as torchrun sets them"
    common = {
        'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
    }
    return [{**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(2)]

def free_port():
    "A port that nobody listens at"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='session')
def pair(tmp_path_factory, start):
    """Folder of a run by two processes, the second of which looks at the folder while the first
    is making it"""
    out = tmp_path_factory.mktemp('pair') / 'run'
    first, second = ranks(free_port())
    assert finish(
        start(out, environment=first, slow_to_make=0.6),
        start(out, environment=second, slow_to_look=0.3),
    ) == [0, 0]
    return out

def assert_close_runs(out, reference):
    "Weights and metrics agree within what float32 sums in another order differ by"
    ours, theirs = outcome(out), outcome(reference)
    assert [(row['step'], row['split']) for row in ours['metrics']] == [
        (row['step'], row['split']) for row in theirs['metrics']
    ]
    for a, b in zip(ours['metrics'], theirs['metrics']):
        assert math.isclose(a['bound'], b['bound'], rel_tol=1e-4)
    a, b = (load_file(folder / ours['state'] / 'model.safetensors') for folder in (out, reference))
    initial = DRAW(CONFIG).start_from(toy_images().mean()).state_dict()
    assert a.keys() == b.keys() == initial.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
        # close for having learned the same, not for having learned nothing
        assert (b[name] - initial[name]).abs().max() > 20 * (a[name] - b[name]).abs().max(), name

def test_two_processes_do_what_one_does(pair, undisturbed):
    "Their shares of a batch and of its noise make the same updates; one of them writes"
    assert_close_runs(pair, undisturbed)
    assert all(
        count == 1
        for count in Counter((row['step'], row['split']) for row in read_metrics(pair)).values()
    )
    assert len(list((pair / 'tensorboard').iterdir())) == 1

def test_two_processes_go_on(start, pair, tmp_path):
    """One of two processes is killed, the other ends; started again, both end with the same
    weights, bit for bit"""
    out = tmp_path / 'run'
    for victim, die_at in ((0, 55), (1, 7)): # the second process touches few files of the run
        environments = ranks(free_port())
        processes = [
            start(out, environment=environment, die_at=die_at if rank == victim else None)
            for rank, environment in enumerate(environments)
        ]
        finish(processes[victim])
        time.sleep(0.2)
        # what a launcher does when one of its processes fails
        if processes[1 - victim].is_alive(): processes[1 - victim].terminate()
        finish(*processes)
        assert processes[victim].exitcode == -signal.SIGKILL
        assert 0 < updates_saved(out) < LAST
    assert finish(*(start(out, environment=environment) for environment in ranks(free_port()))) == [
        0, 0,
    ]
    assert_same(out, pair)

def test_torchrun(undisturbed, tmp_path):
    "The launcher that users start several processes with: both take part"
    out = tmp_path / 'run'
    environment = {
        **os.environ, 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
        ),
    }
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_addr',
        '127.0.0.1', '--master_port', str(free_port()), __file__, str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == ['0/2', '1/2']
    assert_close_runs(out, undisturbed)

def test_cpu_time_of_all_processes(start, tmp_path):
    "What every process has used since it began, added up; there are six saves, three of epochs"
    environments = ranks(free_port())
    processes = [
        start(tmp_path / 'run', environment=environment, cpu=cpu)
        for environment, cpu in zip(environments, (1., 10.))
    ]
    assert finish(*processes) == [0, 0]
    rows = [row for row in read_metrics(tmp_path / 'run') if row['split'] == 'valid']
    assert [row['cpu_seconds'] for row in rows] == [22., 44., 66.]
    state = next((tmp_path / 'run').glob('state-*'))
    assert json.loads((state / 'progress.json').read_text())['cpu_seconds'] == 66.
    best = json.loads((tmp_path / 'run/best/training.json').read_text())
    assert best['cpu_seconds'] == 22. * best['epochs']

class Timed(training.Task):
    "An update takes a second by a clock that is set by hand, and ten of CPU"
    def __init__(self, patch):
        self._now = 100.
        patch.setattr(runs, 'perf_counter', lambda: self._now)
        patch.setattr(runs, 'process_time', lambda: 10 * self._now)

    def loss(self, *arguments, **more):
        self._now += 1
        return super().loss(*arguments, **more)

def test_time_goes_on(tmp_path, monkeypatch):
    "A run that is interrupted counts its own time, not the time in between; images by the second"
    task, images = Timed(monkeypatch), toy_images(kind=Failing)
    for batches in (9, math.inf): # the second time from update 8
        images.left = batches
        try: train(CONFIG, images, toy_images('valid'), tmp_path / 'run', OPTIONS, task)
        except InterruptedError: task._now += 1000
    rows = read_metrics(tmp_path / 'run')
    valid = [row for row in rows if row['split'] == 'valid']
    assert [row['seconds'] for row in valid] == pytest.approx([6, 12, 18])
    assert [row['cpu_seconds'] for row in valid] == pytest.approx([60, 120, 180], rel=1e-6)
    assert {row['images_per_s'] for row in rows if row['split'] == 'train'} == {4.}

def test_batches_must_divide_among_processes(start, tmp_path):
    "Refused in one line by every process"
    reports = [tmp_path / f'report{rank}' for rank in range(2)]
    processes = [
        start(
            tmp_path / 'run', environment=environment, options=replace(OPTIONS, batch_size=3),
            report=report,
        )
        for environment, report in zip(ranks(free_port()), reports)
    ]
    assert finish(*processes) == [0, 0]
    for report in reports:
        kinds, message = json.loads(report.read_text())
        assert 'ValueError' in kinds and 'does not divide among 2 processes' in message


# ---- files that would run code

class Malicious:
    "An object that touches a file when it is unpickled"
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)

def stopped_run(out):
    "A run with a state in the middle"
    with pytest.raises(InterruptedError): toy_train(out, batches=9)
    return sorted(out.glob('state-*'))[-1]

def test_malicious_pickles_do_run_code_elsewhere(tmp_path):
    "The trap of the next tests works"
    pickle.loads(pickle.dumps(Malicious(tmp_path / 'owned')))
    assert (tmp_path / 'owned').exists()

@pytest.mark.parametrize(
    'write',
    [
        lambda thing, file: file.write_bytes(pickle.dumps(thing, protocol=2)),
        lambda thing, file: torch.save(thing, file),
    ],
    ids=['pickle', 'torch'],
)
@pytest.mark.parametrize('name', ['optimizer.bin', 'pytorch_model.bin', 'random_states_0.pkl'])
def test_states_run_no_code(name, write, undisturbed, tmp_path):
    """A state with a malicious pickle and the right checksums is refused in one line; random
    states are not needed, and so may be ignored"""
    out = tmp_path / 'run'
    state = stopped_run(out)
    if name == 'pytorch_model.bin': (state / 'model.safetensors').unlink()
    write(Malicious(tmp_path / 'owned'), state / name)
    signed_again(state)
    if name == 'random_states_0.pkl':
        toy_train(out)
        assert_same(out, undisturbed)
    else:
        with pytest.raises(ValueError) as caught: toy_train(out)
        assert '\n' not in str(caught.value) and state.name in str(caught.value)
    assert not (tmp_path / 'owned').exists()

@pytest.mark.parametrize(
    'name', ['model.safetensors', 'averaged.safetensors', 'optimizer.bin', 'progress.json']
)
@pytest.mark.parametrize(
    'damage', [lambda path: path.write_bytes(path.read_bytes()[:20]), Path.unlink],
    ids=['cut', 'missing'],
)
def test_damaged_states_are_refused(name, damage, tmp_path):
    "In one line that names the state"
    state = stopped_run(tmp_path / 'run')
    damage(state / name)
    with pytest.raises((ValueError, OSError)) as caught: toy_train(tmp_path / 'run')
    assert '\n' not in str(caught.value) and state.name in str(caught.value)

def other_progress(state, **changes):
    "progress.json with other values"
    file = state / 'progress.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

def saved_again(state, name, change):
    "optimizer.bin or the like after a change to what it holds, still a file that can be loaded"
    held = torch.load(state / name, weights_only=True)
    change(held)
    torch.save(held, state / name)

def signed_again(state):
    "A state with the right checksums, whatever is in it"
    progress = json.loads((state / 'progress.json').read_text())
    del progress['files']
    other_progress(state, files=checkpoints.checksums(state, progress))

def with_nan(state):
    "A number in the averaged weights that is none"
    weights = load_file(state / 'averaged.safetensors')
    weights['module.posterior.bias'][0] = math.nan
    checkpoints.save_file(weights, state / 'averaged.safetensors')
    signed_again(state)

@pytest.mark.parametrize(
    'damage',
    [
        *(
            lambda state, text=text: (state / 'progress.json').write_text(text)
            for text in ('{}', '[]', 'null', '7', '"step"', '[' * 5000, '{"step": 8}')
        ),
        lambda state: other_progress(state, step=12), lambda state: other_progress(state, step='8'),
        lambda state: other_progress(state, files={}),
        lambda state: other_progress(state, cpu_seconds=1.),
        lambda state: other_progress(state, cqu_seconds=1.),
        lambda state: saved_again(state, 'optimizer.bin', lambda held: held['state'].clear()),
        lambda state: saved_again(state, 'optimizer.bin', lambda held: held['state'].pop(3)),
        with_nan,
    ],
    ids=[
        'empty', 'list', 'null', 'number', 'text', 'deep', 'without checksums', 'another step',
        'step in quotes', 'no checksums', 'other seconds', 'another name', 'no moments',
        'fewer moments', 'nan',
    ],
)
def test_states_that_do_not_belong_together(damage, tmp_path):
    """Refused before the first write, in one line that names the state; never a run that ends
    differently"""
    out = tmp_path / 'run'
    stopped_run(out)
    damage(next(out.glob('state-*')))
    before = {
        p: p.stat().st_mtime_ns
        for p in out.rglob('*')
        if p.is_file() and p.name != 'run.lock' and p.parent.name != 'tensorboard'
    }
    with pytest.raises(ValueError, match='state-00000008 is damaged') as caught: toy_train(out)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500
    assert {
        p: p.stat().st_mtime_ns
        for p in out.rglob('*')
        if p.is_file() and p.name != 'run.lock' and p.parent.name != 'tensorboard'
    } == before

def test_two_runs_in_one_folder(start, undisturbed, tmp_path):
    """The second is refused in one line while the first is at work, loses it nothing, and may go
    on after it has been killed"""
    out, report = tmp_path / 'run', tmp_path / 'report'
    first = start(out, slow_to_make=3)
    until = time.monotonic() + 60
    while not any(out.glob('.run.json.*')) and time.monotonic() < until: time.sleep(0.01)
    assert finish(start(out, report=report)) == [0]
    assert 'is being written by another run' in json.loads(report.read_text())[1]
    assert finish(first) == [0]
    assert_same(out, undisturbed)
    try: toy_train(tmp_path / 'failed', batches=5)
    except InterruptedError as error:
        toy_train(tmp_path / 'failed') # while the error and its frames live on, as in a notebook
        assert error.__traceback__ is not None
    killed = start(tmp_path / 'killed', die_at=40)
    finish(killed)
    toy_train(tmp_path / 'killed')
    assert_same(tmp_path / 'killed', undisturbed)

@pytest.mark.parametrize(
    'text',
    [
        '[]', 'null', '3', '{}', '{"config": 1, "options": 2, "data": 3}',
        '{"config": {}, "options": {"seed": null}, "data": []}',
        '[' * 5000,
        '{"config": {}, "options": {}, "data": {}, "segments": 5}',
        '{"config": {}, "options": {}, "data": {}, "segments": [5]}',
    ],
)
def test_run_json_of_another_shape(text, tmp_path):
    "Valid JSON that is not a run's, in one line that names the file"
    out = tmp_path / 'run'
    out.mkdir()
    (out / 'run.json').write_text(text)
    with pytest.raises(ValueError, match='run') as caught: toy_train(out)
    assert '\n' not in str(caught.value) and str(out) in str(caught.value)

def test_metrics_that_are_no_file(undisturbed, tmp_path):
    "Refused in one line that names it, before anything is written"
    out = tmp_path / 'run'
    shutil.copytree(undisturbed, out)
    (out / 'metrics.jsonl').unlink()
    (out / 'metrics.jsonl').mkdir()
    before = (out / 'run.json').stat().st_mtime_ns
    with pytest.raises(ValueError, match='metrics.jsonl is not a file: remove it'): toy_train(out)
    assert (out / 'run.json').stat().st_mtime_ns == before

def test_best_that_is_no_folder_of_weights(undisturbed, tmp_path):
    "Refused before anything is written"
    for name in ('best', 'best/model.safetensors'):
        out = shutil.copytree(undisturbed, tmp_path / name.replace('/', '_'))
        if name == 'best':
            shutil.rmtree(out / name)
            (out / name).write_text('a file')
        else:
            (out / name).unlink()
            (out / name).mkdir()
        with pytest.raises(ValueError, match='best is not a folder of weights'):
            toy_train(out, replace(OPTIONS, epochs=4))

def test_metrics_of_another_shape(tmp_path):
    "Lines that are no metrics are left out"
    line = b'{"step": 3, "epoch": 0, "split": "train"}\n'
    (tmp_path / 'metrics.jsonl').write_bytes(line + b'\xff\xfe' + line)
    assert read_metrics(tmp_path) == [json.loads(line)]
    (tmp_path / 'metrics.jsonl').write_text(
        '[]\n3\nnull\n{}\n{"step": "1"}\n' + line.decode() + line.decode()[:-9]
    )
    assert read_metrics(tmp_path) == [json.loads(line)]

@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.safetensors'])
def test_weights_run_no_code(name, tmp_path):
    "Pickled weights are refused, by their own name and in disguise"
    folder = tmp_path / 'weights'
    DRAW(CONFIG).save_pretrained(folder)
    (folder / 'model.safetensors').unlink()
    torch.save(Malicious(tmp_path / 'owned'), folder / name)
    with pytest.raises(ValueError) as caught: DRAW.from_pretrained(folder)
    assert '\n' not in str(caught.value)
    # where the Hub's loader would go
    with pytest.raises(ValueError, match='pickle'):
        DRAW._load_as_pickle(DRAW(CONFIG), str(folder / name), 'cpu', True)
    assert not (tmp_path / 'owned').exists()


# ---- runs that go on

def test_growth_goes_on_inside_every_stage(tmp_path):
    "Stopped in the first, second and last stage of a growing number of steps"
    options = replace(OPTIONS, growth=((1, 1), (2, 1)))
    toy_train(tmp_path / 'whole', options)
    for batches, saved in ((5, 4), (6, 8), (7, 12), (2, 12)):
        with pytest.raises(InterruptedError): toy_train(tmp_path / 'run', options, batches)
        assert updates_saved(tmp_path / 'run') == saved
    toy_train(tmp_path / 'run', options)
    assert_same(tmp_path / 'run', tmp_path / 'whole')
    rows = read_metrics(tmp_path / 'run')
    assert [row['glimpses'] for row in rows if row['split'] == 'valid'] == [1, 2, 3]
    assert [row['glimpses'] for row in rows if row['split'] == 'train'] == 6 * [1] + 6 * [2] + 6 * [
        3
    ]

def test_validation_of_a_stage(tmp_path):
    """While the number of steps grows, averaged weights are validated with the steps of their
    stage, on as many images as asked for"""
    options = replace(OPTIONS, growth=((1, 2),), valid_images=5)
    with pytest.raises(InterruptedError): toy_train(tmp_path / 'run', options, batches=6)
    model = DRAW(CONFIG)
    averaged = {
        key.removeprefix('module.'): value
        for key, value in load_file(tmp_path / 'run/state-00000006/averaged.safetensors').items()
        if key != 'n_averaged'
    }
    model.load_state_dict(averaged)
    best = load_file(tmp_path / 'run/best/model.safetensors')
    # these are kept, not the weights that go on learning
    assert all(torch.equal(best[key], averaged[key]) for key in averaged)
    row = next(row for row in read_metrics(tmp_path / 'run') if row['split'] == 'valid')
    here, full = (
        evaluate(model, toy_images('valid'), glimpses=glimpses, limit=5).bound
        for glimpses in (1, 3)
    )
    assert math.isclose(row['bound'], here, rel_tol=1e-6) and not math.isclose(
        here, full, rel_tol=1e-3
    )

def test_best_weights_are_those_of_the_last_stage(tmp_path):
    """Bounds of different numbers of steps are not compared: the best of the last stage is kept,
    even if an earlier stage was lower"""
    class Scripted(training.Task):
        def validate(self, model, data, glimpses, limit):
            return super().validate(model, data, glimpses, limit) | {'bound': next(scores)}
    for kept, scores in ((3, (5, 9, 7, 8)), (4, (5, 9, 9, 7)), (2, (5, 7, 8, 9))):
        scores, out = iter(scores), tmp_path / str(kept)
        train(
            CONFIG, toy_images(), toy_images('valid'), out,
            replace(OPTIONS, epochs=4, growth=((1, 1),)), Scripted(),
        )
        assert json.loads((out / 'best/training.json').read_text())['epochs'] == kept

def test_a_run_that_ends_while_another_begins(tmp_path, monkeypatch):
    "What counts is what lies in the folder once it is locked"
    toy_train(tmp_path / 'first', replace(OPTIONS, seed=1))
    def late(out, accelerator):
        shutil.copytree(tmp_path / 'first', out, dirs_exist_ok=True)
        return take_lock(out, accelerator)
    take_lock = training.take_lock
    monkeypatch.setattr(training, 'take_lock', late)
    with pytest.raises(ValueError, match='options.seed 1 there, 0 here'):
        toy_train(tmp_path / 'run')
    assert json.loads((tmp_path / 'run/run.json').read_text())['options']['seed'] == 1

def test_weights_of_another_run(tmp_path):
    """They are the start and nothing else: used twice, they give the same run twice, and that run
    goes on as any other does, but not with other weights or with none"""
    out, images = tmp_path / 'run', toy_images(kind=Failing)
    for name, seed in (('first', 0), ('other', 1)): toy_train(tmp_path / name,
                                                              replace(OPTIONS, seed=seed))
    kept = load_file(tmp_path / 'first/best/model.safetensors')
    shutil.copytree(tmp_path / 'first', tmp_path / 'kept')
    task = training.FineTuneTask(tmp_path / 'first')
    def tune(out, task, left=10**9):
        images.left = left
        return train(CONFIG, images, toy_images('valid'), out, OPTIONS, task)
    begun = task.start(CONFIG, images).state_dict()
    assert all(torch.equal(begun[name], kept[name]) for name in kept)
    tune(tmp_path / 'whole', task)
    with pytest.raises(InterruptedError): tune(out, task, left=9)
    tune(out, task)
    assert_same(out, tmp_path / 'whole')
    fresh = load_file(tmp_path / 'first/best/model.safetensors')
    assert all(torch.equal(fresh[name], kept[name]) for name in kept)
    shutil.copytree(tmp_path / 'other', tmp_path / 'first', dirs_exist_ok=True)
    for other, told in ((training.FineTuneTask(tmp_path / 'first'), 'task.start_checksum'),
                        (training.FineTuneTask(tmp_path / 'other'), 'task.start_checksum'),
                        (training.Task(), 'task.kind')):
        with pytest.raises(ValueError, match=told): tune(out, other)
    for spelled in (f'{tmp_path}/moved/', tmp_path / 'other/../moved/best'):
        shutil.copytree(tmp_path / 'kept', tmp_path / 'moved', dirs_exist_ok=True)
        tune(out, training.FineTuneTask(spelled)) # the same weights, wherever they are now
    described = json.loads((out / 'run.json').read_text())
    del described['task'] # as in a run from before tasks were written down
    (out / 'run.json').write_text(json.dumps(described))
    with pytest.raises(ValueError, match='start_checksum None there'): tune(out, task)

@pytest.mark.parametrize('changes', [dict(hidden_size=9), dict(latent_size=2), dict(read_size=3),
                                     dict(layer_norm=True), dict(glimpses=5)], ids=str)
def test_weights_that_do_not_fit(changes, tmp_path):
    "Only the number of steps may be another; else nothing is written"
    toy_train(tmp_path / 'run')
    task, config = training.FineTuneTask(tmp_path / 'run'), replace(CONFIG, **changes)
    out, (name,) = tmp_path / 'new', changes
    def tune(): return train(config, toy_images(), toy_images('valid'), out, OPTIONS, task)
    if name == 'glimpses': assert tune().config == config
    else:
        with pytest.raises(ValueError, match=f'run has {name} '): tune()
        assert not out.exists()

MUON = replace(OPTIONS, optimizer='muon', decay=0.5, clip_norm=None)

def test_muon_goes_on(start, tmp_path):
    """Killed again and again, a run with two optimisers ends with the same weights and averages,
    bit for bit; and it is not a run with Adam"""
    out = tmp_path / 'run'
    toy_train(tmp_path / 'whole', MUON)
    for die_at in (30, 45, 60):
        assert finish(start(out, options=MUON, die_at=die_at)) == [-signal.SIGKILL]
    assert 0 < updates_saved(out) < LAST
    assert finish(start(out, options=MUON)) == [0]
    assert_same(out, tmp_path / 'whole')
    shapes = [
        [tuple(v.shape) for v in torch.load(file, weights_only=True)['state'][0].values()]
        for file in sorted(out.glob('state-*/optimizer*.bin'))
    ]
    # Adam has c_0 first, Muon the encoder's gates
    assert shapes == [[(), (2, 5, 7), (2, 5, 7)], [(32, 8 * 2 * 4 // 2 // 2 + 16)]]
    with pytest.raises(ValueError, match='options.optimizer muon there, adam here'):
        toy_train(out, replace(MUON, optimizer='adam'))

def test_muon_in_two_processes(start, tmp_path):
    """Two processes that are killed and go on do what they would have done undisturbed, and what
    one process does"""
    whole, out = tmp_path / 'whole', tmp_path / 'run'
    assert finish(
        *(start(whole, options=MUON, environment=environment) for environment in ranks(free_port()))
    ) == [0, 0]
    first, second = [
        start(out, options=MUON, environment=environment, die_at=None if rank else 45)
        for rank, environment in enumerate(ranks(free_port()))
    ]
    finish(first)
    second.terminate()
    finish(second)
    assert 0 < updates_saved(out) < LAST
    assert finish(
        *(start(out, options=MUON, environment=environment) for environment in ranks(free_port()))
    ) == [0, 0]
    assert_same(out, whole)
    toy_train(tmp_path / 'one', MUON)
    a, b = (
        load_file(next(folder.glob('state-*')) / 'model.safetensors')
        for folder in (whole, tmp_path / 'one')
    )
    # rounding to bfloat16 makes a little of nothing
    for name in b: torch.testing.assert_close(a[name], b[name], rtol=0.05, atol=3e-3)

def test_two_steps_by_hand(tmp_path):
    """The loop's own part of two updates against Adam and Muon written out: seed, rate, clipping,
    both optimisers, the average, and what is logged of a batch"""
    options = replace(
        OPTIONS, epochs=1, rate_warmup=3, kl_warmup=2, clip_norm=0.5, average=0.9, save_every=1,
        decay=0.5, seed=5,
    )
    for name in ('adam', 'muon'):
        with pytest.raises(InterruptedError):
            toy_train(tmp_path / name, replace(options, optimizer=name), batches=2)
        torch.manual_seed(options.seed)
        model = DRAW(CONFIG).start_from(toy_images().mean())
        first, average, moments = (
            {k: v.detach().clone() for k, v in model.named_parameters()}, {}, {},
        )
        order = torch.randperm(24, generator=training.generator_for(5, 0, 0))
        rows = read_metrics(tmp_path / name)
        assert len(rows) == 2
        for step, row in enumerate(rows):
            random = training.generator_for(5, 1, step)
            images = toy_images().batch(order[4 * step:4 * step + 4], random)
            output = model(images, torch.randn(3, 4, 3, generator=random))
            parts = training.bound(output, images, model.likelihood)
            model.zero_grad()
            (parts.reconstruction + (0.5, 1)[step] * parts.latent).mean().backward()
            length = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
            assert length > 0.5
            lr = 0.01 * (1 / 3, 2 / 3)[step]
            logged = dict(
                step=step + 1, epoch=0, glimpses=3, bound=parts.total.mean().item(),
                reconstruction=parts.reconstruction.mean().item(),
                latent=parts.latent.mean().item(), kl_weight=(0.5, 1)[step],
                gradient_norm=length.item(), learning_rate=lr,
            )
            assert {key: row[key] for key in logged} == pytest.approx(logged, rel=1e-3)
            for key, p in model.named_parameters():
                g, stacked = p.grad * (0.5 / length), {
                    'encoder.gates.weight': 4, 'decoder.gates.weight': 4, 'posterior.weight': 2,
                }.get(key)
                if name == 'muon' and stacked:
                    m = moments[key] = 0.95 * moments.get(key, 0) + 0.05 * g
                    change = torch.cat(
                        [
                            0.2 * max(part.shape) ** 0.5 * orthogonalize(part[None])[0]
                            for part in (0.05 * g + 0.95 * m).chunk(stacked)
                        ]
                    )
                else:
                    m, v = moments.get(key, (0, 0))
                    m, v = moments[key] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    change = (
                        m
                        / (1 - 0.9 ** (step + 1))
                        / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                    )
                with torch.no_grad(): p -= lr * change
                average[key] = (
                    p.detach().clone()
                    if step == 0
                    else average[key] + (1 - 2 / 11) * (p.detach() - average[key])
                )
        saved, averaged = (
            load_file(tmp_path / name / f'state-00000002/{file}.safetensors')
            for file in ('model', 'averaged')
        )
        for key in first:
            torch.testing.assert_close(saved[key], model.state_dict()[key], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                averaged[f'module.{key}'], average[key], rtol=1e-3, atol=1e-5
            )
            assert (saved[key] - first[key]).abs().max() > 1e-3, key

def test_segments(tmp_path):
    """What a run was made with: one segment where nothing changes, another from the update on
    where something does; what left no update is not kept"""
    def segments(): return json.loads((tmp_path / 'run/run.json').read_text())['segments']
    with pytest.raises(InterruptedError): toy_train(tmp_path / 'run', batches=9)
    with pytest.raises(InterruptedError): toy_train(tmp_path / 'run', batches=2)
    assert [(s['from_step'], s['epochs'], s['precision'], s['processes']) for s in segments()] == [
        (0, 3, 'no', 1)
    ]
    toy_train(tmp_path / 'run', replace(OPTIONS, epochs=4))
    assert [(s['from_step'], s['epochs']) for s in segments()] == [(0, 3), (8, 4)]
    with pytest.raises(InterruptedError):
        toy_train(tmp_path / 'run', replace(OPTIONS, epochs=6), batches=3)
    assert [(s['from_step'], s['epochs']) for s in segments()] == [(0, 3), (8, 4), (24, 6)]
    with pytest.raises(InterruptedError):
        toy_train(tmp_path / 'run', replace(OPTIONS, epochs=7), batches=0)
    # six epochs left no saved update
    assert [(s['from_step'], s['epochs']) for s in segments()] == [(0, 3), (8, 4), (24, 7)]
    assert (
        json.loads((tmp_path / 'run/best/training.json').read_text())['segments'][:2]
        == segments()[:2]
    )
    rates = [
        row['learning_rate'] for row in read_metrics(tmp_path / 'run') if row['split'] == 'train'
    ]
    # as the optimiser had them
    assert rates[8] == training.learning_rate(OPTIONS, 8, 24) and rates[
        7
    ] == training.learning_rate(OPTIONS, 7, 18)

def test_runs_of_before_the_segments(tmp_path):
    "A run.json without segments, and without options that are younger than it, goes on"
    with pytest.raises(InterruptedError): toy_train(tmp_path / 'run', batches=9)
    file = tmp_path / 'run/run.json'
    run = json.loads(file.read_text())
    del run['segments']
    for name in ('optimizer', 'decay', 'every_glimpse'): del run['options'][name]
    file.write_text(json.dumps(run))
    toy_train(tmp_path / 'run')
    toy_train(tmp_path / 'whole')
    assert_same(tmp_path / 'run', tmp_path / 'whole')
    assert [s['from_step'] for s in json.loads(file.read_text())['segments']] == [0, 8]

def test_no_clipping(tmp_path):
    """Without a limit the gradient is left as it is; with a small one Adam's first update is the
    same, as it has no length, and the later ones are not"""
    for name, limit in (('none', None), ('large', 1e6), ('small', 1e-3)):
        toy_train(tmp_path / name, replace(OPTIONS, clip_norm=limit))
    assert_same(tmp_path / 'none', tmp_path / 'large')
    assert outcome(tmp_path / 'small')['weights'] != outcome(tmp_path / 'none')['weights']

def test_more_epochs_before_the_rate_falls(tmp_path):
    "While the rate is constant, a run does not depend on its length"
    options = replace(OPTIONS, decay=0.25)
    toy_train(tmp_path / 'long', replace(options, epochs=4))
    with pytest.raises(InterruptedError): toy_train(tmp_path / 'run', options, batches=9)
    toy_train(tmp_path / 'run', replace(options, epochs=4))
    assert_same(tmp_path / 'run', tmp_path / 'long')

def test_fewer_epochs_before_the_rate_falls(tmp_path):
    "A run that is made shorter before its rate has fallen is the run that was always so short"
    options = replace(OPTIONS, decay=0.4)
    with pytest.raises(InterruptedError):
        toy_train(tmp_path / 'run', replace(options, epochs=9), batches=8)
    toy_train(tmp_path / 'run', options)
    toy_train(tmp_path / 'short', options)
    assert_same(tmp_path / 'run', tmp_path / 'short')
    with pytest.raises(ValueError, match='would have fallen by now'):
        toy_train(tmp_path / 'run', replace(options, epochs=2))

def test_more_epochs(tmp_path, undisturbed):
    "A finished run ends at once when it is started again, and goes on when it is given more epochs"
    shutil.copytree(undisturbed, tmp_path / 'run')
    toy_train(tmp_path / 'run', batches=0)
    assert_same(tmp_path / 'run', undisturbed)
    toy_train(tmp_path / 'run', replace(OPTIONS, epochs=5), batches=12)
    rows = read_metrics(tmp_path / 'run')
    assert [row['step'] for row in rows if row['split'] == 'train'] == list(range(1, LAST + 13))
    assert [row['epoch'] for row in rows if row['split'] == 'valid'] == [0, 1, 2, 3, 4]
    assert timeless(rows[0]) == outcome(undisturbed)['metrics'][0]
    assert [p.name for p in (tmp_path / 'run').glob('state-*')] == ['state-00000030']
    assert json.loads((tmp_path / 'run/run.json').read_text())['options']['epochs'] == 5

def test_packaged_weights_go_on(tmp_path, undisturbed, monkeypatch):
    """tools/unpack.py makes a run of packaged weights, which goes on after their epoch with more
    epochs"""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / 'tools')
    import unpack
    monkeypatch.setattr(unpack, 'PRETRAINED', tmp_path / 'pretrained')
    packaged = shutil.copytree(undisturbed / 'best', tmp_path / 'pretrained/toy')
    history = json.loads((packaged / 'training.json').read_text())
    (packaged / 'training.json').write_text(
        json.dumps({**history, 'half_precision': {'used': False}})
    )
    shutil.copy(undisturbed / 'metrics.jsonl', packaged)
    monkeypatch.setattr(
        unpack.DRAW, 'from_pretrained',
        partial(lambda load, name: load(packaged), DRAW.from_pretrained),
    )

    unpack.unpack('toy', tmp_path / 'run')
    unpacked, weights = outcome(tmp_path / 'run'), load_file(packaged / 'model.safetensors')
    assert unpacked['state'] == f'state-{6 * history["epochs"]:08d}' and unpacked['moments'] == []
    for name, prefix in (('model', ''), ('averaged', 'module.')):
        state = load_file(tmp_path / 'run' / unpacked['state'] / f'{name}.safetensors')
        assert all(torch.equal(state[prefix + key], value) for key, value in weights.items())
    with pytest.raises(ValueError, match='exists'): unpack.unpack('toy', tmp_path / 'run')

    toy_train(tmp_path / 'run', replace(OPTIONS, epochs=5))
    rows = read_metrics(tmp_path / 'run')
    assert [row['step'] for row in rows if row['split'] == 'train'] == list(range(1, 31))
    assert [timeless(row) for row in rows if row['epoch'] < history['epochs']] == [
        row for row in outcome(undisturbed)['metrics'] if row['epoch'] < history['epochs']
    ]
    assert json.loads((tmp_path / 'run/run.json').read_text())['options']['epochs'] == 5

def test_best_weights_are_those_of_the_best_bound(tmp_path):
    """Validation images that look otherwise get worse while the training images are learned: the
    first epoch is kept"""
    pixels = torch.zeros(8, 2, 5, 7, dtype=torch.uint8)
    pixels[..., ::2] = 1
    valid_set = Images(pixels, 'toy', 'valid', levels=1)
    model = train(
        CONFIG, toy_images(), valid_set, tmp_path / 'run',
        replace(OPTIONS, learning_rate=0.05, average=0.0),
    )
    bounds = [row['bound'] for row in read_metrics(tmp_path / 'run') if row['split'] == 'valid']
    assert min(bounds) < bounds[-1]
    assert math.isclose(evaluate(model, valid_set).bound, min(bounds), rel_tol=1e-6)

@pytest.mark.parametrize(
    'different, named',
    [
        (
            partial(toy_train, options=replace(OPTIONS, learning_rate=0.02)),
            'options.learning_rate 0.01 there, 0.02 here',
        ),
        (partial(toy_train, options=replace(OPTIONS, seed=1)), 'options.seed 0 there, 1 here'),
        (partial(toy_train, options=replace(OPTIONS, growth=((1, 1),))), 'options.growth'),
        (partial(toy_train, options=replace(OPTIONS, epochs=2)), 'at least as many as before, 3'),
        (
            partial(toy_train, config=replace(CONFIG, hidden_size=9)),
            'config.hidden_size 8 there, 9 here',
        ),
        (
            lambda out: train(CONFIG, toy_images('valid'), toy_images('valid'), out, OPTIONS),
            'data.train',
        ),
        (lambda out: train(CONFIG, toy_images(), toy_images(), out, OPTIONS), 'data.valid'),
    ],
    ids=[
        'rate', 'seed', 'growth', 'fewer epochs', 'network', 'training images', 'validation images',
    ],
)
def test_other_settings_are_refused(different, named, undisturbed, tmp_path):
    "In one line that names what differs, without touching the run"
    shutil.copytree(undisturbed, tmp_path / 'run')
    def times(): # of everything but the lock, which is taken to look
        files = (tmp_path / 'run').rglob('*')
        return {p: p.stat().st_mtime_ns for p in files if p.name != 'run.lock'}
    before = times()
    with pytest.raises(ValueError) as caught: different(tmp_path / 'run')
    assert (
        named in str(caught.value)
        and '--out' in str(caught.value)
        and '\n' not in str(caught.value)
    )
    assert times() == before

def test_other_files_are_no_damage(undisturbed, tmp_path):
    "What a file manager or a notebook leaves in the folders of a run"
    run = shutil.copytree(undisturbed, tmp_path / 'run')
    state = next(run.glob('state-*'))
    (state / '.DS_Store').write_bytes(b'here')
    for place in (state, run / 'best'): (place / '.ipynb_checkpoints').mkdir()
    toy_train(run)
    toy_train(run, replace(OPTIONS, epochs=4))
    assert max(row['epoch'] for row in read_metrics(run)) == 3

def test_validation_is_reported_as_it_comes(tmp_path):
    "Row by row, as it is written; after a stop those that are there come first"
    seen = []
    def report(row):
        seen.append(row)
        assert read_metrics(tmp_path / 'run')[-1] == row or stopped
        if len(seen) == 2 and not stopped: raise InterruptedError
    stopped = False
    run = partial(train, CONFIG, toy_images(), toy_images('valid'), tmp_path / 'run', OPTIONS)
    with pytest.raises(InterruptedError): run(report=report)
    assert [row['epoch'] for row in seen] == [0, 1]
    stopped, kept = True, seen[:1]
    seen.clear()
    run(report=report)
    rows = [row for row in read_metrics(tmp_path / 'run') if row['split'] == 'valid']
    assert seen == rows and seen[0] == kept[0] and len(seen) == OPTIONS.epochs

def test_a_run_that_left_nothing_is_no_obstacle(tmp_path):
    "Options that failed before the first state can be put right in the same folder"
    with pytest.raises(InterruptedError):
        toy_train(tmp_path / 'run', replace(OPTIONS, learning_rate=0.5), batches=2)
    toy_train(tmp_path / 'run')
    toy_train(tmp_path / 'whole')
    assert_same(tmp_path / 'run', tmp_path / 'whole')

def test_folders_that_are_no_runs_are_left_alone(tmp_path):
    "Somebody's files, a file where a folder should be, and a run.json that is damaged"
    (tmp_path / 'letters').mkdir()
    (tmp_path / 'letters/dear.txt').write_text('Dear')
    (tmp_path / 'file').write_text('text')
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged/run.json').write_text('{"config": ')
    for name in ('letters', 'file', 'damaged'):
        with pytest.raises(ValueError, match='--out') as caught: toy_train(tmp_path / name)
        assert '\n' not in str(caught.value)
    assert (tmp_path / 'letters/dear.txt').read_text() == 'Dear' and len(
        list((tmp_path / 'letters').iterdir())
    ) == 1


# ---- precision, curves, learning

def test_bfloat16(start, undisturbed, tmp_path):
    """The first updates in mixed precision are finite and close to those in float32; a process
    of its own, since Accelerate allows one precision in each"""
    out = tmp_path / 'run'
    assert finish(start(out, options=replace(OPTIONS, precision='bf16', epochs=1))) == [0]
    half, full = ([row['bound'] for row in read_metrics(folder)] for folder in (out, undisturbed))
    assert (
        all(map(math.isfinite, half))
        and math.isclose(half[0], full[0], rel_tol=0.01)
        and half[0] != full[0]
    )
    assert all(
        value.dtype == torch.float32 for value in load_file(out / 'best/model.safetensors').values()
    )

def test_tensorboard_has_every_point(undisturbed):
    "The curves are complete when the process has ended"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(undisturbed / 'tensorboard')).Reload()
    assert [point.step for point in events.Scalars('train/bound')] == list(range(1, LAST + 1))
    assert [point.step for point in events.Scalars('valid/bound')] == [6, 12, 18]

def test_learning(tmp_path):
    """Two images, each seen many times: the network learns to tell them apart, and no bound
    falls below the log 2 that this takes"""
    pair = torch.rand(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    images = [
        Images(pair.repeat(count, 1, 1, 1).to(torch.uint8), 'pair', split, levels=1)
        for split, count in (('train', 400), ('valid', 50))
    ]
    options = replace(
        OPTIONS, epochs=3, batch_size=8, log_every=50, save_every=1000, learning_rate=0.03,
        kl_warmup=50, average=0.9,
    )
    train(replace(CONFIG, hidden_size=16, latent_size=2), *images, tmp_path / 'run', options)
    bounds = [row['bound'] for row in read_metrics(tmp_path / 'run') if row['split'] == 'valid']
    # without latents, each pixel that differs costs log 2
    assert (
        math.log(2)
        < bounds[-1]
        < 4
        < 20
        < sum(p[0] != p[1] for p in pair.flatten(1).T) * math.log(2)
    )


if __name__ == '__main__':
    child(Path(sys.argv[1]))
    sys.stdout.write(f'{PartialState().process_index}/{PartialState().num_processes}\n')

def test_a_loss_after_every_glimpse_is_the_tasks(tmp_path):
    "Options that the task does not heed are refused"
    options = replace(OPTIONS, every_glimpse=True)
    with pytest.raises(ValueError, match='every_glimpse is True in the options and False in Task'):
        toy_train(tmp_path / 'run', options)
    assert not (tmp_path / 'run').exists()

def test_no_thread_is_left_behind(tmp_path):
    "Nor an open file, whether the run ends or fails"
    toy_train(tmp_path / 'first', replace(OPTIONS, epochs=1)) # starts what stays
    gc.collect() # what earlier tests have left
    before, files = {*threading.enumerate()}, psutil.Process().num_fds()
    toy_train(tmp_path / 'whole', replace(OPTIONS, epochs=1))
    with pytest.raises(InterruptedError): toy_train(tmp_path / 'cut', batches=2)
    assert {*threading.enumerate()} <= before and psutil.Process().num_fds() <= files

def test_a_folder_that_cannot_be_named(tmp_path):
    with pytest.raises(ValueError, match='not UTF-8: choose another --out'):
        toy_train(tmp_path / os.fsdecode(b'\xff'))
    assert not list(tmp_path.iterdir())
