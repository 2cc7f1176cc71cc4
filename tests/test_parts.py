"""Parts of DRAW can be exchanged, and the fused scan serves only what it knows

`definition` is the loop over `DRAW.steps`. Networks are in float64: equal means equal to rounding.
"""
import json
from dataclasses import asdict, replace
from math import log, pi
from typing import NamedTuple
import pytest
import torch
from PIL import Image
from torch import distributions, nn
from draw_nbdev import cli, plots
from draw_nbdev.attention import AttentiveRead, AttentiveWrite
from draw_nbdev.classifier import NETWORKS, network_class, network_for
from draw_nbdev.data import Images
from draw_nbdev.evaluation import evaluate
from draw_nbdev.loss import bound, importance_weighted_bound, log_weights, reconstruction_loss
from draw_nbdev.loading import PRETRAINED
from draw_nbdev.model import (DRAW, PARTS, Bernoulli, DRAWConfig, DRAWOutput, LSTMCell,
                              attentive_read, attentive_write, lstm, whole_read, whole_write)
from draw_nbdev.options import TrainOptions
from draw_nbdev.training import train

SMALL = DRAWConfig(height=5, width=7, channels=3, glimpses=3, hidden_size=6, latent_size=3,
                   read_size=2, write_size=3)

def randomise(model):
    "Every parameter random, initial states included"
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.3)
    return model.double()

def inputs():
    random = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 5, 7, generator=random).double()
    return images, torch.randn(3, 2, 3, generator=random).double()

def definition(model, x, noise):
    "The loop"
    steps = list(model.steps(x, noise))
    means, deviations, latents = (torch.stack(values) for values in zip(*(s[:3] for s in steps)))
    return DRAWOutput(steps[-1].canvas, means, deviations, latents)

@pytest.fixture
def parts(monkeypatch):
    "`PARTS`, to be written to and put back"
    for kind, named in PARTS.items(): monkeypatch.setitem(PARTS, kind, dict(named))
    return PARTS


# ---- parts of one's own

class DoubledRead(nn.Module):
    "Twice what is read, from a module of no known class"
    def __init__(self, config):
        super().__init__()
        self.inner = attentive_read(config)
        self.features = self.inner.features
    def forward(self, *arguments):
        reading, window = self.inner(*arguments)
        return 2 * reading, window

