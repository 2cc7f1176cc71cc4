"""The fused scan computes what the definition does, steps aside, or says in a line that it cannot

`definition` is the loop over `DRAW.steps`. Networks are in float64 where nothing else is said, so
that both agree to rounding far below any mistake.
"""
import threading, time
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode
import draw_nbdev.scan as scan, draw_nbdev.scan_weights as scan_weights
from draw_nbdev.attention import AttentiveRead, AttentiveWrite, WholeRead, WholeWrite
from draw_nbdev.model import DRAW, DRAWConfig, DRAWOutput, LSTMCell

SMALL = DRAWConfig(
    height=5, width=7, channels=3, glimpses=3, hidden_size=6, latent_size=3, read_size=2,
    write_size=3,
)
WHOLE, NORMED = replace(SMALL, attention=False), replace(SMALL, layer_norm=True)

def network(config=SMALL, kind=DRAW, dtype=torch.float64, **options):
    "A network whose every parameter is random, initial states included"
    torch.manual_seed(0)
    model = kind(config, **options).double()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.3)
    return model.to(dtype)

def inputs(batch=2, dtype=torch.float64):
    "Images and noise"
    random = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, 5, 7, generator=random).to(dtype), torch.randn(
        3, batch, 3, generator=random
    ).to(dtype)

def definition(model, x, noise):
    "The loop"
    steps = list(model.steps(x, noise))
    return DRAWOutput(
        steps[-1].canvas, *(torch.stack(values) for values in zip(*(step[:3] for step in steps)))
    )

def loss(output): return sum((value**2).sum() for value in output)

def learned(scan, model, x, noise):
    "Outputs, and gradients of the loss by all parameters"
    output = scan(model, x, noise)
    return [
        *(value.detach() for value in output),
        *torch.autograd.grad(loss(output), list(model.parameters()), materialize_grads=True),
    ]

def forward(model, x, noise): return model(x, noise)

@pytest.fixture
def nothing_kept():
    "Begin and end with no workspaces and no workers"
    scan.release()
    yield
    scan.release()


# ---- networks that the scan does not know

class DoubledRead(AttentiveRead):
    def forward(self, *arguments):
        reading, window = super().forward(*arguments)
        return 2 * reading, window
class DoubledWrite(AttentiveWrite):
    def forward(self, hidden):
        update, window = super().forward(hidden)
        return 2 * update, window
class DoubledWholeRead(WholeRead):
    def forward(self, *arguments): return 2 * super().forward(*arguments)[0], None
class DoubledWholeWrite(WholeWrite):
    def forward(self, hidden): return 2 * super().forward(hidden)[0], None
class DoubledCell(LSTMCell):
    def forward(self, *arguments):
        hidden, cell = super().forward(*arguments)
        return hidden / 2, cell
class DoubledLinear(nn.Linear):
    def forward(self, v): return 2 * super().forward(v)
class OtherSteps(DRAW):
    def steps(self, images, noise): return super().steps(images / 2, noise)
class OtherForward(DRAW):
    def forward(self, images, noise): return super().forward(images, noise)
class OtherStates(DRAW):
    def initial_states(self, count):
        canvas, encoder, decoder = super().initial_states(count)
        return 2 * canvas, encoder, decoder
class OtherTensor(torch.Tensor): pass

def attribute(path, value):
    "Change one attribute of a network"
    *parts, last = path.split('.')
    def change(model):
        setattr(
            model.get_submodule('.'.join(parts)), last, value(model) if callable(value) else value
        )
    return change

def kind(path, cls):
    "Change the class of a part and leave its weights"
    return attribute(f'{path}.__class__', lambda model: cls)

def norm(**options):
    return attribute('decoder.norm', lambda model: nn.LayerNorm(6, **options).double())
def twice(module, arguments, output):
    return tuple(2 * v for v in output) if isinstance(output, tuple) else 2 * output

