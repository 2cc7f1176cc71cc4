"""Mistakes found in public implementations of DRAW, and tests that each of them would fail

A number at the end of a docstring is that of a mistake in the list below. References are NumPy,
torch.distributions and torch.nn, never the package itself. `tools/mutate.py` puts every one of
these mistakes into a copy of the package and runs this file.

 1. One noise draw shared by all steps, by the batch or by all dimensions.
 2. KL constant -T/2, or -1/2 at every step.
 3. Filter grid shifted by one stride.
 4. Pixels counted from 0 where Eq. 22 counts from 1.
 5. Exponent squared whole, or without its 1/2, or the variance used as a deviation.
 6. delta divided; a single filter divides by zero.
 7. Filters normalised as a whole; rows of zeros for windows off the image; underflow in half
    precision.
 8. Read and write share one layer.
 9. h_dec missing from the encoder's input.
10. Error image without the sigmoid.
11. gamma multiplied in write, or ignored.
12. F_Y built from mu_X; patches transposed.
13. Sampling that reuses one z; reconstructions shown as samples.
14. Zero instead of learned initial states; an LSTM without tanh on the cell.
15. Selection on the test set; unshuffled training; grey cross-entropy quoted as a likelihood.
16. An extra layer after the canvas.
"""
import inspect, json, tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from torch.distributions import Bernoulli, Normal, kl_divergence as kl_reference
from torch.nn.modules.module import register_module_forward_pre_hook
from draw_nbdev.attention import AttentiveRead, AttentiveWrite, filters, read_patch, write_patch
from draw_nbdev.data import SPLITS, Images, load
from draw_nbdev.evaluation import evaluate
from draw_nbdev.filterbank import attention_window, filterbank
from draw_nbdev.loss import bound, importance_weighted_bound, kl_divergence, reconstruction_loss
from draw_nbdev.model import DRAW, DRAWConfig, LSTMCell
from draw_nbdev.options import TrainOptions
from draw_nbdev.checkpoints import read_metrics
from draw_nbdev.training import train

# Wider than high, in colour, with patches of different sizes: nothing that can be mixed up has the
# same shape
SMALL = DRAWConfig(
    height=5, width=7, channels=3, glimpses=4, hidden_size=6, latent_size=3, read_size=2,
    write_size=3,
)
FEW = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
    phases=[Phase.generate],
)


# ---- references

def filters_by_hand(g, delta, variance, N, length):
    "Eqs 19, 20, 25, 26 for one image and axis, one number at a time"
    F = np.zeros((N, length))
    for i in range(1, N + 1):
        mu = g + (i - N / 2 - 0.5) * delta
        exponents = [-(a - mu)**2 / (2 * variance) for a in range(1, length + 1)]
        # the factor cancels below, and keeps 0/0 away
        for a in range(1, length + 1): F[i - 1, a - 1] = np.exp(exponents[a - 1] - max(exponents))
        F[i - 1] /= sum(F[i - 1])
    return F

def window_by_hand(parameters, N, B, A):
    "Eqs 21-24 for one image: g_X, g_Y, delta, sigma^2, gamma"
    g_x, g_y, log_variance, log_delta, log_gamma = (float(p) for p in parameters)
    delta = (max(A, B) - 1) / (N - 1) * np.exp(log_delta) if N > 1 else 0.
    return (
        (A + 1) / 2 * (g_x + 1), (B + 1) / 2 * (g_y + 1), delta, np.exp(log_variance),
        np.exp(log_gamma),
    )

def bank_by_hand(parameters, N, B, A):
    "Eqs 19-26 for one image: F_Y, F_X, gamma"
    g_x, g_y, delta, variance, gamma = window_by_hand(parameters, N, B, A)
    return (
        filters_by_hand(g_y, delta, variance, N, B), filters_by_hand(g_x, delta, variance, N, A),
        gamma,
    )

def read_by_hand(x, F_y, F_x): return np.einsum('ib,cba,ja->cij', F_y, x, F_x)
def write_by_hand(w, F_y, F_x): return np.einsum('ib,cij,ja->cba', F_y, w, F_x)
def sigmoid(v): return 1 / (1 + np.exp(-v))

