"""Compiled and captured: what a GPU trains with

The steps run as they are written where nothing else is said, since a compiler takes its time. With
a GPU: DRAW_TEST_GPU=1 pytest tests/test_graph.py
"""
import gc, shutil, threading, time, warnings, weakref
from dataclasses import replace
from functools import partial
import pytest
import torch
from draw_nbdev import compiled as module
from draw_nbdev.compiled import can_compile, compiled_scan
from draw_nbdev.graph import Captured, prepared
from draw_nbdev.loss import bound
from draw_nbdev.model import DRAW, DRAWConfig, LSTMCell
from draw_nbdev.scan import fused_scan

SMALL = DRAWConfig(height=5, width=7, channels=3, glimpses=3, hidden_size=6, latent_size=3,
                   read_size=2, write_size=4)
WHOLE = replace(SMALL, attention=False)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(),
                               reason='needs a GPU and DRAW_TEST_GPU=1')

@pytest.fixture
def as_written(monkeypatch): monkeypatch.setattr(module, 'compiled', lambda step: step)

def network(config, dtype=torch.float64, **options):
    "A network whose every parameter is random"
    torch.manual_seed(0)
    model = DRAW(config, **options).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.3)
    return model

def inputs(batch, glimpses, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(glimpses, batch, 3, generator=random).to(dtype)
    return torch.rand(batch, 3, 5, 7, generator=random).to(dtype), noise

def definition(model, x, noise):
    steps = list(model.steps(x, noise))
    return steps[-1].canvas, *(torch.stack(v) for v in zip(*(step[:3] for step in steps)))

def learned(scan, model, x, noise):
    "Outputs, and gradients of a function of all of them by every parameter"
    output = scan(model, x, noise)
    loss = sum((v * torch.linspace(1, 2, v.numel()).view_as(v)).sin().sum() for v in output)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [*(v.detach() for v in output), *gradients]

@pytest.mark.parametrize('batch, glimpses', [(2, 3), (1, 3), (2, 1)])
@pytest.mark.parametrize('config', [SMALL, WHOLE], ids=['attention', 'whole'])
def test_outputs_and_gradients_are_those_of_the_definition(as_written, config, batch, glimpses):
    model, data = network(config), inputs(batch, glimpses)
    torch.testing.assert_close(learned(compiled_scan, model, *data),
                               learned(definition, model, *data))

def test_windows_beyond_their_limits_get_no_gradient(as_written):
    model, data = network(SMALL), inputs(2, 3)
    with torch.no_grad(): model.read.window.bias[3] = model.write.window.bias[3] = 50
    torch.testing.assert_close(learned(compiled_scan, model, *data),
                               learned(definition, model, *data))

@pytest.mark.parametrize('config', [SMALL, WHOLE], ids=['attention', 'whole'])
def test_second_derivatives_are_refused(as_written, config):
    model, (x, noise) = network(config), inputs(2, 3)
    for by in (model.encoder.gates.weight, model.initial_canvas):
        canvas, *_ = compiled_scan(model, x, noise)
        with pytest.raises(ValueError, match='^the compiled scan has no second derivatives'):
            torch.autograd.grad(canvas.sum(), by, create_graph=True)

@pytest.mark.parametrize('config', [SMALL, WHOLE], ids=['attention', 'whole'])
def test_half_precision_as_in_the_fused_scan(as_written, config):
    model, data = network(config, torch.float32), inputs(2, 3, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        half = learned(compiled_scan, model, *data)
        expected = learned(fused_scan, model, *data)
    full = learned(compiled_scan, model, *data)
    for a, b, c in zip(half, expected, full):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()
        assert not torch.equal(a, c)

def test_the_model_takes_it_by_name(as_written, monkeypatch):
    called = []
    def step(function):
        called.append(function)
        return function
    monkeypatch.setattr(module, 'compiled', step)
    model, data = network(SMALL, scan='compiled'), inputs(2, 3)
    model(*data)
    assert len(called) == 3
    with torch.no_grad(): model(*data)
    model(data[0].requires_grad_(), data[1])
    network(replace(SMALL, layer_norm=True), scan='compiled')(*inputs(2, 3))
    assert len(called) == 3 # the fused scan took these
    with pytest.raises(ValueError, match='choose fused, compiled or reference'):
        DRAW(SMALL, scan='other')

def test_layer_norms_of_a_cell_that_was_handed_over(as_written):
    "They are no word of the configuration, and count all the same"
    def normed(c, size): return LSTMCell(size, c.hidden_size, layer_norm=True)
    model, data = network(SMALL, cell=normed), inputs(2, 3)
    assert model.unchanged() and not model.config.layer_norm
    torch.testing.assert_close(learned(compiled_scan, model, *data),
                               learned(definition, model, *data))

def test_backward_pass_inside_autocast(as_written):
    "It is that of the pass forward, whatever surrounds it"
    model, data = network(SMALL, torch.float32), inputs(2, 3, torch.float32)
    outside, inside = (compiled_scan(model, *data)[0] for _ in range(2))
    expected = torch.autograd.grad(outside.sum(), model.encoder.gates.weight)
    with torch.autocast('cpu', torch.bfloat16):
        found = torch.autograd.grad(inside.sum(), model.encoder.gates.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

def test_a_tenth_size_is_compiled_too(monkeypatch):
    "By default the compiler would give up at the ninth"
    graphs = []
    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=count))
    module.compiled.cache_clear()
    try:
        for batch in range(1, 11): compiled_scan(network(WHOLE), *inputs(batch, 1))
    finally: module.compiled.cache_clear()
    assert len(graphs) == 10

def test_a_pass_leaves_nothing_behind(monkeypatch):
    "A node that held what it returned would stay; a captured update would meet it on its stream"
    held = []
    def as_written(step):
        def run(*arguments):
            result = step(*arguments)
            held.extend(weakref.ref(v) for v in result[0])
            return result
        return run
    monkeypatch.setattr(module, 'compiled', as_written)
    model, data = network(SMALL), inputs(2, 3)
    gc.collect()
    gc.disable()
    try:
        output = compiled_scan(model, *data)
        assert len(held) == 18 and any(reference() is not None for reference in held)
        del output
        assert all(reference() is None for reference in held)
    finally: gc.enable()

@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'clang++'))), reason='needs a C++ compiler')
def test_compiled_it_computes_the_same():
    model, data = network(WHOLE, torch.float32), inputs(2, 3, torch.float32)
    torch.testing.assert_close(learned(compiled_scan, model, *data),
                               learned(definition, model, *data), rtol=1e-3, atol=1e-5)

