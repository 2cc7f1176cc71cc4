"Images made of digits, against loops over pixels and a source of chance that is written down"
import numpy as np
import pytest
import torch
from types import SimpleNamespace
from draw_nbdev import digits
from draw_nbdev.digits import FreshDigits, LabelledImages, cluttered_mnist, draw_cluttered
from draw_nbdev.digits import draw_two_digits, two_digits

SIDE, HEIGHT, WIDTH = 11, 23, 31 # nothing square but the digits, and no two lengths the same

class Chance:
    "Whole numbers below a limit, kept as they are given; with `extreme` 0 or the largest ones"
    def __init__(self, seed=0, extreme=None):
        self.stream, self.extreme, self.given = np.random.default_rng(seed), extreme, []

    def __call__(self, high, *shape):
        drawn = self.stream.integers(high, size=shape)
        if self.extreme is not None: drawn = np.full(shape, (high - 1) * self.extreme)
        self.given.append(drawn)
        return torch.from_numpy(drawn)

def some_digits(count=9):
    "Bright digits, so that two of them on one place have to be clipped"
    random = torch.Generator().manual_seed(1)
    return torch.randint(100, 256, (count, 1, SIDE, SIDE), generator=random, dtype=torch.uint8)

def added(canvas, digit, source, target, side):
    "Add the square of a digit at `source` to a canvas at `target`, pixel by pixel"
    for i in range(side):
        for j in range(side):
            canvas[target[0] + i, target[1] + j] += int(digit[source[0] + i, source[1] + j])

def other(own, drawn):
    "The drawn one of all digits but `own`"
    return [o for o in range(9) if o != own][drawn]

@pytest.mark.parametrize('extreme', [None, 0, 1])
def test_two_digits(extreme):
    "Digits that differ, anywhere up to the last row and column, added and clipped to 255"
    chance, pixels, own = Chance(extreme=extreme), some_digits(), torch.tensor([3, 0, 8, 3])
    ours = draw_two_digits(pixels, own, (HEIGHT, WIDTH), chance)
    drawn, rows, columns = chance.given
    assert rows.shape == columns.shape == (4, 2) and drawn.shape == (4, 1)
    expected = np.zeros((4, HEIGHT, WIDTH))
    for n in range(4):
        for k, digit in enumerate((own[n], other(own[n], drawn[n, 0]))):
            added(expected[n], pixels[digit, 0], (0, 0), (rows[n, k], columns[n, k]), SIDE)
    assert expected.max() > 255 or extreme is None
    assert np.array_equal(ours[:, 0].numpy(), expected.clip(max=255))
    if extreme == 1: assert ours[:, 0, -1, -1].gt(0).all()

@pytest.mark.parametrize('extreme', [None, 0, 1])
def test_clutter(extreme):
    "Eight crops of 8 x 8 of other digits, from anywhere in them, then a whole digit; clipped"
    chance, pixels, own = Chance(extreme=extreme), some_digits(), torch.tensor([3, 0, 8, 3])
    ours = draw_cluttered(pixels, own, (HEIGHT, WIDTH), chance)
    drawn, *corners = chance.given
    source_rows, source_columns, rows, columns, row, column = corners
    assert drawn.shape == source_rows.shape == rows.shape == (4, 8) and row.shape == (4, 1)
    expected = np.zeros((4, HEIGHT, WIDTH))
    for n in range(4):
        for k in range(8):
            source = source_rows[n, k], source_columns[n, k]
            target = rows[n, k], columns[n, k]
            added(expected[n], pixels[other(own[n], drawn[n, k]), 0], source, target, 8)
        added(expected[n], pixels[own[n], 0], (0, 0), (row[n, 0], column[n, 0]), SIDE)
    assert expected.max() > 255
    assert np.array_equal(ours[:, 0].numpy(), expected.clip(max=255))

def fresh(count=250):
    "Digits that can be told apart, as a set that is drawn afresh"
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(count).clamp(max=255).byte()
    def draw(digits, own, size, integers):
        "The number of the digit, and a number by chance"
        canvas = torch.zeros(len(own), 1, *size)
        canvas[:, 0, 0, 0], canvas[:, 0, 0, 1] = digits[own, 0, 0, 0], integers(256, len(own))
        return canvas
    return FreshDigits(draw, (9, 10), pixels, torch.arange(count) % 10, 'fresh', 'train')