def draw_by_hand(model, x, noise):
    "Eqs 3-8 for one image x (C, B, A) and noise (T, d_z): last canvas, means and log deviations"
    c, w = model.config, {
        name: value.detach().numpy() for name, value in model.state_dict().items()
    }
    B, A, C = c.height, c.width, c.channels
    def affine(layer, v): return w[f'{layer}.weight'] @ v + w[f'{layer}.bias']
    def lstm(layer, v, h, cell):
        i, f, g, o = np.split(affine(f'{layer}.gates', np.concatenate([v, h])), 4)
        cell, normed = (sigmoid(f) * cell + sigmoid(i) * np.tanh(g),) * 2
        if c.layer_norm:
            normed = (cell - cell.mean()) / np.sqrt(cell.var() + 1e-5)
            normed = w[f'{layer}.norm.weight'] * normed + w[f'{layer}.norm.bias']
        return sigmoid(o) * np.tanh(normed), cell
    canvas, (h_enc, cell_enc), (h_dec, cell_dec) = (
        w['initial_canvas'], w['initial_encoder'], w['initial_decoder'],
    )
    means, log_deviations = [], []
    for epsilon in noise:
        x_hat = x - sigmoid(canvas)
        if c.attention:
            F_y, F_x, gamma = bank_by_hand(affine('read.window', h_dec), c.read_size, B, A)
            r = np.concatenate([gamma * read_by_hand(v, F_y, F_x).ravel() for v in (x, x_hat)])
        else: r = np.concatenate([x.ravel(), x_hat.ravel()])
        h_enc, cell_enc = lstm('encoder', np.concatenate([r, h_dec]), h_enc, cell_enc)
        mu, log_sigma = np.split(affine('posterior', h_enc), 2)
        h_dec, cell_dec = lstm('decoder', mu + np.exp(log_sigma) * epsilon, h_dec, cell_dec)
        if c.attention:
            F_y, F_x, gamma = bank_by_hand(affine('write.window', h_dec), c.write_size, B, A)
            patch = affine('write.patch', h_dec).reshape(C, c.write_size, c.write_size)
            canvas = canvas + write_by_hand(patch, F_y, F_x) / gamma
        else: canvas = canvas + affine('write.canvas', h_dec).reshape(C, B, A)
        means.append(mu)
        log_deviations.append(log_sigma)
    return canvas, np.stack(means), np.stack(log_deviations)


# ---- what the tests look at

SCANS = 'reference', 'fused' # Both ways to run the recurrence

def random_model(config=SMALL, scan='reference'):
    "A network in float64 whose every parameter is random, initial states included"
    torch.manual_seed(0)
    model = DRAW(config, scan).double()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.3)
    return model

def toy_images(split='train', count=24):
    "Binary noise in colour"
    pixels = (
        torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(SPLITS.index(split)))
        < 0.3
    )
    return Images(pixels.to(torch.uint8), 'toy', split, levels=1)

class Recorded(Images):
    "Images that remember which of them were asked for"
    def batch(self, indices, generator=None):
        self.asked.append(torch.as_tensor(indices).tolist())
        return super().batch(indices, generator)

class Run(NamedTuple):
    "What could be seen of a training run"
    batches: list # Indices of every update's images
    noise: list # Noise of every update, (glimpses, batch, latent_size)
    description: dict # run.json
    metrics: list # Rows of metrics.jsonl
    model: DRAW # What `train` returned

def noise_given_to_networks(function):
    """What `function` returns, and all noise that networks were called with on the way: [(noise,
    whether for learning)]"""
    seen = []
    def hook(module, arguments):
        if isinstance(module, DRAW): seen.append((arguments[1], torch.is_grad_enabled()))
    handle = register_module_forward_pre_hook(hook)
    try: return function(), seen
    finally: handle.remove()

