"""The widgets' mathematics, in JavaScript, against PyTorch

Node runs what the reader's browser runs. Both sides get the same weights, images and noise."""
import json, shutil, struct, subprocess
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from draw_nbdev.attention import filters, read_patch, write_patch
from draw_nbdev.classifier import DifferentiableRAM, RAMConfig, load_classifier
from draw_nbdev.data_sets import find
from draw_nbdev.demo import ASSETS
from draw_nbdev.digits import cluttered_mnist
from draw_nbdev.filterbank import Window, attention_window, filterbank
from draw_nbdev.loss import bound
from draw_nbdev.loading import PRETRAINED
from draw_nbdev.model import DRAW, DRAWConfig, LSTMCell, stack_windows

ROOT = Path(__file__).parents[1]
NODE = shutil.which('node')
pytestmark = pytest.mark.skipif(NODE is None, reason='no node, which runs the JavaScript')
FIELDS = 'gX', 'gY', 'delta', 'variance', 'gamma'
NETWORKS = sorted(file.parent.name for file in PRETRAINED.glob('*/config.json'))
KINDS = {name: json.loads((PRETRAINED / name / 'config.json').read_text()) for name in NETWORKS}
DRAWING = [name for name, config in KINDS.items() if 'latent_size' in config]
GLIMPSING = [name for name, config in KINDS.items() if {'classes', 'read_size'} <= set(config)]
SMALL = DRAWConfig(height=5, width=7, channels=3, glimpses=3, hidden_size=6, latent_size=4,
                   read_size=2, write_size=3, layer_norm=True)

@pytest.fixture
def node(tmp_path):
    "A function that runs jobs in node and returns what they gave"
    def run(*jobs):
        asked, given = tmp_path / 'jobs.json', tmp_path / 'results.json'
        asked.write_text(json.dumps(jobs), encoding='utf-8')
        command = NODE, ROOT / 'tests' / 'live.mjs', ASSETS, asked, given
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(given.read_text(encoding='utf-8'))
    return run

def numbers(tensor): return tensor.detach().double().flatten().tolist()

def near(found, expected, tolerance=1e-5):
    "Equal to within a tolerance, relative for what is larger than 1"
    found, expected = np.asarray(found, float).ravel(), numbers(expected)
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)

def near_windows(found, windows, tolerance=1e-3):
    "Lists of five numbers, one for each step, against windows of a batch of one"
    if windows is None: assert all(window is None for window in found)
    else: near(found, torch.stack(list(windows), -1)[:, 0], tolerance)

def randomised(network, seed=0):
    "Weights that are all different and not small"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.no_grad():
            for value in network.parameters(): value.copy_(0.5 * torch.randn_like(value))
    return network.eval()

# ---- parts

def test_half_precision(node):
    "Every kind of number: zeros, subnormal, normal, the largest, infinite, none"
    bits = [0, 0x8000, 1, 0x03ff, 0x0400, 0x3c00, 0xc000, 0x7bff, 0x7c00, 0xfc00, 0x7e00, 0x3555]
    expected = np.array(bits, np.uint16).view(np.float16).astype(float)
    found = np.array(node({'name': 'half', 'bits': bits})[0]).astype(float)
    np.testing.assert_array_equal(found, expected)

@pytest.mark.parametrize('N, B, A', [(5, 28, 28), (1, 5, 7), (2, 7, 5), (12, 54, 100)])
def test_window(node, N, B, A):
    "Eqs 21-24, also where a parameter is beyond its limit"
    parameters = torch.tensor([[0.3, -0.7, 0.5, -0.2, 0.1], [2e3, -2e3, 20., 11., -20.]])
    sizes = {'name': 'window', 'N': N, 'B': B, 'A': A}
    found = node(*({**sizes, 'parameters': row} for row in parameters.tolist()))
    near(found, torch.stack(attention_window(parameters, N, B, A), -1))

@pytest.mark.parametrize('g, delta, variance, N, length', [
    (3.2, 1.5, 0.8, 4, 9), (-50, 2, 0.01, 3, 6), (2, 1, 1e6, 1, 5), (4, 30, 1e-6, 5, 1)])
def test_filterbank(node, g, delta, variance, N, length):
    "Eqs 19, 20, 25, 26, also far off the image"
    window = {'g': g, 'delta': delta, 'variance': variance}
    found = node({'name': 'filterbank', **window, 'N': N, 'length': length})[0]
    tensors = (torch.tensor([v], dtype=torch.float64) for v in window.values())
    near(found, filterbank(*tensors, N, length))

