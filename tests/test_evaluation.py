"Evaluation: numbers against NumPy, arguments and devices"
from dataclasses import asdict

import numpy as np
import pytest
import torch

from draw_nbdev.classifier import DifferentiableRAM, RAMConfig
from draw_nbdev.data import Images, RedrawnImages
from draw_nbdev.evaluation import evaluate, nearest_images
from draw_nbdev.loss import importance_weighted_bound, reconstruction_loss
from draw_nbdev.model import DRAW, DRAWConfig


@pytest.fixture
def model():
    """A small network with weights large enough for latents that matter, and every pass through
    it: (images, noise, output)"""
    torch.manual_seed(0)
    network = DRAW(
        DRAWConfig(
            height=4, width=5, glimpses=3, hidden_size=6, latent_size=2, read_size=2, write_size=2
        )
    )
    with torch.no_grad():
        for weight in network.parameters(): weight.normal_(std=.7)
    network.passes = []
    network.register_forward_hook(
        lambda module, given, output: module.passes.append((*given, output))
    )
    return network


@pytest.fixture
def data():
    "Seven images, no two alike: three passes of three rows, the last with a single image"
    return Images(
        torch.rand(7, 1, 4, 5, generator=torch.Generator().manual_seed(1)), 'seven', 'test',
        'made up',
    )


def double(tensor): return tensor.detach().numpy().astype(float)

def losses(images, output):
    "L^x and L^z_t in float64"
    x, canvas, means, deviations = map(
        double, (images, output.canvas, output.means, output.log_deviations)
    )
    probabilities = 1 / (1 + np.exp(-canvas))
    reconstruction = -(x*np.log(probabilities) + (1 - x)*np.log(1 - probabilities)).sum((1, 2, 3))
    return reconstruction, .5*(means**2 + np.exp(2*deviations) - 2*deviations - 1).sum(2)

def log_weights(images, noise, output):
    "log p(x | z) + log p(z) - log q(z | x) in float64, with the densities written out"
    means, deviations, noise = map(double, (output.means, output.log_deviations, noise))
    def log_normal(value, mean, log_deviation):
        return -.5*np.log(2*np.pi) - log_deviation - .5*((value - mean)/np.exp(log_deviation))**2
    z = means + np.exp(deviations)*noise
    return (log_normal(z, 0, 0) - log_normal(z, means, deviations)).sum((0, 2)) - losses(
        images, output
    )[0]