@cache
def toy_run(seed=0):
    "Train a tiny network for 3 epochs of 6 updates"
    images = toy_images()
    recorded = Recorded(images.pixels, images.name, images.split, images.note, images.levels)
    recorded.asked = []
    options = TrainOptions(
        epochs=3, batch_size=4, log_every=1, kl_warmup=0, rate_warmup=0, seed=seed,
        learning_rate=0.01,
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'run'
        model, noise = noise_given_to_networks(
            lambda: train(
                replace(SMALL, glimpses=2), recorded, toy_images('valid', 10), out, options
            )
        )
        return Run(
            [asked for asked in recorded.asked if len(asked) == 4],
            [n for n, learning in noise if learning], json.loads((out / 'run.json').read_text()),
            read_metrics(out), model,
        )

toy_run_again = toy_run.__wrapped__ # not the one that was kept

def assert_all_different(noise):
    "No two images, steps or updates share their noise, nor do the dimensions of one z_t"
    vectors = torch.cat([n.reshape(-1, n.shape[-1]) for n in noise])
    assert len(vectors) > 1 and torch.pdist(vectors).min() > 1e-5
    assert vectors.sort(dim=1).values.diff(dim=1).min() > 1e-5

def assert_close(ours, theirs, tolerance=1e-9):
    np.testing.assert_allclose(
        ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours, theirs, rtol=tolerance,
        atol=tolerance,
    )


# ---- the window

@FEW
@given(
    g=st.floats(-5, 30), delta=st.floats(0.1, 9), variance=st.floats(0.3, 40), N=st.integers(1, 6),
    length=st.integers(2, 20),
)
def test_filters(g, delta, variance, N, length):
    "Filters against the definition in loops (3, 4, 5)"
    ours = filterbank(
        *(torch.tensor([v], dtype=torch.float64) for v in (g, delta, variance)), N, length
    )
    assert_close(ours[0], filters_by_hand(g, delta, variance, N, length))

@FEW
@given(
    g=st.floats(-1e4, 1e4), delta=st.floats(0, 1e3), log_variance=st.floats(-6, 8),
    N=st.integers(1, 6),
)
def test_rows(g, delta, log_variance, N):
    "Every row sums to one and has finite gradients, wherever the window lies (7)"
    parameters = [torch.tensor([v], requires_grad=True) for v in (g, delta, np.exp(log_variance))]
    F = filterbank(*parameters, N, 28)
    assert_close(F.sum(-1), np.ones((1, N)), 1e-5)
    (F * torch.arange(28)).sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters)

def test_window():
    """Eqs 21-24 in closed form, on images that are wider or higher, for patches down to one
    filter (6, 12)"""
    torch.manual_seed(0)
    for N, B, A in [(2, 75, 100), (5, 30, 20), (12, 28, 28), (1, 9, 4)]:
        parameters = torch.randn(6, 5, dtype=torch.float64)
        ours = torch.stack(attention_window(parameters, N, B, A), dim=1)
        assert ours.isfinite().all()
        kept = [0, 1, 2, 3, 4] if N > 1 else [0, 1, 3, 4] # one filter has no distance to another
        assert_close(
            ours[:, kept], np.array([window_by_hand(p, N, B, A) for p in parameters])[:, kept]
        )
        for bank in filters(attention_window(parameters, N, B, A), N, B, A):
            assert_close(bank.sum(-1), np.ones((6, N)))

