"Options of a training: schedules at every update against formulas written out, and what is refused"
from dataclasses import replace
from math import cos, inf, nan, pi
import pytest
from draw_nbdev.options import (
    PAPER_RECIPES, RECIPES, TrainOptions, glimpses_at, kl_weight, learning_rate, recipe,
    with_epochs,
)

def rate_by_hand(update, total, peak, final, decay, rise):
    "Of the update counted from 1: a rise, a plateau, and half a cosine over the last part"
    done, begin = (update - 1) / total, 1 - decay
    fall = 0 if done <= begin else (done - begin) / decay
    risen = min(1, update / rise) if rise else 1
    return peak * risen * (final + (1 - final) * (1 + cos(pi * fall)) / 2)

@pytest.mark.parametrize('decay', [0.25, 1.])
@pytest.mark.parametrize('rise', [0, 7])
def test_rate(decay, rise):
    "All forty updates of a run"
    options = TrainOptions(learning_rate=0.3, final_rate=0.1, decay=decay, rate_warmup=rise)
    for update in range(1, 41):
        expected = rate_by_hand(update, 40, 0.3, 0.1, decay, rise)
        assert learning_rate(options, update - 1, 40) == pytest.approx(expected, rel=1e-12)

def test_weight_of_the_latent_loss():
    weights = [kl_weight(TrainOptions(kl_warmup=4), step) for step in range(6)]
    assert weights == [.25, .5, .75, 1, 1, 1]
    assert kl_weight(TrainOptions(kl_warmup=0), 0) == 1

def test_stages():
    options = TrainOptions(epochs=9, growth=((4, 2), (8, 3)))
    assert [glimpses_at(options, epoch, 16) for epoch in range(9)] == 2 * [4] + 3 * [8] + 4 * [16]

@pytest.mark.parametrize('epochs, growth', [
    (100, ((4, 20), (8, 30))), (200, ((4, 20), (8, 30))), (50, ((4, 10), (8, 15))),
    (10, ((4, 2), (8, 3))), (2, ((8, 1),)), (1, ())])
def test_fewer_epochs_shorten_the_stages(epochs, growth):
    "In proportion; more epochs leave them as they are"
    options = TrainOptions(epochs=100, growth=((4, 20), (8, 30)), learning_rate=0.5)
    assert with_epochs(options, epochs) == replace(options, epochs=epochs, growth=growth)

def test_recipes():
    "Both kinds, each network by its own name"
    for name in RECIPES:
        assert recipe(name) is RECIPES[name] and recipe(name, 'paper') is PAPER_RECIPES[name]
    assert RECIPES['mnist'] != PAPER_RECIPES['mnist']

@pytest.mark.parametrize('wrong', [
    dict(epochs=0), dict(batch_size=0), dict(rate_warmup=-1), dict(kl_warmup=-1),
    dict(save_every=0), dict(log_every=0), dict(seed=-1), dict(seed=2**63), dict(valid_images=0),
    dict(learning_rate=0.), dict(learning_rate=1e9), dict(learning_rate=inf),
    dict(learning_rate=nan), dict(clip_norm=0.), dict(clip_norm=inf), dict(average=1.),
    dict(average=-0.1), dict(final_rate=-0.1), dict(final_rate=1.1), dict(decay=0.),
    dict(decay=1.1), dict(optimizer='sgd'), dict(precision='half'),
    dict(epochs=5, growth=((4, 5),)), dict(epochs=5, growth=((4, 2), (8, 3))),
    dict(growth=((0, 2),)), dict(growth=((4, 0),)), dict(growth=((4, 1, 1),)),
    dict(growth=((1.5, 2),)), dict(every_glimpse='no'), dict(every_glimpse=1),
    dict(growth=None), dict(precision=None), dict(epochs=None),
    dict(average=None), dict(learning_rate=None)], ids=str)
def test_refused(wrong):
    "In one line that names the option"
    with pytest.raises(ValueError, match=list(wrong)[-1]) as error: TrainOptions(**wrong)
    assert '\n' not in str(error.value)

@pytest.mark.parametrize('right', [
    dict(epochs=1), dict(rate_warmup=0), dict(seed=2**63 - 1), dict(clip_norm=None),
    dict(average=0.), dict(final_rate=0.), dict(final_rate=1.), dict(decay=1.),
    dict(epochs=5, growth=((4, 2), (8, 2)))], ids=str)
def test_taken(right):
    "The least and the largest of what makes a run"
    for name, value in right.items(): assert getattr(TrainOptions(**right), name) == value
