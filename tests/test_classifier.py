"Classifiers against NumPy and loops: glimpses, errors over unequal passes, limited gradients"
from dataclasses import asdict, replace
import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, cross_entropy
from draw_nbdev import classifier
from draw_nbdev.classifier import (
    ClassifyTask, Convolutional, ConvolutionalConfig, DifferentiableRAM,
    RAMConfig, classification_error, limit_growth, train_classifier,
)
from draw_nbdev.digits import LabelledImages
from draw_nbdev.options import TrainOptions
from test_mistakes import assert_close, bank_by_hand, read_by_hand, sigmoid

SMALL = RAMConfig(height=5, width=8, channels=2, glimpses=3, hidden_size=6, read_size=2, classes=4)

def random_network(network=DifferentiableRAM, config=SMALL):
    "In float64, every parameter random"
    torch.manual_seed(0)
    model = network(config).double()
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.5)
    return model

def pictures(count=7, config=SMALL):
    "Images of several classes"
    random, shape = torch.Generator().manual_seed(1), (config.channels, config.height, config.width)
    pixels = torch.rand(count, *shape, generator=random)
    return LabelledImages(pixels, torch.arange(count) % config.classes, 'seven', 'test', 'made up')

def glimpses_by_hand(model, x, T):
    "Logits after each of T glimpses of one image (C, B, A), and the windows' g_X"
    c, w = model.config, {name: v.detach().numpy() for name, v in model.state_dict().items()}
    def affine(layer, v): return w[f'{layer}.weight'] @ v + w[f'{layer}.bias']
    (h, cell), logits, centers = w['initial_state'], [], []
    for _ in range(T):
        window = affine('window', h)
        F_y, F_x, gamma = bank_by_hand(window, c.read_size, c.height, c.width)
        v = np.concatenate([gamma * read_by_hand(x, F_y, F_x).ravel(), h])
        i, f, g, o = np.split(affine('lstm.gates', v), 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(cell)
        logits.append(affine('classes', h))
        centers.append((c.width + 1) / 2 * (window[0] + 1))
    return np.stack(logits), np.stack(centers)

@pytest.mark.parametrize('T', [None, 1, 5])
def test_glimpses(T):
    "Every glimpse of every image, and the class after the last"
    model, x = random_network(), pictures().batch(range(7)).double()
    output = model(x, T)
    for n in range(7):
        logits, centers = glimpses_by_hand(model, x[n].numpy(), T or 3)
        assert_close(output.every[:, n], logits)
        assert_close(output.logits[n], logits[-1])
        assert_close(output.windows.center_x[:, n], centers)

def test_first_window():
    "In the middle of the image, across all of it, filters half as wide as they are apart, gamma e"
    model = DifferentiableRAM(replace(SMALL, height=40, width=61, read_size=4))
    with torch.no_grad(): model.window.weight.zero_()
    window = model(torch.zeros(1, 2, 40, 61), 1).windows
    expected = 31, 20.5, 20, 10**2, np.e
    assert_close(torch.cat([v[0] for v in window]), expected, 1e-5)

def test_convolution():
    "Filters, rectifier, layer, rectifier, layer; on images that are not square"
    config = ConvolutionalConfig(height=13, width=9, channels=2, filters=3, filter_size=4,
                                 filter_stride=2, hidden_size=5, classes=4)
    model = random_network(Convolutional, config)
    x, p = torch.randn(2, 2, 13, 9).double(), dict(model.named_parameters())
    seen = conv2d(x, p['convolution.weight'], p['convolution.bias'], stride=2).clamp(min=0)
    assert seen.shape == (2, 3, 5, 3)
    hidden = (seen.flatten(1) @ p['hidden.weight'].T + p['hidden.bias']).clamp(min=0)
    logits = hidden @ p['classes.weight'].T + p['classes.bias']
    output = model(x)
    assert_close(output.logits, logits.detach().numpy())
    assert torch.equal(output.every, output.logits[None]) and output.windows is None

@pytest.mark.parametrize('limit', [None, 5])
@pytest.mark.parametrize('glimpses', [None, 2])
def test_errors_against_numpy(limit, glimpses):
    "Means over images, whatever the passes: three, three and one, or three and two"
    model, data, count = random_network().float(), pictures(), limit or 7
    result = classification_error(model, data, glimpses, limit, rows=3)
    x, losses, wrong = data.batch(range(count)).double().numpy(), [], []
    for n in range(count):
        logits = glimpses_by_hand(model.double(), x[n], glimpses or 3)[0][-1]
        losses.append(np.log(np.exp(logits).sum()) - logits[n % 4])
        wrong.append(logits.argmax() != n % 4)
    error = np.mean(wrong)
    assert 0 < error < 1
    numbers = asdict(result)
    said = [numbers.pop(name) for name in ('data', 'split', 'note')]
    assert said == ['seven', 'test', 'made up']
    assert numbers == pytest.approx(dict(
        images=count, glimpses=glimpses or 3, error=error, cross_entropy=np.mean(losses),
        error_se=np.sqrt(error * (1 - error) / count)), rel=1e-5)

def test_limit_on_gradients():
    "Each image's gradient at most `limit` times the sum of what the loss has sent so far"
    random = torch.Generator().manual_seed(0)
    sent, back = torch.randn(3, 4, 5, generator=random), torch.randn(3, 4, 10, generator=random)
    back *= torch.tensor([1e-3, 1., 30., 0.])[:, None]
    measure, shorten = limit_growth(2.)
    for t in range(3):
        measure(2 - t, sent[t]) # the last glimpse first
        most = 2 * np.linalg.norm(sent[:t + 1].numpy(), axis=2).sum(0)
        lengths = np.linalg.norm(back[t].numpy(), axis=1)
        factor = [min(1, m / n) if n else 1 for m, n in zip(most, lengths)]
        assert_close(shorten(1 - t, back[t]), back[t].numpy() * np.array(factor)[:, None], 1e-6)

def test_limit_in_the_network():
    "A large one changes nothing; a small one shortens what goes back, not what the loss sends"
    def gradients(limit):
        model = random_network()
        with torch.no_grad(): model.lstm.gates.weight *= 4
        output = model(pictures().batch(range(7)).double(), limit=limit)
        cross_entropy(output.logits, torch.arange(7) % 4).backward()
        return {name: p.grad for name, p in model.named_parameters()}
    free, wide, narrow = gradients(None), gradients(1e9), gradients(1e-3)
    for name in free: torch.testing.assert_close(free[name], wide[name])
    assert torch.equal(free['classes.weight'], narrow['classes.weight'])
    assert narrow['initial_state'].norm() < 0.1 * free['initial_state'].norm()

def test_limit_holds_for_every_pass():
    "A second way back through the same graph is shortened as the first was"
    model = random_network()
    with torch.no_grad(): model.lstm.gates.weight *= 4
    loss = model(pictures().batch(range(7)).double(), limit=1e-3).every.sum()
    one, two = (torch.autograd.grad(loss, model.initial_state, retain_graph=True) for _ in 'ab')
    assert torch.equal(*one, *two) and one[0].norm() > 0

@pytest.mark.parametrize('limit', [0., -1., float('nan')])
def test_no_limit_below_zero(limit):
    "One line, before anything is computed"
    with pytest.raises(ValueError, match='^limit must be above 0, got'):
        random_network()(pictures().batch(range(2)).double(), limit=limit)

def test_limit_of_a_task():
    "A task hands its limit to the network"
    def gradient(limit):
        model, data = random_network(), pictures()
        task = ClassifyTask(DifferentiableRAM, limit=limit)
        task.loss(model, (data.batch(range(7)).double(), data.labels), None)[0].backward()
        return model.initial_state.grad.norm()
    assert gradient(1e-3) < 0.1 * gradient(None) and gradient(1e9) == gradient(None)

@pytest.mark.parametrize('every', [False, True])
def test_loss(every):
    "Of the last glimpse, or the mean over all of them; what is logged is that of the last"
    model, data = random_network(), pictures()
    images, labels = data.batch(range(7)).double(), data.labels
    output = model(images)
    losses = [cross_entropy(logits, labels).item() for logits in output.every]
    loss, logged = ClassifyTask(DifferentiableRAM, every).loss(model, (images, labels), None)
    assert loss.item() == pytest.approx(np.mean(losses) if every else losses[-1])
    assert logged['cross_entropy'].mean().item() == pytest.approx(losses[-1])
    assert torch.equal(logged['error'], (output.every[-1].argmax(1) != labels).double())

def test_share_of_a_batch():
    "Images and classes of one process of two belong together"
    task, data = ClassifyTask(DifferentiableRAM), pictures()
    indices = torch.tensor([6, 2, 5, 1])
    images, labels = task.batch(data, indices, 3, SMALL, None, slice(1, None, 2))
    assert torch.equal(images, data.batch([2, 1])) and labels.tolist() == [2, 1]

@pytest.mark.parametrize('every', [False, True])
@pytest.mark.parametrize('config', [SMALL, ConvolutionalConfig()])
def test_what_is_trained(config, every, monkeypatch):
    "The network of the configuration, with the loss that the options ask for"
    seen = []
    monkeypatch.setattr(classifier, 'train', lambda *arguments: seen.append(arguments))
    options, train_set, valid_set = TrainOptions(every_glimpse=every), pictures(), pictures(3)
    train_classifier(config, train_set, valid_set, 'out', options, print)
    *given, task, report = seen[0]
    assert given == [config, train_set, valid_set, 'out', options] and task.every_glimpse == every
    assert report is print
    assert task.network is (DifferentiableRAM if config is SMALL else Convolutional)

@pytest.mark.parametrize('which', [0, 1])
def test_a_class_too_many_is_refused_before_training(which, tmp_path):
    "In either set, and not only when its image is met"
    sets = [LabelledImages(pictures().pixels.float() / 255, torch.arange(7) % (3 + (k == which)),
                           'seven', split) for k, split in enumerate(('train', 'valid'))]
    options = TrainOptions(epochs=1, batch_size=2)
    with pytest.raises(ValueError, match='class 3 does not fit a network for classes 0 to 2'):
        train_classifier(replace(SMALL, classes=3), *sets, tmp_path / 'run', options)
    assert not (tmp_path / 'run').exists()

def test_misfits_in_one_line():
    "Bytes, too few classes, no rows, what has no labels: refused, in one line each"
    model, data = random_network().float(), pictures()
    with pytest.raises(ValueError, match='^images are bytes up to 255: divide them by 255$'):
        model((255 * data.batch(range(2))).clamp(0, 255).byte())
    few = DifferentiableRAM(replace(model.config, classes=2))
    misfit = '^an image of class 3 does not fit a network for classes 0 to 1'
    with pytest.raises(ValueError, match=misfit): classification_error(few, data)
    task, order = ClassifyTask(DifferentiableRAM), torch.arange(7)
    with pytest.raises(ValueError, match=misfit):
        task.batch(data, order, 3, few.config, None, slice(None))
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f'^rows must be at least 1, not {rows}$'):
            classification_error(model, data, rows=rows)
    with pytest.raises(ValueError, match='^a list says nothing of classes'):
        classification_error(model, [1, 2])