def test_nothing_is_compiled_for_a_processor(): assert not can_compile(torch.device('cpu'))

def test_a_gpu_is_compiled_for_where_there_is_a_compiler(monkeypatch):
    gpu = torch.device('cuda')
    monkeypatch.setattr(module, 'find_spec', lambda name: True)
    monkeypatch.setattr(shutil, 'which', lambda name: name == 'gcc')
    assert can_compile(gpu)
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    assert not can_compile(gpu)

def test_batches_come_in_order_and_one_ahead_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)
    made, main = [], threading.get_ident()
    def make(step):
        made.append((step, threading.get_ident() == main))
        return [torch.tensor(step)]
    for kind, ahead in (('cpu', 0), ('cuda', 1)):
        made.clear()
        given = []
        for step, (number,) in prepared(make, range(2, 6), torch.device(kind)):
            given.append((step, number.item()))
            assert len(made) <= len(given) + ahead
        assert given == [(2, 2), (3, 3), (4, 4), (5, 5)]
        assert [step for step, _ in made] == [2, 3, 4, 5]
        assert all(here == (kind == 'cpu') for _, here in made)
    assert list(prepared(make, range(0), torch.device('cuda'))) == []
    made.clear()
    batches = prepared(make, range(5), torch.device('cuda'))
    next(batches)
    late = time.monotonic() + 60
    while len(made) < 2 and time.monotonic() < late: time.sleep(0.01)
    assert len(made) == 2 # the second without having been asked for
    batches.close()

def learn_with(model):
    def learn(batch, glimpses, weights):
        images, noise = (part.to(model.initial_canvas.device) for part in batch)
        parts = bound(model(images, noise), images, model.likelihood)
        model.zero_grad()
        (parts.reconstruction + weights['kl_weight'] * parts.latent).mean().backward()
        return {'bound': parts.total.detach()}
    return learn

@needs_gpu
@pytest.mark.parametrize('config', [SMALL, WHOLE], ids=['attention', 'whole'])
def test_captured_it_learns_the_same(config):
    "For several batches, weights of the loss and T"
    here = network(config, torch.float32)
    there = network(config, torch.float32, scan='compiled').cuda()
    captured = Captured(learn_with(there))
    for seed, (glimpses, kl) in enumerate([(3, 1.), (3, 0.3), (2, 0.5)]):
        torch.manual_seed(seed)
        batch = [torch.rand(4, 3, 5, 7), torch.randn(glimpses, 4, 3)]
        expected = learn_with(here)(batch, glimpses, {'kl_weight': kl})
        found = captured(batch, glimpses, {'kl_weight': kl})
        torch.testing.assert_close(found['bound'].cpu(), expected['bound'], rtol=1e-4, atol=1e-4)
        for p, q in zip(there.parameters(), here.parameters()):
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-3, atol=1e-4)

@needs_gpu
def test_what_waits_for_a_result_runs_uncaptured():
    model = network(WHOLE, torch.float32).cuda()
    learn = learn_with(model)
    def waits(batch, glimpses, weights):
        values = learn(batch, glimpses, weights)
        assert values['bound'].isfinite().all().item()
        return values
    batch = [torch.rand(4, 3, 5, 7), torch.randn(3, 4, 3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = Captured(waits)(batch, 3, {'kl_weight': 1.})
    assert any('cannot be recorded' in str(warning.message) for warning in caught)
    torch.testing.assert_close(found, learn(batch, 3, {'kl_weight': 1.}))

@needs_gpu
def test_rehearsals_leave_no_trace():
    model = network(WHOLE, torch.float32).cuda()
    learn, calls = learn_with(model), torch.zeros((), device='cuda')
    def counted(batch, glimpses, weights):
        calls.add_(1)
        return learn(batch, glimpses, weights)
    captured = Captured(counted, [calls])
    for glimpses in (3, 3, 2):
        captured([torch.rand(4, 3, 5, 7), torch.randn(glimpses, 4, 3)], glimpses, {'kl_weight': 1.})
    assert calls.item() == 3
