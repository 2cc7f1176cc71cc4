"""`draw train` that is the first of several processes: progress, errors, Ctrl-C, kill and
resuming behave as with one"""
import json, os, re, shutil, signal, socket, subprocess, sys, time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from draw_nbdev import runs
from draw_nbdev.checkpoints import read_metrics
from draw_nbdev.runs import check_agreement

pytestmark = pytest.mark.skipif(
    shutil.which('ps') is None, reason='no ps here, which finds processes that were left behind'
)
# what the command `draw` does, and how its other processes can be told
START = 'from draw_nbdev.cli import main; main()'
EPOCHS = 24 # Long enough to be stopped on a busy machine

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with forty small images"
    folder = tmp_path_factory.mktemp('processes')
    (folder / 'mine').mkdir()
    chance = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray((chance.random((6, 9)) * 255).astype(np.uint8)).save(
            folder / f'mine/{i:02}.png'
        )
    return folder

def draw(folder, out, epochs, processes=2, start=('-c', START), **environment):
    "Start the command in a session of its own, as a shell would"
    line = (
        'train mnist --images mine --glimpses 2 --hidden-size 8 --latent-size 2 --read-size 1 '
        f'--batch-size 4 --save-every 3 --out {out} --epochs {epochs} --processes {processes}'
    )
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), **environment}
    return subprocess.Popen(
        [sys.executable, *start, *line.split()], cwd=folder, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=heed_interrupts,
    )

def heed_interrupts():
    "As in a terminal, also where these tests run in the background, which ignores Ctrl-C"
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def end(process, seconds=120):
    "Its exit code and what it said, once it and all of its processes have ended"
    said, _ = process.communicate(timeout=seconds)
    late = time.monotonic() + 20
    while others(process) and time.monotonic() < late: time.sleep(0.1)
    assert not others(process), 'a process was left behind'
    return process.returncode, said