UNKNOWN = {
    'reading of another class': (SMALL, kind('read', DoubledRead)),
    'writing of another class': (SMALL, kind('write', DoubledWrite)),
    'reading of another class, without attention': (WHOLE, kind('read', DoubledWholeRead)),
    'writing of another class, without attention': (WHOLE, kind('write', DoubledWholeWrite)),
    'encoder of another class': (SMALL, kind('encoder', DoubledCell)),
    'decoder of another class': (SMALL, kind('decoder', DoubledCell)),
    'gates of another class': (SMALL, kind('encoder.gates', DoubledLinear)),
    'window of another class': (SMALL, kind('read.window', DoubledLinear)),
    'patch of another class': (SMALL, kind('write.patch', DoubledLinear)),
    'update of another class': (WHOLE, kind('write.canvas', DoubledLinear)),
    'posterior of another class': (SMALL, kind('posterior', DoubledLinear)),
    'posterior in two layers': (
        SMALL, attribute('posterior', lambda model: nn.Sequential(model.posterior, nn.Tanh())),
    ),
    'posterior without bias': (SMALL, attribute('posterior.bias', None)),
    'attention by the configuration only': (
        WHOLE, lambda model: setattr(model, 'config', replace(WHOLE, attention=True)),
    ),
    'norm with another epsilon': (NORMED, norm(eps=1e-2)),
    'norm without weights': (NORMED, norm(elementwise_affine=False)),
    'norm without bias': (NORMED, norm(bias=False)),
    'norm of another class': (NORMED, attribute('encoder.norm', lambda model: nn.Softplus())),
    'layers shared': (SMALL, attribute('write.window', lambda model: model.read.window)),
    'weight norm': (SMALL, lambda model: parametrizations.weight_norm(model.encoder.gates)),
    'pruned': (SMALL, lambda model: prune.l1_unstructured(model.decoder.gates, 'weight', 0.5)),
    'forward hook': (SMALL, lambda model: model.encoder.register_forward_hook(twice)),
    'hook before forward': (
        SMALL,
        lambda model: model.write.patch.register_forward_pre_hook(
            lambda module, arguments: (2 * arguments[0],)
        ),
    ),
    'backward hook': (
        SMALL,
        lambda model: model.posterior.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(2 * v for v in inputs)
        ),
    ),
    'hook before backward': (
        SMALL,
        lambda model: model.posterior.register_full_backward_pre_hook(
            lambda module, outputs: tuple(2 * v for v in outputs)
        ),
    ),
    'forward of a part replaced': (
        SMALL,
        attribute(
            'posterior.forward', lambda model: lambda v: torch.zeros(len(v), 6).double() + v.sum()
        ),
    ),
    'steps replaced': (
        SMALL,
        attribute(
            'steps', lambda model: lambda images, noise: DRAW.steps(model, images / 2, noise)
        ),
    ),
    'steps of a subclass': (SMALL, kind('', OtherSteps)),
    'forward of a subclass': (SMALL, kind('', OtherForward)),
    'initial states of a subclass': (SMALL, kind('', OtherStates)),
    'parameters of another class': (
        SMALL,
        attribute(
            'posterior.weight',
            lambda model: nn.Parameter(model.posterior.weight.detach().as_subclass(OtherTensor)),
        ),
    ),
}

@pytest.mark.parametrize('name', UNKNOWN)
def test_unknown_network(name, fused_calls):
    "Outputs and gradients are those of the definition"
    config, change = UNKNOWN[name]
    model = network(config)
    change(model)
    for p in model.parameters(): p.requires_grad_()
    for ours, theirs in zip(
        learned(forward, model, *inputs()), learned(definition, model, *inputs())
    ):
        assert torch.equal(ours, theirs)
    assert not fused_calls

def test_hook_on_all_modules(fused_calls):
    "A hook that PyTorch calls for every module is called"
    model, (x, noise) = network(), inputs()
    seen = []
    handle = register_module_forward_hook(
        lambda module, arguments, output: seen.append(type(module))
    )
    try: model(x, noise)
    finally: handle.remove()
    assert seen.count(LSTMCell) == 6 and not fused_calls