class DoubledWrite(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.inner = attentive_write(config)
    def forward(self, hidden):
        update, window = self.inner(hidden)
        return 2 * update, window

class Gru(nn.Module):
    def __init__(self, config, input_size):
        super().__init__()
        self.cell = nn.GRUCell(input_size, config.hidden_size)
    def forward(self, inputs, state): return self.cell(inputs, state[0]), state[1]

class Gaussian(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.log_deviation = nn.Parameter(torch.zeros(config.channels, 1, 1))
    def forward(self, canvas): return distributions.Normal(canvas, self.log_deviation.exp())
    def canvas_of(self, mean): return mean

class SubclassedRead(AttentiveRead):
    def forward(self, *arguments):
        reading, window = super().forward(*arguments)
        return reading / 2, window

class SubclassedWrite(AttentiveWrite):
    def forward(self, hidden):
        update, window = super().forward(hidden)
        return update / 2, window

class SubclassedCell(LSTMCell):
    def forward(self, *arguments):
        hidden, cell = super().forward(*arguments)
        return hidden / 2, cell

class Wider(Bernoulli):
    "The canvas counts half"
    def forward(self, canvas): return super().forward(canvas / 2)

def subclassed_read(config): return SubclassedRead(5, 7, 3, config.read_size, config.hidden_size)
def subclassed_write(config): return SubclassedWrite(5, 7, 3, config.write_size, config.hidden_size)
def subclassed_cell(config, input_size): return SubclassedCell(input_size, config.hidden_size)

OTHER = {
    'read': dict(read=DoubledRead), 'write': dict(write=DoubledWrite), 'cell': dict(cell=Gru),
    'likelihood': dict(likelihood=Gaussian), 'subclassed read': dict(read=subclassed_read),
    'subclassed write': dict(write=subclassed_write), 'subclassed cell': dict(cell=subclassed_cell),
    'subclassed likelihood': dict(likelihood=Wider), 'whole read': dict(read=whole_read),
    'whole write': dict(write=whole_write),
    'all': dict(read=DoubledRead, write=DoubledWrite, cell=Gru, likelihood=Gaussian),
}

@pytest.mark.parametrize('name', OTHER)
def test_other_parts(name, fused_calls):
    "Forward, reconstruct and decode run the definition, which the part changes; all of it learns"
    x, noise = inputs()
    model = randomise(DRAW(SMALL, **OTHER[name]))
    output, usual = model(x, noise), randomise(DRAW(SMALL))(x, noise)
    assert len(fused_calls) == 1 # of the usual network
    for ours, theirs in zip(output, definition(model, x, noise)): assert torch.equal(ours, theirs)
    assert not torch.allclose(output.canvas, usual.canvas)
    torch.testing.assert_close(model.reconstruct(x, noise).canvases[-1], output.canvas)
    torch.testing.assert_close(model.decode(output.latents).canvases[-1], output.canvas)
    bound(output, x, model.likelihood).total.sum().backward()
    for part in (model.read, model.write, model.encoder, model.decoder, model.likelihood):
        assert all(p.grad.abs().sum() > 0 for p in part.parameters())

CONFIGS = SMALL, replace(SMALL, attention=False), replace(SMALL, layer_norm=True)

@pytest.mark.parametrize('config', CONFIGS)
def test_known_parts_handed_over(config, fused_calls):
    "The paper's own parts, as objects, factories and names, keep the scan and the weights"
    attentive = config.attention
    read, write = (attentive_read, attentive_write) if attentive else (whole_read, whole_write)
    names = dict(read_part='attentive' if attentive else 'whole', cell_part='lstm',
                 write_part='attentive' if attentive else 'whole', likelihood_part='bernoulli')
    networks = []
    def make(config=config, **options):
        torch.manual_seed(3)
        networks.append(DRAW(config, **options).double())
    make()
    make(replace(config, **names))
    make(read=read, write=write, cell=lstm, likelihood=Bernoulli)
    make(read=read(config), write=write(config), likelihood=Bernoulli())
    networks[-1].load_state_dict(networks[0].state_dict())
    x, noise = inputs()
    first, *others = (model(x, noise) for model in networks)
    assert len(fused_calls) == 4
    for other in others: assert torch.equal(first.canvas, other.canvas)

HOOKED = ['read', 'write', 'encoder', 'decoder', 'posterior', 'likelihood', 'read.window']

@pytest.mark.parametrize('part', HOOKED)
def test_hooks(part, fused_calls):
    "A hook on any part is called in every step"
    model, seen = randomise(DRAW(SMALL)), []
    handle = model.get_submodule(part).register_forward_hook(lambda *_: seen.append(None))
    model(*inputs())
    assert len(seen) == 3 and not fused_calls
    handle.remove()
    model(*inputs())
    assert len(seen) == 3 and len(fused_calls) == 1

class OtherSteps(DRAW):
    def steps(self, images, noise):
        for step in super().steps(images, noise): yield step._replace(canvas=step.canvas + 1)

class OtherForward(DRAW):
    def forward(self, images, noise):
        output = super().forward(images, noise)
        return output._replace(canvas=output.canvas + 1)

@pytest.mark.parametrize('kind', [OtherSteps, OtherForward])
def test_subclasses(kind, fused_calls):
    "What a subclass overrides is what runs"
    usual = randomise(DRAW(SMALL))(*inputs())
    assert len(fused_calls) == 1
    torch.testing.assert_close(randomise(kind(SMALL))(*inputs()).canvas, usual.canvas + 1)
    assert len(fused_calls) == 1

def test_windows_of_another_kind():
    "Whatever named tuple a part returns is stacked over time"
    class Place(NamedTuple):
        left: torch.Tensor
    class Stamp(DoubledWrite):
        def forward(self, hidden): return super().forward(hidden)[0], Place(hidden[:, 0])
    drawing = DRAW(SMALL, write=Stamp).generate(4)
    assert drawing.windows.left.shape == (3, 4)
    assert drawing.first(2).windows.left.shape == (3, 2)
    assert type(drawing.first(2).windows) is Place

def test_one_cell_for_both_is_refused():
    with pytest.raises(ValueError, match='^cell must be a factory: the network needs two of them$'):
        DRAW(SMALL, cell=LSTMCell(3, 6))


# ---- likelihoods

def test_bernoulli_is_the_default():
    "Loss and weights with the network's likelihood are those of the paper, to the last bit"
    x, noise = inputs()
    model = randomise(DRAW(SMALL))
    output = model(x, noise)
    given = reconstruction_loss(output.canvas, x, model.likelihood)
    assert torch.equal(reconstruction_loss(output.canvas, x), given)
    for loss in (bound, log_weights): # forgotten, it would silently be another network's
        with pytest.raises(TypeError, match='likelihood'): loss(output, x)
    mean = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(Bernoulli()(Bernoulli().canvas_of(mean)).mean, mean)

def test_gaussian_by_hand():
    "Error image and loss of another likelihood, against the formula"
    x, noise = inputs()
    model = randomise(DRAW(SMALL, likelihood=Gaussian))
    seen = []
    model.read.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    canvases = [model.initial_canvas, *(step.canvas for step in model.steps(x, noise))]
    assert len(seen) == 3
    for errors, canvas in zip(seen, canvases): torch.testing.assert_close(errors, x - canvas)
    sigma = model.likelihood.log_deviation.exp()
    nats = (x - canvases[-1])**2 / (2 * sigma**2) + sigma.log() + log(2 * pi) / 2
    loss = reconstruction_loss(canvases[-1], x, model.likelihood)
    torch.testing.assert_close(loss, nats.flatten(1).sum(1))
    one = importance_weighted_bound(model, x, 1, torch.Generator().manual_seed(0))
    noise = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(one, -log_weights(model(x, noise), x, model.likelihood))

def test_images_of_canvases(parts, tmp_path):
    "What is looked at is the mean of the network's likelihood, in 0..1; draw generate shows it"
    canvases = 2 * torch.randn(4, 2, 3, 5, 7)
    torch.testing.assert_close(DRAW(SMALL).images(canvases), canvases.sigmoid())
    model = randomise(DRAW(SMALL, likelihood=Gaussian)).float()
    assert torch.equal(model.images(canvases), canvases.clamp(0, 1))
    parts['likelihood']['gaussian'] = Gaussian
    named = DRAW(replace(SMALL, likelihood_part='gaussian'))
    named.load_state_dict(model.state_dict())
    named.save_pretrained(tmp_path / 'network')
    cli.generate_command(str(tmp_path / 'network'), 4, None, tmp_path / 'drawing', 0)
    finished = model.generate(4, None, torch.Generator().manual_seed(0)).canvases[-1]
    expected = plots.image_grid(finished.clamp(0, 1), zoom=2)
    shown = Image.open(tmp_path / 'drawing' / 'samples.png').convert('RGB')
    assert shown.tobytes() == expected.tobytes()

def test_start_of_another_likelihood():
    mean = torch.rand(3, 5, 7)
    canvas = DRAW(SMALL, likelihood=Gaussian).start_from(mean).initial_canvas
    torch.testing.assert_close(canvas.detach(), mean.clamp(0.01, 0.99))

def test_training_and_evaluation(parts, tmp_path):
    "A run with named parts minimises their bound, chooses by it, and is loaded with them"
    parts['likelihood']['gaussian'], parts['cell']['gru'] = Gaussian, Gru
    images = torch.rand(40, 3, 5, 7, generator=torch.Generator().manual_seed(0)) / 2
    data = {split: Images(images, 'toy', split) for split in ('train', 'valid')}
    config = replace(SMALL, likelihood_part='gaussian', cell_part='gru')
    for optimizer in ('adam', 'muon'):
        options = TrainOptions(epochs=2, batch_size=10, learning_rate=0.05, kl_warmup=0,
                               rate_warmup=0, optimizer=optimizer)
        model = train(config, data['train'], data['valid'], tmp_path / optimizer, options)
        assert type(model.likelihood) is Gaussian and type(model.encoder) is Gru
    result = evaluate(model, data['valid'])
    lines = (tmp_path / 'muon/metrics.jsonl').read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row['split'] == 'valid']
    assert result.bound == min(row['bound'] for row in rows)
    assert rows[-1]['bound'] < rows[0]['bound']
    noise = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0))
    x = data['valid'].batch(range(40))
    with torch.no_grad(): parts = bound(model(x, noise), x, model.likelihood)
    assert result.reconstruction == pytest.approx(parts.reconstruction.mean().item(), rel=1e-5)