def others(process):
    "Processes of the command's session beside the first"
    listed = subprocess.run(
        ['ps', '-o', 'pid=', '-s', str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in listed if int(pid) != process.pid]

def until(condition, seconds=60):
    "Wait for something"
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late, 'it never came'
        time.sleep(0.02)

def steps(folder, out): return max((row['step'] for row in read_metrics(folder / out)), default=0)

def weights(folder, out):
    return load_file(next((folder / out).glob('state-*')) / 'model.safetensors')

@pytest.fixture(scope='module')
def whole(folder):
    "A run of two processes that nothing happened to, and what it said"
    code, said = end(draw(folder, 'whole', EPOCHS))
    assert code == 0
    return said

def test_two_processes_speak_as_one(folder, whole):
    "Every line comes once; one process alone learns the same, and says the same but for its number"
    code, alone = end(draw(folder, 'alone', EPOCHS, processes=1))
    assert code == 0 and 'Warning' not in whole
    lines = [
        [
            re.sub(r'whole|alone|\d+\.\d+ ?nats.*|.*updates.*|PROCESSES', '', line)
            for line in said.splitlines()
        ]
        for said in (whole, alone)
    ]
    assert [line for line in lines[0] if line] == [line for line in lines[1] if line]
    runs = [
        json.loads((folder / out / 'run.json').read_text())['segments']
        for out in ('whole', 'alone')
    ]
    assert [[segment['processes'] for segment in segments] for segments in runs] == [[2], [1]]
    for a, b in zip(
        weights(folder, 'whole').values(), weights(folder, 'alone').values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.05, atol=5e-3)

@pytest.mark.parametrize('what', ['interrupt', 'terminate', 'kill', 'kill the other'])
def test_stopped_and_started_again(what, folder, whole):
    """Ctrl-C, a polite signal, a rude one, and the death of the other process: one line or none,
    nothing left behind, and the same end"""
    out = what.replace(' ', '_')
    process = draw(folder, out, EPOCHS)
    until(lambda: steps(folder, out) >= 10)
    if what == 'interrupt': os.killpg(process.pid, signal.SIGINT) # the terminal sends it to all
    elif what == 'terminate': process.terminate()
    elif what == 'kill': process.kill()
    else: os.kill(max(others(process)), signal.SIGKILL)
    code, said = end(process)
    last = said.splitlines()[-1]
    if what in ('interrupt', 'terminate'):
        assert code == 130, said
        assert re.search(r'the same command goes on .* after update [1-9]', last)
    elif what == 'kill': assert code == -signal.SIGKILL
    else: assert code == 2 and last.startswith('draw: process 2 of 2 has ended (signal SIGKILL)')
    assert 'Traceback' not in said
    assert end(draw(folder, out, EPOCHS))[0] == 0
    for a, b in zip(weights(folder, out).values(), weights(folder, 'whole').values(), strict=True):
        assert torch.equal(a, b)

def test_killed_before_they_meet(folder):
    "The other process does not wait for ever for one that has gone"
    process = draw(folder, 'early', EPOCHS)
    until(lambda: others(process))
    process.kill()
    assert end(process)[0] == -signal.SIGKILL # `end` sees whether any is left
    assert not (folder / 'early').exists()

def test_errors_come_once(folder, whole):
    "What is wrong is said in one line by the first process, and nothing is started or written"
    before = sorted(folder.rglob('*'))
    for epochs, processes, expected in (
        (EPOCHS, 3, 'does not divide among 3'), (EPOCHS - 1, 2, 'at least as many as before'),
    ):
        code, said = end(draw(folder, 'whole', epochs, processes))
        assert code == 2 and expected in said.splitlines()[-1] and 'Traceback' not in said
    code, said = end(draw(folder, 'none', 12, RANK='0', WORLD_SIZE='1'))
    assert code == 2 and 'leave --processes out' in said
    assert sorted(folder.rglob('*')) == before

OWN = """
import os
from dataclasses import replace
from torch import distributions, nn
from draw_nbdev.model import PARTS, PRESETS
class Unit(nn.Module):
    def __init__(self, config): super().__init__()
    def forward(self, canvas): return distributions.Normal(canvas, 0.3, validate_args=False)
    def canvas_of(self, mean): return mean
PARTS['likelihood']['unit'] = Unit
PRESETS['mnist'] = replace(PRESETS['mnist'], likelihood_part='unit')
"""

def test_a_script_that_enters_a_part(folder):
    "The other process would not have it, and would train something else without a word"
    (folder / 'mine.py').write_text(f'{OWN}\n{START}\n')
    code, said = end(draw(folder, 'own', 2, start=('mine.py',)))
    assert code == 2 and 'Traceback' not in said
    assert re.search(r'draw: processes of one run differ \(config.likelihood_part unit in the '
                     r'first, None in process 2\): .* --processes 1', said.splitlines()[-1])
    assert not (folder / 'own').exists()
    code, said = end(draw(folder, 'own', 2, processes=1, start=('mine.py',)))
    assert code == 0 and json.loads((folder / 'own/run.json').read_text())['config'][
        'likelihood_part'] == 'unit'

@pytest.mark.parametrize('other, refused', [
    ({'epochs': 3, 'precision': 'no'}, True),
    ({'epochs': 2, 'precision': 'bf16'}, False),
])
def test_processes_agree_on_epochs(other, refused, monkeypatch):
    "A run may go on with more epochs; processes with different ones would wait for each other"
    first, second = ({'config': {}, 'data': {}, 'task': {}, 'options': options}
                     for options in ({'epochs': 2, 'precision': 'no'}, other))
    monkeypatch.setattr(runs, 'gather_object', lambda mine: [first, second])
    said = pytest.raises(ValueError, match='epochs 2 in the first, 3 in process 2')
    with said if refused else nullcontext():
        check_agreement(first, SimpleNamespace(num_processes=2))

SHARED = """
import torch
from torch import distributed, nn
from draw_nbdev.classifier import DifferentiableRAM, RAMConfig, classification_error
from draw_nbdev.data import load
from draw_nbdev.digits import LabelledImages
from draw_nbdev.evaluation import evaluate
from draw_nbdev.model import DRAW, preset
from draw_nbdev.muon import Muon
from draw_nbdev.processes import in_shares

distributed.init_process_group('gloo')
for parts in ([7, 1, 5, 2], [3], []):
    assert in_shares(str, parts, True, 'numbers') == [str(part) for part in parts]
torch.manual_seed(0)
network, digits = DRAW(preset('mnist', glimpses=2, hidden_size=8)), load('mnist_once', 'valid')
for few in (dict(limit=23, rows=5, seeds=2), dict(limit=2)):
    assert evaluate(network, digits, together=True, **few) == evaluate(network, digits, **few)
reader = DifferentiableRAM(RAMConfig(7, 9, glimpses=2, hidden_size=6, read_size=3, classes=3))
pixels, labels = torch.rand(11, 1, 7, 9), torch.arange(11) % 3
seven = LabelledImages(pixels, labels, 'seven', 'valid', 'made up')
for rows in (2, 20):
    together, alone = (classification_error(reader, seven, rows=rows, together=yes)
                       for yes in (True, False))
    assert together == alone

shapes = (8, 5), (4, 9), (2, 3)
weights = [[nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2)]
optimizers = [Muon(list(zip(mine, (4, 2, 1))), lr=0.1, together=together)
              for mine, together in zip(weights, (True, False))]
for step in range(3):
    for mine, other in zip(*weights):
        mine.grad = torch.randn(mine.shape) if len(mine) > 2 or step else None # the last one later
        other.grad = mine.grad
    for optimizer in optimizers: optimizer.step()
for optimizer in optimizers:
    optimizer.zero_grad()
    optimizer.step() # nothing to share
for mine, other in zip(*weights): assert torch.equal(mine, other) and (mine != 1).any()
print('the same')
"""

@pytest.mark.parametrize('count', [2, 3])
def test_shares_make_up_the_whole(count, tmp_path):
    "Bounds, errors and updates of Muon: what processes compute together is what one computes alone"
    (tmp_path / 'shared.py').write_text(SHARED)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1',
        'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port, 'WORLD_SIZE': str(count),
    }
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / 'shared.py'], env={**environment, 'RANK': str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0 and said.endswith('the same\n'), said
    finally:
        for process in started: process.kill()

def test_other_processes_import_what_the_first_does(folder, tmp_path):
    "And nothing from the folder in which the command is called"
    shutil.copytree(folder / 'mine', tmp_path / 'here/mine')
    (tmp_path / 'here/typer.py').write_text('raise ImportError("a foreign file was run")')
    (tmp_path / 'start.py').write_text(START)
    code, said = end(draw(tmp_path / 'here', 'out', 1, start=[tmp_path / 'start.py']))
    assert code == 0 and 'foreign' not in said