def test_read_and_write(node):
    "Eqs 27, 29 in colour, on an image wider than high"
    random = torch.Generator().manual_seed(0)
    B, A, N = 6, 9, 3
    image = torch.rand(1, 3, B, A, generator=random)
    patch = torch.randn(1, 3, N, N, generator=random)
    values = [4.5, 2.5, 1.7, 0.6, 1.9]
    window = Window(*(torch.tensor([v]) for v in values))
    job = {'window': dict(zip(FIELDS, values), N=N), 'B': B, 'A': A}
    read, write = node({'name': 'read', 'image': numbers(image), **job},
                       {'name': 'write', 'patch': numbers(patch), **job})
    banks = filters(window, N, B, A)
    near(read, window.intensity * read_patch(image, *banks))
    near(write, write_patch(patch, *banks) / window.intensity)

@pytest.mark.parametrize('layer_norm', [False, True])
def test_lstm(node, tmp_path, layer_norm):
    "Gates in order, forget gate on the old cell, the norm before the output"
    cell, random = randomised(LSTMCell(3, 5, layer_norm)), torch.Generator().manual_seed(1)
    inputs, hidden, old = (torch.randn(1, size, generator=random) for size in (3, 5, 5))
    weights = tmp_path / 'cell.safetensors'
    save_file({f'cell.{key}': value for key, value in cell.state_dict().items()}, weights)
    sizes = {'weights': str(weights), 'inputs': 3, 'h': 5, 'normalised': layer_norm}
    state = [numbers(hidden), numbers(old)]
    found = node({'name': 'lstm', **sizes, 'input': numbers(inputs), 'state': state})[0]
    near(found, torch.cat(cell(inputs, (hidden, old))))

# ---- whole drawings

def example(model):
    "An image to read: a digit where the network reads grey, else something smooth in colour"
    c = model.config
    if (c.channels, c.height, c.width) == (1, 28, 28): return find('mnist_once', 'test').batch([7])
    rows, columns = torch.linspace(0, 3, c.height).sin(), torch.linspace(0, 5, c.width).cos()
    colours = torch.linspace(0.5, 1, c.channels)
    return (rows[:, None] * columns * colours[:, None, None]).square()[None]

def sample_by_hand(model, noise):
    "Canvases and windows of Eqs 13-16"
    canvas, _, decoder = model.initial_states(1)
    canvases, windows = [canvas], []
    for z in noise:
        decoder = model.decoder(z, decoder)
        update, window = model.write(decoder[0])
        canvases.append(canvases[-1] + update)
        windows.append(window)
    return torch.stack(canvases), stack_windows(windows)

@torch.no_grad()
def check_drawing(node, folder, model, image):
    "Samples and reconstructions of one network, step by step, with the same noise on both sides"
    c = model.config
    random = torch.Generator().manual_seed(3)
    noise = torch.randn(c.glimpses, 1, c.latent_size, generator=random)
    job = {'folder': str(folder), 'noise': numbers(noise)}
    sample, again = node({'name': 'generate', **job},
                         {'name': 'reconstruct', **job, 'image': numbers(image)})
    canvases, windows = sample_by_hand(model, noise)
    assert abs(canvases[-1] - canvases[0]).max() > 0.5 # something was drawn
    near([step['canvas'] for step in sample], canvases, 1e-3)
    near_windows([step['window'] for step in sample[1:]], windows)

    drawing, output, steps = model.reconstruct(image, noise), model(image, noise), again['steps']
    near([step['canvas'] for step in steps], drawing.canvases, 1e-3)
    near_windows([step['write'] for step in steps[1:]], drawing.windows)
    near_windows([step['read'] for step in steps[1:]], drawing.read_windows)
    near([step['mu'] for step in steps[1:]], output.means, 1e-3)
    near([step['logSigma'] for step in steps[1:]], output.log_deviations, 1e-3)
    losses = bound(output, image, model.likelihood)
    near(again['perStep'], losses.per_step, 1e-3)
    for name in ('total', 'reconstruction', 'latent'):
        near([again[name]], getattr(losses, name), 1e-4)

@pytest.mark.parametrize('name', DRAWING)
def test_packaged_drawing(node, name):
    "Canvases within 1e-3 logits at every step, in the half precision of the packaged weights"
    model = DRAW.from_pretrained(name)
    check_drawing(node, PRETRAINED / name, model, example(model))

@pytest.mark.parametrize('attention', [False, True])
def test_any_sizes(node, tmp_path, attention):
    "Three channels, wider than high, layer norm, single precision"
    model = randomised(DRAW(DRAWConfig(**{**vars(SMALL), 'attention': attention})))
    model.save_pretrained(tmp_path / 'small')
    image = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(5))
    check_drawing(node, tmp_path / 'small', model, image)

def check_glimpses(node, folder, model, image):
    "Windows and probabilities after every glimpse"
    with torch.no_grad(): output = model(image)
    found = node({'name': 'classify', 'folder': str(folder), 'image': numbers(image)})[0]
    near([step['probabilities'] for step in found], output.every.softmax(-1), 1e-3)
    near_windows([step['window'] for step in found], output.windows)

@pytest.mark.parametrize('name', GLIMPSING)
def test_packaged_classifier(node, name):
    "A puzzle of the test set"
    image = cluttered_mnist('test').batch([11])
    check_glimpses(node, PRETRAINED / name, load_classifier(name), image)

