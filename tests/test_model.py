"Fresh networks, drawings and bounds: what the equations leave to us, against numbers written out"
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from draw_nbdev.attention import AttentiveRead, AttentiveWrite
from draw_nbdev.filterbank import attention_window
from draw_nbdev.loss import importance_weighted_bound
from draw_nbdev.model import DRAW, DRAWConfig, LSTMCell, PRESETS, preset

SMALL = DRAWConfig(height=5, width=7, channels=3, glimpses=4, hidden_size=6, latent_size=3,
                   read_size=2, write_size=3)

def random_model(config=SMALL):
    torch.manual_seed(0)
    model = DRAW(config)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.5)
    return model

@pytest.mark.parametrize('B, A, N, deviation', [(40, 61, 4, 3), (40, 61, 1, 9), (61, 40, 4, 3),
                                                (28, 28, 5, 0.15 * 27 / 4), (9, 9, 5, 1)])
def test_first_windows(B, A, N, deviation):
    "In the middle, from edge to edge of the longer side; 0.15 strides wide and at least a pixel"
    for part in (AttentiveRead(B, A, 1, N, 6), AttentiveWrite(B, A, 1, N, 6)):
        with torch.no_grad():
            part.window.weight.zero_()
            part.window.bias[[0, 1, 4]] = 0 # random, and of no matter here
        window = attention_window(part.window(torch.zeros(1, 6)), N, B, A)
        stride = (max(A, B) - 1) / (N - 1) if N > 1 else max(A, B) - 1
        expected = (A + 1) / 2, (B + 1) / 2, stride, max(1, deviation)**2, 1
        np.testing.assert_allclose([v.item() for v in window], expected, rtol=1e-5)

def test_fresh_cells_remember():
    "The forget gate's bias is 1, and no other gate's"
    torch.manual_seed(0)
    i, f, g, o = LSTMCell(50, 40).gates.bias.detach().chunk(4)
    assert f.eq(1).all()
    for gate in (i, g, o): assert gate.abs().max() < 0.2

def test_presets():
    "Table 3, and fields that are set differently"
    rows = {name: (c.glimpses, c.hidden_size, c.latent_size, c.read_size, c.write_size)
            for name, c in PRESETS.items()}
    assert rows['mnist'] == (64, 256, 100, 2, 5) and rows['svhn'] == (32, 800, 100, 12, 12)
    assert rows['cifar10'] == (64, 400, 200, 5, 5)
    assert preset('svhn', glimpses=3, width=9) == replace(PRESETS['svhn'], glimpses=3, width=9)
    for name in ('height', 'glimpses', 'latent_size'):
        with pytest.raises(ValueError, match=f'{name} must be at least 1, got 0'):
            preset('mnist', **{name: 0})