@pytest.mark.parametrize('config', [SMALL, WHOLE, NORMED])
def test_known_network(config, fused_calls):
    """What does no harm keeps the scan: hooks on the whole network and on parameters, more
    parts, other defaults, plain tensors as parameters"""
    class More(DRAW):
        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Linear(3, 2)
    model, (x, noise) = network(config, More), inputs()
    model.config = replace(config, glimpses=9)
    model.register_forward_hook(lambda module, arguments, output: None)
    model.posterior.weight.register_hook(lambda gradient: 2 * gradient)
    for ours, theirs in zip(
        learned(forward, model, x, noise), learned(definition, model, x, noise)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.func.functional_call(
        model, {name: p.detach() for name, p in model.named_parameters()}, (nn.Parameter(x), noise)
    )
    assert len(fused_calls) == 2


# ---- passes that somebody watches

def compiled(model, x, noise):
    return torch.compile(model, backend='eager', fullgraph=True)(x, noise)
def exported(model, x, noise): return torch.export.export(model, (x / 2, noise)).module()(x, noise)
def traced(model, x, noise):
    return DRAWOutput(*torch.jit.trace(model, (x / 2, noise), check_trace=False)(x, noise))
def tangents(model, x, noise):
    return torch.func.jvp(lambda x: model(x, noise), (x,), (torch.ones_like(x),))[1]
def gradients(model, x, noise): return [torch.func.grad(lambda x: loss(model(x, noise)))(x)]
def examples(model, x, noise):
    return [
        torch.func.vmap(lambda x, noise: model(x[None], noise[:, None]).canvas, in_dims=(0, 1))(
            x, noise
        )
    ]
def dual_tangents(model, x, noise):
    with forward_ad.dual_level():
        return [
            forward_ad.unpack_dual(value).tangent
            for value in model(forward_ad.make_dual(x, torch.ones_like(x)), noise)
        ]
def operations(model, x, noise):
    with FlopCounterMode(display=False) as counter: model(x, noise)
    return [torch.tensor(counter.get_total_flops())]
def of_another_class(model, x, noise):
    return [value.as_subclass(torch.Tensor) for value in model(x.as_subclass(OtherTensor), noise)]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'watch',
    [
        compiled, exported, traced, tangents, gradients, examples, dual_tangents, operations,
        of_another_class,
    ],
)
def test_watched_pass(watch, fused_calls):
    "Compilers, exporters, tracers and transforms see the definition"
    ours, theirs = (watch(network(**options), *inputs()) for options in ({}, {'scan': 'reference'}))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not fused_calls

def test_float64_under_autocast(fused_calls):
    "Autocast leaves float64 alone, so the scan must not round it"
    model, (x, noise) = network(), inputs()
    with torch.autocast('cpu', torch.bfloat16):
        ours, theirs = model(x, noise), definition(model, x, noise)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.autocast('cpu', torch.bfloat16):
        network(dtype=torch.float32)(*inputs(dtype=torch.float32))
    assert len(fused_calls) == 1


# ---- gradients on and off

@contextmanager
def gradients_off():
    with torch.set_grad_enabled(False): yield

@pytest.mark.parametrize('mode', [torch.no_grad, gradients_off, torch.inference_mode])
def test_without_gradients(mode, nothing_kept, fused_calls):
    "No history, no buffers for a backward pass, the same numbers; afterwards training goes on"
    model, (x, noise) = network(), inputs()
    expected = learned(forward, model, x, noise)
    scan.release()
    with mode():
        output = model(x, noise)
        assert not torch.is_grad_enabled()
        inside = model(*inputs())
    assert (
        not any(value.requires_grad for value in output) and output.canvas.numpy().shape == x.shape
    )
    assert [key[3] for key, _ in scan.Lease.free] == [False]
    for a, b, c in zip(output, inside, expected): assert torch.equal(a, c) and torch.equal(b, c)
    # the buffers of the pass before
    with torch.no_grad(): assert torch.equal(model(x, noise).canvas, output.canvas)
    assert all(map(torch.equal, learned(forward, model, x, noise), expected))
    assert len(fused_calls) == 5

@pytest.mark.parametrize('config', [SMALL, WHOLE, NORMED])
def test_gradients_that_come_in_are_left_alone(config):
    "Nothing that a loss gives, or looks at later, is changed by the backward pass"
    model, (x, noise) = network(config), inputs()
    output = model(x.requires_grad_(), noise)
    given = [torch.rand_like(value) for value in output]
    before = [value.clone() for value in (*output, *given)]
    for value in output: value.retain_grad()
    torch.autograd.backward(list(output), given)
    for a, b in zip((*output, *given), before): assert torch.equal(a, b)
    for a, b in zip(output, given): assert torch.equal(a.grad, b)
    ours, x.grad = x.grad, None
    torch.autograd.backward(list(definition(model, x, noise)), given)
    torch.testing.assert_close(ours, x.grad, rtol=1e-10, atol=1e-10)