# ---- saving and loading

def test_named_parts_are_saved(parts, tmp_path):
    parts['read']['doubled'], parts['likelihood']['gaussian'] = DoubledRead, Gaussian
    model = DRAW(replace(SMALL, read_part='doubled', likelihood_part='gaussian'))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert saved['model_type'] == 'draw' and saved['read_part'] == 'doubled'
    assert 'cell_part' not in saved
    again = DRAW.from_pretrained(tmp_path)
    assert again.config == model.config and type(again.read) is DoubledRead
    for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)

@pytest.mark.parametrize('kind', PARTS)
def test_unknown_name(kind, tmp_path):
    "One line, at making and at loading"
    line = (f"no {kind} part 'nameless': choose one of {', '.join(PARTS[kind])}, "
            f'put it into PARTS, or hand it over as {kind}=')
    with pytest.raises(ValueError) as made: DRAW(replace(SMALL, **{f'{kind}_part': 'nameless'}))
    DRAW(SMALL).save_pretrained(tmp_path)
    config = {**asdict(SMALL), f'{kind}_part': 'nameless'}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError) as loaded: DRAW.from_pretrained(tmp_path)
    assert str(made.value) == str(loaded.value) == line

def test_parts_without_names_are_not_forgotten(tmp_path):
    "Weights of a part that happens to fit the paper's are not loaded into it"
    DRAW(SMALL, read=subclassed_read).save_pretrained(tmp_path / 'factory')
    DRAW(SMALL, read=subclassed_read(SMALL)).save_pretrained(tmp_path / 'part')
    for name in ('factory', 'part'):
        with pytest.raises(ValueError, match='no read part'): DRAW.from_pretrained(tmp_path / name)
        again = DRAW.from_pretrained(tmp_path / name, read=subclassed_read)
        assert type(again.read) is SubclassedRead