def test_half_precision():
    """A network in half precision looks through filters in float32: its parameters are rounded,
    nothing after them (7)"""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        parameters = (torch.randn(8, 5) * torch.tensor([1, 1, 2, 1, 1])).to(dtype)
        window = attention_window(parameters, 5, 75, 100)
        for ours, theirs in zip(
            filters(window, 5, 75, 100), zip(*(bank_by_hand(p, 5, 75, 100)[:2] for p in parameters))
        ):
            assert ours.dtype == torch.float32
            assert_close(ours.sum(-1), np.ones((8, 5)), 1e-5)
            assert_close(ours, np.stack(theirs), 1e-3)
    read = AttentiveRead(75, 100, 1, 5, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        _, window = read(torch.rand(2, 1, 75, 100), torch.rand(2, 1, 75, 100), torch.randn(2, 8))
    assert all(value.dtype == torch.float32 for value in window)

def test_patches():
    """Both matrix products against sums over named indices, with filters and patches that have
    no symmetry (12)"""
    torch.manual_seed(0)
    x, w, F_y, F_x = (
        torch.rand(2, *s, dtype=torch.float64) for s in ((3, 4, 6), (3, 3, 3), (3, 4), (3, 6))
    )
    for n in range(2):
        assert_close(
            read_patch(x, F_y, F_x)[n], read_by_hand(x[n].numpy(), F_y[n].numpy(), F_x[n].numpy())
        )
        assert_close(
            write_patch(w, F_y, F_x)[n], write_by_hand(w[n].numpy(), F_y[n].numpy(), F_x[n].numpy())
        )

def test_read_and_write():
    """Eqs 27-29, from the decoder's output to the patch and back, with intensities that are not
    one (11, 12)"""
    for B, A, C, N in [(5, 7, 3, 3), (9, 4, 1, 2), (3, 6, 2, 1)]:
        torch.manual_seed(1)
        read, write = AttentiveRead(B, A, C, N, 6).double(), AttentiveWrite(B, A, C, N, 6).double()
        x, x_hat, h = (
            torch.randn(2, *s, dtype=torch.float64) for s in ((C, B, A), (C, B, A), (6,))
        )
        for n in range(2):
            F_y, F_x, gamma = bank_by_hand(read.window(h[n]).detach(), N, B, A)
            expected = [
                gamma * read_by_hand(source[n].numpy(), F_y, F_x).ravel() for source in (x, x_hat)
            ]
            assert_close(read(x, x_hat, h)[0][n], np.concatenate(expected))
            F_y, F_x, gamma = bank_by_hand(write.window(h[n]).detach(), N, B, A)
            assert_close(
                write(h)[0][n],
                write_by_hand(write.patch(h[n]).detach().numpy().reshape(C, N, N), F_y, F_x)
                / gamma,
            )

def test_windows_are_distinct():
    "Moving the write window leaves the first reading where it was, and the reverse (8)"
    for moved, still in (('write', 'read'), ('read', 'write')):
        drawings = []
        for shift in (0, 1):
            model = random_model()
            with torch.no_grad():
                model.encoder.gates.weight.zero_() # what is read does not reach the decoder here
                getattr(model, moved).window.bias += shift
            drawings.append(
                model.reconstruct(torch.ones(2, 3, 5, 7).double(), torch.zeros(2, 2, 3).double())
            )
        windows = {
            'read': [d.read_windows.center_x for d in drawings],
            'write': [d.windows.center_x for d in drawings],
        }
        assert torch.equal(*windows[still]) and not torch.equal(*windows[moved])


# ---- the network

SMALLEST = DRAWConfig(
    height=3, width=2, channels=1, glimpses=1, hidden_size=2, latent_size=1, read_size=1,
    write_size=1,
)
CONFIGS = {
    'attention': (SMALL, 2), 'none': (replace(SMALL, attention=False), 2),
    'smallest': (SMALLEST, 1), 'layer norm': (replace(SMALL, layer_norm=True), 2),
}

@pytest.mark.parametrize('scan', SCANS)
@pytest.mark.parametrize('name', CONFIGS)
def test_network(name, scan):
    "The recurrence against the equations in NumPy (4, 9, 10, 11, 14, 16)"
    config, count = CONFIGS[name]
    model = random_model(config, scan)
    x = torch.rand(count, config.channels, config.height, config.width).double()
    noise = torch.randn(config.glimpses, count, config.latent_size).double()
    output, drawing = model(x, noise), model.reconstruct(x, noise)
    for n in range(count):
        canvas, means, log_deviations = draw_by_hand(model, x[n].numpy(), noise[:, n].numpy())
        for ours in (output.canvas, drawing.canvases[-1]): assert_close(ours[n], canvas)
        assert_close(output.means[:, n], means)
        assert_close(output.log_deviations[:, n], log_deviations)
        assert_close(output.latents[:, n], means + np.exp(log_deviations) * noise[:, n].numpy())

def test_lstm():
    "Our LSTM against PyTorch's (14)"
    torch.manual_seed(0)
    ours, theirs = LSTMCell(4, 3).double(), torch.nn.LSTMCell(4, 3).double()
    with torch.no_grad():
        theirs.weight_ih.copy_(ours.gates.weight[:, :4])
        theirs.weight_hh.copy_(ours.gates.weight[:, 4:])
        theirs.bias_ih.copy_(ours.gates.bias)
        theirs.bias_hh.zero_()
    v, state = torch.randn(5, 4).double(), (
        torch.randn(5, 3).double(), 3 * torch.randn(5, 3).double(),
    )
    for a, b in zip(ours(v, state), theirs(v, state)): assert_close(a, b.detach().numpy())

def test_initial_states():
    "c_0, h_0 and the cells are weights that the loss reaches, and pictures start from them (14)"
    for scan in SCANS:
        model = random_model(scan=scan)
        x = torch.rand(2, 3, 5, 7).double()
        bound(model(x), x, model.likelihood).total.sum().backward()
        named = dict(model.named_parameters())
        for name in ('initial_canvas', 'initial_encoder', 'initial_decoder'):
            assert (
                name in named
                and named[name].grad is not None
                and (named[name].grad.flatten(1).abs().sum(1) > 0).all()
            ), name
        for drawing in (model.generate(2), model.reconstruct(x)):
            assert_close(drawing.canvases[0], np.stack([model.initial_canvas.detach()] * 2))

def test_picture_is_the_canvas():
    """Nothing comes after the canvas: lifting c_0 lifts a generated picture by the same, and
    there are no weights but those of the equations (16)"""
    model = random_model()
    assert {name.split('.')[0] for name, _ in model.named_parameters()} == {
        'read', 'write', 'encoder', 'posterior', 'decoder', 'initial_canvas', 'initial_encoder',
        'initial_decoder',
    }
    before = model.generate(2, generator=torch.Generator().manual_seed(0)).canvases
    with torch.no_grad(): model.initial_canvas += 1
    assert_close(
        model.generate(2, generator=torch.Generator().manual_seed(0)).canvases, before.numpy() + 1
    )


# ---- generation

def test_generation_draws_afresh():
    """With a decoder that forgets, equal strokes mean equal latents: all must differ, over steps
    and over images (13)"""
    for config in (SMALL, replace(SMALL, attention=False)):
        model, h = random_model(config), config.hidden_size
        with torch.no_grad():
            model.decoder.gates.weight[:, config.latent_size:] = 0 # no way from the last output
            # nor from the last cell
            model.decoder.gates.weight[h:2 * h] = 0
            model.decoder.gates.bias[h:2 * h] = -1e4
        strokes = model.generate(5, glimpses=6).canvases.diff(dim=0)
        assert (
            strokes.shape[:2] == (6, 5)
            and torch.pdist(strokes.flatten(2).flatten(0, 1)).min() > 1e-5
        )

def test_generation_needs_no_images():
    "Other readers and encoders generate the same pictures (13)"
    model = random_model()
    pictures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for part in (model.read, model.encoder, model.posterior):
                for p in part.parameters(): p.copy_(torch.randn_like(p))
        torch.manual_seed(0)
        pictures.append(model.generate(3).canvases)
    assert torch.equal(*pictures)


# ---- the loss

def test_kl():
    "L^z_t against torch.distributions, for each step and summed over steps (2)"
    torch.manual_seed(0)
    for T, d in ((1, 1), (5, 3), (3, 10)):
        means, log_deviations = torch.randn(T, 2, d).double(), torch.randn(T, 2, d).double()
        expected = kl_reference(Normal(means, log_deviations.exp()), Normal(0., 1.)).sum(-1)
        assert_close(kl_divergence(means, log_deviations), expected.numpy())
        assert kl_divergence(0 * means, 0 * means).eq(0).all()

def test_bound():
    "L^x and L are sums over pixels, channels, latents and steps, for each image (2)"
    model, x = random_model(), torch.rand(2, 3, 5, 7).round().double()
    output = model(x)
    likelihood = -Bernoulli(logits=output.canvas).log_prob(x).sum((1, 2, 3))
    latent = kl_reference(Normal(output.means, output.log_deviations.exp()), Normal(0.0, 1.0)).sum(
        (0, 2)
    )
    expected = likelihood + latent, likelihood, latent
    for ours, theirs in zip(bound(output, x, model.likelihood), expected):
        assert_close(ours, theirs.detach().numpy())
    assert_close(reconstruction_loss(output.canvas, x), likelihood.detach().numpy())


# ---- one draw of noise for each step, image and dimension

def test_noise_of_the_network():
    "A network that is called without noise draws it afresh each time (1)"
    x = torch.rand(4, 3, 5, 7).double()
    outputs = [model(x) for model in [random_model(scan=scan) for scan in SCANS] for _ in range(2)]
    assert_all_different(
        [((o.latents - o.means) / o.log_deviations.exp()).detach() for o in outputs]
    )

def test_noise_of_training():
    "No update shares its noise with another (1)"
    noise = toy_run().noise
    assert [n.shape for n in noise] == 18 * [(2, 4, 3)]
    assert_all_different(noise)

def test_noise_of_evaluation():
    "No pass and no seed shares its noise with another (1)"
    model = DRAW(SMALL)
    _, noise = noise_given_to_networks(
        lambda: evaluate(model, toy_images('valid', 10), seeds=2, rows=4)
    )
    assert sum(n.shape[1] for n, _ in noise) == 20
    assert_all_different([n for n, _ in noise])

def test_noise_of_importance_samples():
    "No sample shares its noise with another (1)"
    model, x = DRAW(SMALL), torch.rand(3, 3, 5, 7)
    _, noise = noise_given_to_networks(
        lambda: importance_weighted_bound(model, x, samples=4, rows=5)
    )
    assert sum(n.shape[1] for n, _ in noise) == 12
    assert_all_different([n for n, _ in noise])


# ---- practice

def test_no_test_set():
    """Training is given images to learn from and images to choose by, says so, and chooses by
    these (15)"""
    assert list(inspect.signature(train).parameters) == [
        'config', 'train_set', 'valid_set', 'out', 'options', 'task', 'report',
    ]
    run, valid_set = toy_run(), toy_images('valid', 10)
    assert {k: v for k, v in run.description['data'].items() if k in SPLITS} == {
        'train': toy_images().checksum, 'valid': valid_set.checksum,
    }
    assert {row['split'] for row in run.metrics} == {'train', 'valid'}
    bounds = [row['bound'] for row in run.metrics if row['split'] == 'valid']
    assert len(bounds) == 3 and np.isclose(
        evaluate(run.model, valid_set).bound, min(bounds), rtol=1e-6
    )

def test_shuffling():
    """Every epoch is another order of all images; a seed fixes the orders, and another seed
    gives others (15)"""
    epochs = [
        [sum(batches[e * 6 : e * 6 + 6], []) for e in range(3)]
        for batches in (toy_run().batches, toy_run_again().batches, toy_run(seed=1).batches)
    ]
    for run in epochs:
        assert all(sorted(order) == list(range(24)) for order in run)
        assert list(range(24)) not in run and len({*map(tuple, run)}) == 3
    assert epochs[0] == epochs[1] != epochs[2]

def test_order_is_a_function_of_the_epoch():
    """The order does not depend on random numbers drawn elsewhere, or a run that goes on would
    see other batches (15)"""
    pure = toy_run().batches
    torch_seed = torch.manual_seed
    with pytest.MonkeyPatch.context() as patch:
        # other initial weights, same orders
        patch.setattr(torch, 'manual_seed', lambda seed: torch_seed(seed + 1))
        assert toy_run_again().batches == pure

def test_grey_is_no_likelihood():
    """Grey digits say that their cross-entropy is no likelihood, and every evaluation of them
    repeats it (15)"""
    torch.manual_seed(0)
    model = DRAW(DRAWConfig(glimpses=1, hidden_size=2, latent_size=1))
    for split in SPLITS:
        data = load('mnist_grey', split)
        assert 'not a likelihood' in data.note and evaluate(model, data, limit=2).note == data.note
        assert 'not a likelihood' not in load('mnist_once', split).note
