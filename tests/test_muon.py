"Muon: an update against NumPy, gate by gate, and who owns which weight"
import numpy as np
import pytest
import torch
from torch import nn
from draw_nbdev import muon
from draw_nbdev.classifier import ClassifyTask, DifferentiableRAM, RAMConfig
from draw_nbdev.model import DRAW, DRAWConfig
from draw_nbdev.muon import Muon, make_optimizers, orthogonalize
from draw_nbdev.options import TrainOptions
from draw_nbdev.training import Task

@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    "Without rounding to bfloat16, whatever the hardware multiplies"
    monkeypatch.setattr(muon, 'multiplies_bfloat16', lambda device: False)

def orthogonal_by_hand(matrix):
    "Five times X <- a X + (b A + c A A) X with A = X X^T, from X of norm 1"
    x = matrix / max(np.sqrt((matrix**2).sum()), 1e-30)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x

@pytest.mark.parametrize('shape', [(3, 5), (5, 3), (4, 4), (1, 6)])
def test_orthogonalize(shape):
    "Wide, high and square matrices; each for itself; zeros stay zeros"
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).double()
    matrices[1] *= 1000
    matrices[2] = 0
    ours = orthogonalize(matrices)
    assert ours.shape == matrices.shape and ours.dtype == torch.float64
    for a, b in zip(ours.numpy(), matrices.numpy()):
        np.testing.assert_allclose(a, orthogonal_by_hand(b), atol=1e-10)
    values = torch.linalg.svdvals(ours[:2])
    assert values.min() > 0.5 and values.max() < 1.3

@pytest.mark.parametrize('parts', [1, 4])
def test_three_updates(parts):
    "Average, look ahead, one matrix for each gate, decay, and a step by the longer of its sides"
    random = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 6, generator=random).double())
    expected, average = weight.detach().numpy().copy(), np.zeros((8, 6))
    optimizer = Muon([(weight, parts)], lr=0.5, momentum=0.75, weight_decay=0.5)
    for rate in (0.5, 0.25, 0.125):
        weight.grad = torch.randn(8, 6, generator=random).double()
        gradient = weight.grad.numpy().copy()
        optimizer.param_groups[0]['lr'] = rate
        optimizer.step()
        average = 0.75 * average + 0.25 * gradient
        ahead = 0.25 * gradient + 0.75 * average
        expected *= 1 - 0.5 * rate
        for part in np.split(np.arange(8), parts):
            longer = max(len(part), 6)
            expected[part] -= rate * 0.2 * np.sqrt(longer) * orthogonal_by_hand(ahead[part])
        np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-10)

def test_weights_without_gradient_stay():
    weight = nn.Parameter(torch.ones(2, 3))
    Muon([(weight, 1)], lr=1.).step()
    assert weight.eq(1).all()

@pytest.mark.parametrize('name', ['adam', 'muon'])
def test_weight_decay_of_a_run(name):
    "Matrices of both kinds of network lose their share, and nothing else does"
    options = TrainOptions(optimizer=name, learning_rate=0.5, weight_decay=0.5)
    reader = DifferentiableRAM(RAMConfig(glimpses=2, hidden_size=4, read_size=2))
    drawer = DRAW(DRAWConfig(glimpses=2, hidden_size=4, latent_size=2))
    for task, model, count in ((Task(), drawer, 3), (ClassifyTask(DifferentiableRAM), reader, 1)):
        before = [p.detach().clone() for p in model.parameters()]
        for optimizer in task.optimizers(model, options):
            for p in model.parameters(): p.grad = torch.zeros_like(p)
            optimizer.step()
        shrunk = [not torch.equal(p, b) for p, b in zip(model.parameters(), before)]
        assert sum(shrunk) == count
        for p, b, moved in zip(model.parameters(), before, shrunk):
            if moved: torch.testing.assert_close(p, 0.75 * b)

@pytest.mark.parametrize('name', ['adam', 'muon'])
def test_every_weight_has_one_optimiser(name):
    "The matrices that were named belong to Muon, all others to Adam, and both have the rate"
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    optimizers = make_optimizers(model, [(model[0].weight, 4)], name, 0.125)
    owned = [p for o in optimizers for group in o.param_groups for p in group['params']]
    assert len(owned) == 4 and {*map(id, owned)} == {*map(id, model.parameters())}
    assert {group['lr'] for o in optimizers for group in o.param_groups} == {0.125}
    last = optimizers[-1]
    if name == 'muon':
        assert isinstance(last, Muon) and last.param_groups[0]['params'][0] is model[0].weight
        assert last.param_groups[0]['parts'] == 4
    else: assert len(optimizers) == 1 and isinstance(last, torch.optim.Adam)