def test_classifier_of_any_size(node, tmp_path):
    "In colour, wider than high"
    sizes = RAMConfig(height=6, width=9, channels=3, glimpses=3, hidden_size=5, read_size=2,
                      classes=4)
    model = randomised(DifferentiableRAM(sizes))
    model.save_pretrained(tmp_path / 'small')
    image = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(5))
    check_glimpses(node, tmp_path / 'small', model, image)

def test_all_networks_are_checked():
    "Every packaged network but the convolutional one, which has no glimpses"
    assert set(NETWORKS) - set(DRAWING) - set(GLIMPSING) == {'cluttered_convolutional'}

# ---- damaged and foreign weights

def test_damaged_weights(node, tmp_path):
    "One line for each, that names what is wrong"
    model, whole = DRAW(SMALL), dict(DRAW(SMALL).state_dict())
    def folder(name, tensors=whole, data=None, cut=None, **config):
        "A job for a folder whose tensors, bytes or configuration are not as they should be"
        place = tmp_path / name
        model.save_pretrained(place)
        weights, sizes = place / 'model.safetensors', place / 'config.json'
        save_file(tensors, weights)
        weights.write_bytes((data or weights.read_bytes())[:cut])
        sizes.write_text(json.dumps(json.loads(sizes.read_text()) | config))
        return {'name': 'fail', 'folder': str(place)}
    bias = whole['posterior.bias']
    less = {key: value for key, value in whole.items() if key != 'write.patch.bias'}
    cases = [
        (None, folder('whole')),
        ('ends within its first 8 bytes', folder('empty', cut=3)),
        ('ends within its header', folder('head', cut=40)),
        ('the file ends before', folder('tail', cut=-5)),
        ('header is no JSON', folder('text', data=struct.pack('<Q', 4) + b'xxxx')),
        ('is not finite', folder('nan', whole | {'posterior.bias': bias + float('nan')})),
        ('only F16 and F32', folder('double', whole | {'posterior.bias': bias.double()})),
        ('there is no write.patch.bias', folder('less', less)),
        ('nothing takes extra', folder('more', whole | {'extra': torch.zeros(1)})),
        ('posterior.weight is 8 x 6, not 10 x 6', folder('other', latent_size=5)),
        ('hidden_size must be a whole number', folder('config', hidden_size='6')),
        ('no network that draws or glimpses',
         {'name': 'fail', 'folder': str(PRETRAINED / 'cluttered_convolutional')}),
    ]
    for (expected, job), said in zip(cases, node(*(job for _, job in cases))):
        if expected is None: assert said is None, said
        else: assert said and expected in said and '\n' not in said, (job, said)

# ---- chance and puzzles

def test_chance(node):
    "Standard normal numbers that a seed decides"
    seeds = (1, 1, 2)
    first, same, other = map(np.array, node(*({'name': 'normal', 'seed': seed, 'count': 40_001}
                                              for seed in seeds)))
    assert (first == same).all()
    pairs = (first, other), (first[:-1], first[1:]), (first[:-1:2], first[1::2])
    for one, two in pairs: assert abs(np.corrcoef(one, two)[0, 1]) < 0.02
    check_normal(first)

def check_normal(values):
    "Mean, variance and fourth moment of a standard normal"
    for moment, expected, tolerance in ((1, 0, 0.02), (2, 1, 0.04), (4, 3, 0.15)):
        assert abs((values**moment).mean() - expected) < tolerance

def test_blend(node):
    "Between two standard normals there are standard normals, and at the ends the two"
    random = np.random.default_rng(0)
    first, other = random.normal(size=(2, 40_000))
    job = {'name': 'blend', 'a': first.tolist(), 'b': other.tolist()}
    start, half, end = map(np.array, node(*({**job, 'share': share} for share in (0, 0.5, 1))))
    np.testing.assert_allclose(start, first, atol=1e-6)
    np.testing.assert_allclose(end, other, atol=1e-6)
    check_normal(half)

def test_puzzle(node):
    "The digit lies whole somewhere; beside it lie eight crops of others, added and clipped"
    digits = [[grey] * 28 * 28 for grey in (0.1, 0.9, 0.1)] # eight crops do not reach the digit
    job = {'name': 'puzzle', 'digits': digits, 'own': 1, 'side': 28, 'height': 100, 'width': 120}
    for image in node(*({**job, 'seed': seed} for seed in range(5))):
        image = np.array(image).reshape(100, 120)
        assert image.max() <= 1 and (image >= 0.89).sum() == 28 * 28
        rows, columns = np.where(image >= 0.89)
        assert np.ptp(rows) == np.ptp(columns) == 27
        image[rows, columns] = 0
        assert 64 <= (image > 0).sum() <= 8 * 64
        np.testing.assert_allclose(image * 10, (image * 10).round(), atol=1e-5)