def test_start_from_the_mean_image():
    "c_0 is its logits, kept a hundredth from 0 and 1"
    mean = torch.linspace(0, 1, 105).view(3, 5, 7)
    start = DRAW(SMALL).start_from(mean).initial_canvas
    expected = mean.numpy().clip(0.01, 0.99)
    expected = np.log(expected / (1 - expected))
    np.testing.assert_allclose(start.detach(), expected, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('glimpses', [None, 2])
def test_generation_by_the_generator(glimpses):
    "The generator alone says what is drawn, in as many steps as asked for"
    model, drawings = random_model(), []
    for seed, elsewhere in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(elsewhere)
        drawings.append(model.generate(3, glimpses, torch.Generator().manual_seed(seed)).canvases)
    assert drawings[0].shape == ((glimpses or 4) + 1, 3, 3, 5, 7)
    assert torch.equal(drawings[0], drawings[1]) and not torch.equal(drawings[0], drawings[2])

def test_first_of_a_drawing():
    "Canvases and windows of the same images, at all steps"
    drawing = random_model().reconstruct(torch.rand(5, 3, 5, 7))
    few = drawing.first(2)
    assert torch.equal(few.canvases, drawing.canvases[:, :2])
    for name in ('windows', 'read_windows'):
        for a, b in zip(getattr(few, name), getattr(drawing, name)):
            assert a.shape == (4, 2) and torch.equal(a, b[:, :2])
    assert random_model(replace(SMALL, attention=False)).generate(3).first(2).windows is None

def test_weights_that_do_not_fit(tmp_path):
    "More tensors, fewer tensors, and numbers that are none: refused by their names"
    random_model().save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    held = load_file(file)
    for change, named in (
        (lambda w: w.update(more=torch.zeros(2)), 'do not fit'),
        (lambda w: w.pop('posterior.bias'), 'do not fit'),
        (lambda w: w['posterior.bias'].fill_(float('nan')), 'posterior.bias .* is not finite'),
        (lambda w: w['initial_canvas'].fill_(float('inf')), 'initial_canvas .* is not finite')):
        weights = {name: value.clone() for name, value in held.items()}
        change(weights)
        save_file(weights, file)
        with pytest.raises(ValueError, match=named): DRAW.from_pretrained(tmp_path)
    save_file(held, file)
    assert torch.equal(DRAW.from_pretrained(tmp_path).initial_canvas, held['initial_canvas'])

def test_a_device_that_is_not_there(tmp_path):
    "Not taken for damaged weights"
    DRAW(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='^map_location cuda:9 cannot be used here .'):
        DRAW.from_pretrained(tmp_path, map_location='cuda:9')

@pytest.mark.parametrize('rows', [1000, 5])
@pytest.mark.parametrize('glimpses', [None, 2])
def test_importance_weighted_bound(rows, glimpses):
    "-log of the mean of p(x, z) / q(z | x), image by image, with densities of torch.distributions"
    from torch.distributions import Bernoulli, Normal
    model, x, passes = random_model(), torch.rand(3, 3, 5, 7).round(), []
    model.register_forward_hook(lambda _, given, output: passes.append((*given, output)))
    ours = importance_weighted_bound(model, x, 4, torch.Generator().manual_seed(1), rows, glimpses)
    weights = [[] for _ in x]
    for images, noise, output in passes:
        assert len(noise) == (glimpses or 4) and len(images) <= rows
        q = Normal(output.means, output.log_deviations.exp())
        z = output.latents
        ratio = (Normal(0., 1.).log_prob(z) - q.log_prob(z)).sum((0, 2))
        likelihood = Bernoulli(logits=output.canvas).log_prob(images).sum((1, 2, 3))
        for image, value in zip(images, ratio + likelihood):
            weights[[torch.equal(image, o) for o in x].index(True)].append(value.item())
    assert [len(o) for o in weights] == [4, 4, 4]
    expected = np.log(4) - np.logaddexp.reduce(np.array(weights), 1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)

@pytest.mark.parametrize('mean', [torch.rand(5, 7), torch.rand(1, 5, 7), torch.tensor(0.5),
                                  2 * torch.ones(3, 5, 7), torch.full((3, 5, 7), torch.nan)])
def test_no_mean_image(mean):
    "Another shape would be spread over channels or rows, and bytes would be taken for white"
    with pytest.raises(ValueError): DRAW(SMALL).start_from(mean)

def test_a_config_that_asks_for_much_more_than_there_is(tmp_path):
    "Refused by the shapes in the file of weights, before any memory is taken"
    DRAW(SMALL).save_pretrained(tmp_path)
    file = tmp_path / 'config.json'
    sizes = json.loads(file.read_text())
    for wrong, said in ((500, 'has shape'), (10**7, 'has shape'), (2**30, 'too large'),
                        (2**31, 'below 2'), (10**400, 'below 2')):
        file.write_text(json.dumps({**sizes, 'hidden_size': wrong}))
        with pytest.raises(ValueError, match=said) as caught: DRAW.from_pretrained(tmp_path)
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 500

def test_weights_that_are_no_floats(tmp_path):
    DRAW(SMALL).save_pretrained(tmp_path)
    file, half = tmp_path / 'model.safetensors', load_file(tmp_path / 'model.safetensors')
    save_file({name: value.half() for name, value in half.items()}, file)
    DRAW.from_pretrained(tmp_path)
    for kind in (torch.int8, torch.complex64):
        save_file({name: value.to(kind) for name, value in half.items()}, file)
        with pytest.raises(ValueError, match='is of type'): DRAW.from_pretrained(tmp_path)