PACKAGED = sorted(file.parent.name for file in PRETRAINED.glob('*/config.json'))

@pytest.mark.parametrize('name', PACKAGED)
def test_packaged_weights(name, tmp_path):
    "They have no model_type, or the right one; saved again they have one, and are the same"
    kind = network_class(name)
    model = kind.from_pretrained(name)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == kind.model_type
    again = network_class(tmp_path).from_pretrained(tmp_path)
    assert type(again) is kind is network_for(again.config) and again.config == model.config
    for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)

def test_network_of_another_kind(tmp_path, monkeypatch):
    "Told by model_type, whatever the fields look like; a kind of one's own is entered in NETWORKS"
    class Mine(DRAW): model_type = 'mine'
    Mine(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a network of type 'mine'"): network_class(tmp_path)
    with pytest.raises(ValueError, match="of type 'mine', and DRAW is of type 'draw'$"):
        DRAW.from_pretrained(tmp_path)
    monkeypatch.setitem(NETWORKS, 'mine', Mine)
    assert network_class(tmp_path) is Mine and type(Mine.from_pretrained(tmp_path)) is Mine
    with pytest.raises(ValueError, match='^no network is made from TrainOptions$'):
        network_for(TrainOptions())


# ---- compiled

def test_compiled():
    "torch.compile of the default network, in one graph: outputs and gradients of the definition"
    torch.manual_seed(0)
    model = DRAW(DRAWConfig(glimpses=2))
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    x, noise = torch.rand(2, 1, 28, 28), torch.randn(2, 2, 100)
    results = []
    for network in (compiled, model):
        output = network(x, noise)
        total = bound(output, x, model.likelihood).total.sum()
        results.append([*output, *torch.autograd.grad(total, list(model.parameters()))])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

class Palette(nn.Module):
    "Colours that share a pixel, through axes counted from the front, as a convolution counts them"
    def __init__(self, config): super().__init__()
    def forward(self, canvas):
        batch, channels, height, width = canvas.shape
        return distributions.Normal(canvas.softmax(dim=1), 0.1, validate_args=False)
    def canvas_of(self, mean): return mean.log()

def test_likelihoods_see_four_axes():
    "Pictures of whole drawings are those of each canvas"
    model = DRAW(SMALL, likelihood=Palette)
    canvases = model.generate(2, generator=torch.Generator().manual_seed(0)).canvases
    pictures = model.images(canvases)
    assert pictures.shape == canvases.shape
    for canvas, picture in zip(canvases, pictures):
        assert torch.equal(model.images(canvas), picture)
    assert torch.equal(model.images(canvases[-1, 0]), pictures[-1, 0])