@pytest.mark.parametrize('config', [SMALL, WHOLE, NORMED])
def test_many_steps(config):
    "More steps than go into one product of the weights' gradients, by as many images"
    model, random = network(config), torch.Generator().manual_seed(2)
    x = torch.rand(300, 3, 5, 7, generator=random).double() # of which 1024 // 300 steps make one
    noise = torch.randn(8, 300, 3, generator=random).double()
    with threads(1):
        ours, theirs = (learned(run, model, x, noise) for run in (forward, definition))
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_second_derivatives(config):
    "Refused, whatever is derived by whatever; the reference has them"
    x, noise = inputs()
    def penalty(model, by, output):
        (gradient,) = torch.autograd.grad(
            output(model(by if by is x else x, noise)), by, create_graph=True
        )
        return torch.autograd.grad(gradient.pow(2).sum(), by)[0]
    x.requires_grad_()
    model, reference = network(config), network(config, scan='reference')
    def linear(output): return output.canvas.sum() # an incoming gradient without a history
    for output in (linear, loss):
        for by in (
            lambda model: x, lambda model: model.encoder.gates.weight,
            lambda model: model.initial_canvas,
        ):
            with pytest.raises(
                ValueError,
                match='^the fused scan has no second derivatives, which create_graph=True asks '
                "for: use scan='reference'$",
            ):
                penalty(model, by(model), output)
            if output is loss: assert penalty(reference, by(reference), output).abs().sum() > 0
    with pytest.raises(ValueError, match='no second derivatives'):
        torch.autograd.functional.hvp(
            lambda w: loss(torch.func.functional_call(model, {'posterior.weight': w}, (x, noise))),
            model.posterior.weight, model.posterior.weight,
        )


# ---- what is kept

def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith('draw_scan')]
def until(condition):
    end = time.monotonic() + 20
    while not condition():
        time.sleep(0.01)
        assert time.monotonic() < end

@contextmanager
def threads(count):
    "As if torch had so many threads, however many there are in these tests"
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try: yield
    finally: torch.set_num_threads(before)

@pytest.mark.parametrize('config', [SMALL, WHOLE, NORMED])
def test_several_workers(config, nothing_kept):
    "One, two and three workers, with shares of different sizes: the definition's numbers"
    for count, batch in ((1, 17), (2, 33), (3, 50), (3, 53), (2, 35)):
        with threads(count):
            model, data = network(config), inputs(batch)
            assert scan.worker_count(data[0]) == count
            ours = learned(forward, model, *data)
            assert (
                all(map(torch.equal, ours, learned(forward, model, *data)))
                and torch.get_num_threads() == count
            )
            assert {sum(key[2]) for key, _ in scan.Lease.free if len(key[2]) == count} >= {batch}
            for a, b in zip(ours, learned(definition, model, *data)):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    until(lambda: len(workers()) == 3)

def test_release(nothing_kept):
    "One pool of workers, workspaces up to a limit in bytes, and nothing of both after `release`"
    assert not scan.Lease.free
    until(lambda: not workers())
    model = network()
    for count, batch in ((1, 16), (3, 50), (2, 40)):
        with threads(count): learned(forward, model, *inputs(batch))
        until(lambda: len(workers()) == max(count, 3 if batch == 40 else 0))
    assert len(scan.Lease.free) == 3 and scan.Lease.kept() > 0
    tensors = [
        value
        for _, workspaces in scan.Lease.free
        for w in workspaces
        for value in (getattr(w, part.name) for part in fields(w))
        if isinstance(value, torch.Tensor)
    ]
    # counted, not guessed
    assert scan.Lease.kept() > sum(value.element_size() * value.nelement() for value in tensors) / 2
    scan.release()
    assert not scan.Lease.free and scan.Lease.kept() == 0
    until(lambda: not workers())
    learned(forward, model, *inputs(40)) # and all goes on

def test_limit_of_what_is_kept(nothing_kept, monkeypatch):
    """The newest workspaces, as many as the limit has room for; more of them than three if they
    are small"""
    model = network()
    for batch in range(1, 7): learned(forward, model, *inputs(batch))
    sizes = [sum(w.bytes for w in workspaces) for _, workspaces in scan.Lease.free]
    assert len(sizes) == 6
    monkeypatch.setattr(scan.Lease, 'limit', sum(sizes[-2:]))
    learned(forward, model, *inputs(6))
    assert [key[2] for key, _ in scan.Lease.free] == [(5,), (6,)]
    monkeypatch.setattr(scan.Lease, 'limit', 0)
    learned(forward, model, *inputs(6))
    assert not scan.Lease.free


# ---- oneDNN's private operators