@pytest.mark.parametrize('seeds', [1, 3])
@pytest.mark.parametrize('limit', [None, 5])
def test_parts_and_errors_against_numpy(model, data, seeds, limit):
    """Means over images, whatever the passes; the error over images, not over images times
    seeds; the spread over seeds"""
    result, count = evaluate(model, data, seeds=seeds, limit=limit, rows=3), limit or 7
    assert len(model.passes) == seeds*-(-count//3)
    # in order, each once a seed
    assert torch.equal(
        torch.cat([images for images, *_ in model.passes]),
        data.batch(range(count)).repeat(seeds, 1, 1, 1),
    )
    parts = [losses(images, output) for images, _, output in model.passes]
    reconstruction = np.concatenate([o for o, _ in parts]).reshape(seeds, count)
    per_step = np.concatenate([o for _, o in parts], 1).reshape(3, seeds, count)
    total = reconstruction + per_step.sum(0)
    assert np.isclose(result.bound, total.mean(), rtol=1e-5)
    assert np.isclose(result.reconstruction, reconstruction.mean(), rtol=1e-5) and np.isclose(
        result.latent, per_step.sum(0).mean(), rtol=1e-5
    )
    assert (
        np.allclose(result.kl_per_step, per_step.mean((1, 2)), rtol=1e-5)
        and len(set(result.kl_per_step)) == 3
    )
    assert np.isclose(result.bound_se, total.mean(0).std(ddof=1)/count**.5, rtol=1e-4)
    if seeds == 1: assert result.bound_spread is None
    else: assert np.isclose(result.bound_spread, total.mean(1).std(ddof=1), rtol=1e-4)
    assert (
        result.data, result.split, result.note, result.images, result.glimpses, result.seeds,
    ) == ('seven', 'test', 'made up', count, 3, seeds)
    assert (result.iw_samples, result.iw_bound, result.iw_bound_se) == (None, None, None)


def test_importance_weighted_bound_against_numpy(model, data):
    "L_k = -log mean of exp(log weights): over the samples of each image, then the mean over images"
    result = evaluate(model, data, samples=4, rows=3)
    weights = [[] for _ in data]
    for images, noise, output in model.passes[3:]:   # the first three are those of the bound
        for image, value in zip(images, log_weights(images, noise, output)):
            weights[[torch.equal(image, o) for o in data].index(True)].append(value)
    assert [len(o) for o in weights] == [4] * 7 and all(
        len(images) <= 3 for images, *_ in model.passes
    )
    bounds = np.log(4) - np.logaddexp.reduce(weights, 1)
    assert result.iw_samples == 4 and np.isclose(result.iw_bound, bounds.mean(), rtol=1e-5)
    assert np.isclose(result.iw_bound_se, bounds.std(ddof=1)/7**.5, rtol=1e-4)


def test_the_same_again(model):
    """For sets that draw afresh too, wherever the global stream of chance is; another seed is
    another draw of bits"""
    data = RedrawnImages(
        torch.rand(7, 1, 4, 5, generator=torch.Generator().manual_seed(1)), 'seven', 'test'
    )
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(asdict(evaluate(model, data, seeds=2, samples=2, rows=3)))
    assert results[0] == results[1]
    bits = [images for images, *_ in model.passes[:6]]
    assert not torch.equal(torch.cat(bits[:3]), torch.cat(bits[3:]))


def test_no_two_images_and_seeds_share_noise(model, data):
    with_gradients = []
    model.register_forward_hook(lambda *_: with_gradients.append(torch.is_grad_enabled()))
    evaluate(model, data, seeds=4, rows=1)
    assert len({noise.numpy().tobytes() for _, noise, _ in model.passes}) == len(
        with_gradients
    ) == 28 and not any(with_gradients)


def test_no_two_importance_samples_share_noise(model, data):
    "Neither samples nor images, in whatever pass they are"
    evaluate(model, data, samples=4, rows=3)
    noise = torch.cat([noise for _, noise, _ in model.passes[3:]], 1).unbind(1)
    assert len(noise) == 28 and len({one.numpy().tobytes() for one in noise}) == 28


def test_limit_beyond_the_set_and_fewer_glimpses(model, data):
    assert evaluate(model, data, limit=100) == evaluate(model, data)
    result = evaluate(model, data, glimpses=2, samples=2)
    assert result.glimpses == len(result.kl_per_step) == 2 and {
        len(noise) for _, noise, _ in model.passes[-2:]
    } == {2}


def test_single_image_has_no_error(model, data):
    "One image says nothing about others; its spread over seeds is known all the same"
    result = evaluate(model, data, limit=1, seeds=2, samples=2)
    assert (result.bound_se, result.iw_bound_se) == (None, None) and result.bound_spread > 0


@pytest.mark.parametrize('name', ['glimpses', 'seeds', 'samples', 'limit', 'rows'])
@pytest.mark.parametrize('value', [0, -1])
def test_zero_is_not_the_default(model, data, name, value):
    with pytest.raises(ValueError, match=f'^{name} must be at least 1, not {value}$'):
        evaluate(model, data, **{name: value})
    assert not model.passes


def test_misfits_in_one_line(data):
    "A classifier has no bound; images of another size have no neighbours; bytes have no loss"
    with pytest.raises(TypeError, match='^a DifferentiableRAM draws nothing and has no bound'):
        evaluate(DifferentiableRAM(RAMConfig(height=6, width=6)), data)
    images = data.batch(range(3))
    with pytest.raises(ValueError, match='are not looked for among images of shape'):
        nearest_images(images.transpose(2, 3)[:, :, 1:], data)
    with pytest.raises(ValueError, match='^images are bytes up to 255'):
        reconstruction_loss(torch.zeros(images.shape), torch.full(images.shape, 255).byte())
    bits = torch.ones(images.shape).byte() # which are as good as floats
    losses = reconstruction_loss(torch.zeros(images.shape), bits)
    assert losses.numpy() == pytest.approx(images[0].numel() * np.log(2))

@pytest.mark.parametrize('name', ['samples', 'rows'])
def test_importance_samples_from_one(name):
    "Nothing less, in one line"
    network = DRAW(DRAWConfig(height=6, width=7, glimpses=2, hidden_size=4, latent_size=2))
    with pytest.raises(ValueError, match=f'^{name} must be at least 1, got 0$'):
        importance_weighted_bound(network, torch.zeros(1, 1, 6, 7), **{'samples': 2, name: 0})


class NoDoubles(torch.Tensor):
    "A tensor that refuses float64 until it is on the CPU, as those of Apple's GPUs do"
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_devices_without_float64(model, data, monkeypatch):
    expected = evaluate(model, data, seeds=2, samples=3)
    from draw_nbdev import evaluation
    bound, weighted = evaluation.bound, evaluation.importance_weighted_bound
    monkeypatch.setattr(
        evaluation, 'bound',
        lambda *a: type(o := bound(*a))(*(part.as_subclass(NoDoubles) for part in o)),
    )
    monkeypatch.setattr(
        evaluation, 'importance_weighted_bound', lambda *a: weighted(*a).as_subclass(NoDoubles)
    )
    assert evaluate(model, data, seeds=2, samples=3) == expected


# Nearest images

def reference(queries, data):
    "Index and distance of the nearest image, one query after the other, by differences in float64"
    everything = double(data.pixels)/data.levels
    distances = [np.sqrt(((everything - query)**2).sum((1, 2, 3))) for query in double(queries)]
    return [o.argmin() for o in distances], [o.min() for o in distances]


@pytest.mark.parametrize('rows', [7, 64, 1000])
def test_near_duplicates_are_told_apart(rows):
    """200 bright pictures that differ from one another by two pixels of one step in 8760, looked
    for with another pixel changed"""
    picture = torch.randint(
        100, 255, (1, 3, 54, 54), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    pixels = picture.repeat(200, 1, 1, 1)
    pixels.view(200, -1)[range(200), range(200)] += 1
    queries = pixels.float()/255
    queries.view(200, -1)[:, -1] += 1/255
    index, distance = nearest_images(queries, Images(pixels, 'near', 'train'), rows)
    expected, distances = reference(queries, Images(pixels, 'near', 'train'))
    assert index.tolist() == expected == list(range(200)) and np.allclose(
        distance, distances, rtol=1e-6
    )


def test_the_image_itself_is_at_distance_zero():
    data = Images(
        torch.rand(30, 3, 20, 20, generator=torch.Generator().manual_seed(0)), 'noise', 'train'
    )
    index, distance = nearest_images(data.batch(range(30)), data, rows=8)
    assert index.tolist() == list(range(30)) and distance.tolist() == [0]*30


@pytest.mark.parametrize('rows', [7, 50])
def test_nearest_against_numpy(rows):
    "Queries between the steps of 8 bits too"
    data, queries = (
        torch.rand(50, 3, 6, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    data = Images(data, 'noise', 'train')
    index, distance = nearest_images(queries, data, rows)
    expected, distances = reference(queries, data)
    assert (
        index.tolist() == expected
        and np.allclose(distance, distances, rtol=1e-6)
        and distance.dtype == queries.dtype
    )


def test_of_equal_images_the_first_counts():
    pixels = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    index, _ = nearest_images(pixels[:10], Images(pixels, 'three times', 'train'), rows=10)
    assert index.tolist() == list(range(10))


def test_sets_that_draw_afresh():
    "The distance is that of the draw in which the image was the nearest, which is not drawn again"
    data = RedrawnImages(torch.full((50, 1, 6, 6), .5), 'bits', 'train')
    torch.manual_seed(0)
    index, distance = nearest_images(torch.zeros(4, 1, 6, 6), data, rows=10)
    torch.manual_seed(0)
    ones = torch.cat(
        [data.batch(range(start, start + 10)).flatten(1).sum(1) for start in range(0, 50, 10)]
    )
    assert index.tolist() == [ones.argmin()]*4 and np.allclose(distance, ones.min()**.5)