def test_batches():
    "Every image is made for its own digit, in the order asked for, in several chunks; its class"
    data, indices = fresh(), torch.arange(249, -1, -1)
    assert data.shape == (1, 9, 10) and len(data) == 250
    images, labels = data.batch_with_labels(indices, torch.Generator().manual_seed(0))
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), indices)
    assert torch.equal(labels, indices % 10) and images.max() <= 1
    images, labels = data.batch_with_labels([-1, 3])
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [249, 3] and labels.tolist() == [9, 3]

def test_source_of_chance():
    "One generator gives the same batch again, then another; the global one is not touched"
    data = fresh()
    def batches(seed):
        random = torch.Generator().manual_seed(seed)
        return [data.batch(range(50), random) for _ in range(2)]
    before = torch.get_rng_state()
    (a, b), (c, d), (e, _) = batches(0), batches(0), batches(1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)

@pytest.fixture
def numbered(monkeypatch):
    "In place of MNIST, digits that say which part they are from and which number they have there"
    def mnist(train, root):
        number = torch.arange(60_000 if train else 10_000)
        pixels = torch.zeros(len(number), 8, 8, dtype=torch.uint8)
        pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 0, 2] = number // 250, number % 250, train
        return SimpleNamespace(data=pixels, targets=number % 10)
    monkeypatch.setattr(digits, 'mnist', mnist)
    streams = []
    def draw(pixels, own, size, integers):
        "The first numbers of the stream, and the digit itself"
        streams.append(integers(1000, 4).tolist())
        canvas = torch.zeros(len(own), 1, *size)
        canvas[:, :, :8, :8] = pixels[own]
        return canvas
    monkeypatch.setattr(digits, 'draw_two_digits', draw)
    monkeypatch.setattr(digits, 'draw_cluttered', draw)
    return streams

@pytest.mark.parametrize('make, side', [(two_digits, 60), (cluttered_mnist, 100)])
def test_splits(make, side, numbered):
    "50,000 digits for training, the 10,000 after them for validation, the other part for testing"
    for split, first, count, train in (('train', 0, 50_000, 1), ('valid', 50_000, 10_000, 1),
                                       ('test', 0, 10_000, 0)):
        data = make(split)
        assert len(data) == count and data.shape == (1, side, side) and data.split == split
        images, labels = data.batch_with_labels([0, 1, count - 1])
        numbers = (images[:, 0, 0, :3] * 255).round() @ torch.tensor([250., 1, 0])
        expected = torch.tensor([first, first + 1, first + count - 1])
        assert torch.equal(numbers.long(), expected) and torch.equal(labels, expected % 10)
        assert (images[:, 0, 0, 2] * 255).round().eq(train).all()

def test_frozen_splits(numbered):
    "Validation and test images are the same for ever, and not drawn by the same numbers"
    drawn = {}
    for split in ('valid', 'test', 'valid'):
        numbered.clear()
        two_digits(split)
        assert drawn.setdefault(split, [*numbered]) == numbered and len(numbered) == 100
    assert drawn['valid'] != drawn['test'] and len({*map(tuple, drawn['valid'])}) == 100

def test_labels_must_fit():
    with pytest.raises(ValueError, match='3 images need as many labels'):
        LabelledImages(torch.zeros(3, 1, 2, 2), torch.zeros(2), 'short', 'train')
    for labels in ([0, 1, 2], np.arange(3)):
        with pytest.raises(ValueError, match='labels must be a tensor, not'):
            LabelledImages(torch.zeros(3, 1, 2, 2), labels, 'list', 'train')
    with pytest.raises(ValueError, match='do not fit on a canvas of 9 x 10'):
        FreshDigits(
            draw_two_digits, (9, 10), some_digits(), torch.zeros(9, dtype=torch.long),
            'large', 'train',
        )
    classes = torch.tensor([2, 0, 1], dtype=torch.int32)
    images = LabelledImages(torch.zeros(3, 1, 2, 2), classes, 'int', 'train')
    assert images.labels.dtype == torch.long
    digits = torch.full((9, 1, 4, 4), 255, dtype=torch.uint8)
    for wrong in (digits.expand(9, 3, 4, 4), digits[..., :3], digits.bool()):
        with pytest.raises(ValueError, match='digits are grey squares'):
            FreshDigits(draw_two_digits, (9, 10), wrong, torch.arange(9), 'odd', 'train')
    for wrong in (torch.zeros(3), torch.tensor([0, 1, -100])):
        with pytest.raises(ValueError, match='numbers of classes'):
            LabelledImages(torch.zeros(3, 1, 2, 2), wrong, 'odd', 'train')