@pytest.mark.parametrize(
    'name', ['_linear_pointwise', '_reorder_linear_weight', '_is_mkldnn_bf16_supported']
)
@pytest.mark.parametrize('behaviour', ['raises', 'is gone', 'is something else'])
def test_private_operators_that_changed(name, behaviour, monkeypatch):
    "`torch.mm` in their place, and the same numbers"
    model, data = network(dtype=torch.float32), inputs(20, torch.float32)
    def run(half=False):
        with torch.autocast('cpu', torch.bfloat16) if half else nullcontext():
            return learned(forward, model, *data)
    expected, rounded = run(), run(half=True)
    class Operators:
        def __getattr__(self, asked):
            if asked != name: return getattr(operators, asked)
            if behaviour == 'is gone': raise AttributeError(asked)
            return changed
    def changed(*arguments):
        if behaviour == 'raises': raise TypeError('another signature')
        return arguments[0] * 2 if arguments else False
    operators = torch.ops.mkldnn
    scan_weights.onednn_works.cache_clear()
    try:
        monkeypatch.setattr(torch.ops, 'mkldnn', Operators())
        if name != '_is_mkldnn_bf16_supported': assert not scan_weights.onednn_works(torch.float32)
        assert not scan_weights.onednn_works(torch.bfloat16)
        for a, b in zip(run(), expected): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(run(half=True), rounded):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))
    finally:
        monkeypatch.undo()
        scan_weights.onednn_works.cache_clear()


# ---- numbers of all kinds

@pytest.mark.parametrize(
    'kind', [torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8]
)
@pytest.mark.parametrize('config', [SMALL, WHOLE])
def test_images_of_any_dtype(config, kind):
    "Both scans take them as numbers of the network's own dtype"
    x, noise = inputs()
    x = (x > 0.5).to(kind)
    expected = definition(network(config, dtype=torch.float32), x.float(), noise.float())
    for name in ('fused', 'reference'):
        model = network(config, dtype=torch.float32, scan=name)
        for a, b in zip(model(x, noise), expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        drawing = model.reconstruct(x, noise)
        torch.testing.assert_close(drawing.canvases[-1], expected.canvas, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(dtype):
    "Refused in one line by both scans, and where images are drawn"
    for name in ('fused', 'reference'):
        model = network(dtype=dtype, scan=name)
        given = inputs(dtype=dtype)
        for call in (lambda: model(*given), lambda: model.reconstruct(*given), model.generate):
            with pytest.raises(
                ValueError,
                match=f'^parameters in {dtype} are too coarse for the windows: '
                'keep the network in float32 and use torch.autocast$',
            ):
                call()

@pytest.mark.parametrize('value', [-200., -104., 104., 200.])
@pytest.mark.parametrize('number', range(5))
def test_extreme_windows(number, value):
    "Values and gradients are finite in single precision, and the same in both scans"
    def extreme(dtype, **options):
        model = network(dtype=dtype, **options)
        with torch.no_grad():
            for layer in (model.read.window, model.write.window):
                layer.weight[number], layer.bias[number] = 0, value
        return model
    for name in ('fused', 'reference'):
        assert all(
            v.isfinite().all()
            for v in learned(
                forward, extreme(torch.float32, scan=name), *inputs(dtype=torch.float32)
            )
        )
    ours, theirs = (
        learned(forward, extreme(torch.float64, scan=name), *inputs())
        for name in ('fused', 'reference')
    )
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8 * float(b.abs().max()))

@pytest.mark.parametrize('which', ['forward_pass', 'backward_pass'])
def test_a_pass_that_was_broken_off(which, nothing_kept, monkeypatch):
    "Its workspaces are not used again: a worker may still be writing to them"
    model, go_on, done = network(), threading.Event(), threading.Event()
    learned(forward, model, *inputs(40))
    assert len(scan.Lease.free) == 1
    def slow(*arguments):
        go_on.wait(20)
        done.set()
    def broken_off(function, jobs, count):
        if function is not slow: return in_parallel(function, jobs, count)
        scan.Workers.at_least(1).submit(slow)
        raise KeyboardInterrupt
    in_parallel = scan.in_parallel
    with monkeypatch.context() as patch:
        patch.setattr(scan, which, slow)
        patch.setattr(scan, 'in_parallel', broken_off)
        with pytest.raises(KeyboardInterrupt): learned(forward, model, *inputs(40))
    assert not scan.Lease.free and not done.is_set()
    go_on.set()
    learned(forward, model, *inputs(40))
    assert len(scan.Lease.free) == 1
