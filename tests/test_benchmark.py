"The benchmark: what is counted, timed with a clock that is set by hand, and memory in megabytes"
import copy, os, re, subprocess, sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from draw_nbdev import benchmark as module
from draw_nbdev.benchmark import (
    SCANS, benchmark, compare, floor_step, peak_memory, product_sizes, reference_scan, run_alone,
    training_step,
)
from draw_nbdev.loss import bound
from draw_nbdev.model import DRAW, DRAWConfig, DRAWOutput

SMALL = DRAWConfig(height=5, width=7, channels=3, glimpses=3, hidden_size=6, latent_size=3,
                   read_size=2, write_size=3)
WHOLE = replace(SMALL, attention=False)

@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_sizes_of_the_products(config):
    "As many numbers as there are in the network's matrices; without attention x is read once"
    numbers = sum(p.numel() for p in DRAW(config).parameters() if p.ndim == 2)
    states = 2 * 2 * config.hidden_size # the initial ones are no matrices
    once = 0 if config.attention else 4 * config.hidden_size * 3 * 5 * 7
    assert sum(a * b for a, b in product_sizes(config)) == numbers - states - once

@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_products_alone(config):
    "Two operations a number, image and step, forward, for the inputs and for the weights"
    step = floor_step(config, 4, plain=True)
    with FlopCounterMode(display=False) as counter: step()
    once = 0 if config.attention else 2 * 2 * 4 * 6 * 3 * 5 * 7 * 4 # of x: not for the inputs
    products = sum(a * b for a, b in product_sizes(config))
    assert counter.get_total_flops() == 3 * 2 * products * 4 * config.glimpses + once

def test_every_worker_has_its_share(monkeypatch):
    "Fifty images among three workers: none is lost"
    rows, genuine = [], module.Product
    class Counted(genuine):
        def __call__(self, v):
            rows.append(len(v))
            return super().__call__(v)
    monkeypatch.setattr(module, 'Product', Counted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        floor_step(SMALL, 50, plain=False)()
        assert sum(rows) == 2 * 4 * 3 * 50 and len({*rows}) > 1
    finally: torch.set_num_threads(before)

@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_steps_of_training(config):
    "Each from the gradient of its own loss alone, clipped and given to Adam; three in a row"
    seen = []
    def scan(model, images, noise):
        seen.append((model, copy.deepcopy(model), images, noise))
        return reference_scan(model, images, noise)
    torch.manual_seed(0)
    step = training_step(config, 5, scan)
    for _ in range(3): step()
    assert len(seen) == 3 and len(seen[0][2]) == 5
    model, optimizer = seen[0][1], None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _, before, images, noise in seen:
        for a, b in zip(model.parameters(), before.parameters()): torch.testing.assert_close(a, b)
        output = DRAWOutput(*reference_scan(model, images, noise))
        loss = bound(output, images, model.likelihood).total.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        length = sum(g.square().sum() for g in gradients).sqrt()
        for p, g in zip(model.parameters(), gradients): p.grad = g * min(1, 10 / length)
        optimizer.step()
    after = seen[0][0]
    for a, b in zip(model.parameters(), after.parameters()): torch.testing.assert_close(a, b)

@pytest.fixture
def clock(monkeypatch):
    "Steps that take the time that is written here, after a first one that takes a minute"
    now, built = [0.], []
    times = {'floor': [1, 9, 1], 'products': [2, 2, 2], 'reference': [8, 8, 90],
             'fused': [3, 4, 80], 'bfloat16': [2, 70, 2]}
    def taking(name):
        built.append(name)
        left = iter([60, *times[name]])
        def step(): now[0] += next(left)
        return step
    names = {function: name for name, function in SCANS.items()}
    monkeypatch.setattr(module, 'training_step', lambda c, batch, scan: taking(names[scan]))
    def floor(c, batch, plain): return taking('floor' if plain else 'products')
    monkeypatch.setattr(module, 'floor_step', floor)
    monkeypatch.setattr(module, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    peaks = {'reference': 100., 'fused': 200., 'bfloat16': 300.}
    monkeypatch.setattr(module, 'peak_memory', lambda scans, config, batch: peaks)
    return built

@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_typical_times(clock, config):
    "Medians of what came after the first step, as images a second and as a share of the floor"
    rows = {row['scan']: row for row in compare('toy', config, 50, seconds=200)}
    assert list(rows) == ['floor', 'products', 'reference', 'fused', 'bfloat16']
    expected = {'floor': 50., 'products': 25., 'reference': 6.25, 'fused': 12.5, 'bfloat16': 25.}
    assert {scan: row['images_per_s'] for scan, row in rows.items()} == expected
    assert {scan: row['floor_share'] for scan, row in rows.items()} == {
        scan: value / 50 for scan, value in expected.items()}
    assert [row['peak_mb'] for row in rows.values()] == [None, None, 100., 200., 300.]
    same = dict(preset='toy', attention=config.attention, height=5, width=7, batch=50, glimpses=3,
                threads=torch.get_num_threads())
    for row in rows.values(): assert row.items() >= same.items()

def test_combinations(monkeypatch):
    "Every one of them, with the sizes of its preset and what differs from it"
    seen = []
    def compared(name, config, batch, seconds):
        seen.append((name, config, batch, seconds))
        return [len(seen)]
    monkeypatch.setattr(module, 'compare', compared)
    rows = benchmark(('svhn',), (3, 4), (5,), (True, False), (None, 14), 2.5)
    assert rows == list(range(1, 9))
    assert {(name, seconds) for name, _, _, seconds in seen} == {('svhn', 2.5)}
    found = [(c.attention, c.height, c.width, c.glimpses, batch) for _, c, batch, _ in seen]
    assert found == [(attention, side, side, 5, batch) for attention in (True, False)
                     for side in (54, 14) for batch in (3, 4)]
    assert {(c.channels, c.hidden_size, c.read_size) for _, c, _, _ in seen} == {(3, 800, 12)}

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_of_this_process(monkeypatch):
    "After three steps, in MB, as the system tells it"
    steps = []
    monkeypatch.setattr(module, 'training_step', lambda *given: lambda: steps.append(given))
    ours = run_alone('bfloat16', SMALL, 5)
    assert steps == [(SMALL, 5, SCANS['bfloat16'])] * 3
    kilobytes = int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1])
    assert ours == pytest.approx(kilobytes / 1024, rel=0.02)

@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_memory_of_each_scan(config):
    "Measured in processes of their own: Python with torch in it takes hundreds of MB, not of kB"
    peaks = peak_memory(['fused', 'reference'], config, 2)
    assert list(peaks) == ['fused', 'reference']
    assert all(50 < peak < 3000 for peak in peaks.values())

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_memory_that_cannot_be_measured(tmp_path, monkeypatch):
    "A process that is killed leaves no number, and the others are not waited for; faults are told"
    with pytest.raises(subprocess.CalledProcessError): peak_memory(['nothing'], SMALL, 2)
    (tmp_path / 'sitecustomize.py').write_text(
        'import os\nos.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), 9))')
    path = [str(tmp_path), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, path)))
    assert peak_memory(['fused'], SMALL, 2) == {}
