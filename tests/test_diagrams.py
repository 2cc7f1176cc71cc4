"Figures 2 to 4: where things lie in the panels, against the equations"
import re
import xml.etree.ElementTree as xml
import numpy as np
import pytest
from draw_nbdev.data import load
from draw_nbdev.diagrams import filter_grid, recurrence_diagram, zoom
from test_mistakes import filters_by_hand

def panels(figure):
    "Panels by their names"
    return {ax.get_label(): ax for ax in figure.axes}

def frame(ax):
    "Left, top, right, bottom of the square that is drawn on a panel, in pixels counted from 1"
    square, = [patch for patch in ax.patches if not patch.get_fill()]
    x, y = square.get_xy()
    return x, y, x + square.get_width(), y + square.get_height()

def shown(ax): return np.asarray(ax.images[0].get_array())

@pytest.fixture(scope='module')
def grid(): return panels(filter_grid())

@pytest.fixture(scope='module')
def photo(): return panels(zoom())

def test_pixels_are_counted_from_1(grid, photo):
    "The middle of the first pixel is at 1, of the last one at the number of pixels"
    for ax in [*grid.values(), *photo.values()]:
        height, width = shown(ax).shape
        left, right, bottom, top = ax.images[0].get_extent()
        assert (left, right, top, bottom) == (0.5, width + 0.5, 0.5, height + 0.5)

def test_three_windows_on_a_digit(grid):
    "Each patch is what Eq. 27 reads through the window whose numbers stand below it"
    digit = load('mnist_grey', 'test')[35][0].numpy()
    assert np.array_equal(shown(grid['digit']), digit)
    squares = [p for p in grid['digit'].patches if not p.get_fill()]
    assert len(squares) == 3
    for square, name in zip(squares, ('near', 'sharp', 'blurred')):
        ax = grid[name]
        label = re.match(r'\$\\delta\$ = (\S+), \$\\sigma\$ = (\S+)', ax.get_xlabel())
        delta, sigma = map(float, label.groups())
        x, y = square.get_xy()
        assert square.get_width() == pytest.approx(11 * delta, abs=1e-4)
        assert square.get_height() == pytest.approx(11 * delta, abs=1e-4)
        F_y, F_x = (filters_by_hand(corner + 5.5 * delta, delta, sigma**2, 12, 28)
                    for corner in (y, x))
        np.testing.assert_allclose(shown(ax), F_y @ digit @ F_x.T, atol=1e-4)
        assert ax.spines['left'].get_edgecolor() == square.get_edgecolor()

def test_grid_of_filters(grid):
    "Nine filters around (13, 16), seven pixels apart, a deviation wide"
    circles = [p for p in grid['grid'].patches if hasattr(p, 'radius')]
    expected = [(13 + 7 * i, 16 + 7 * j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    np.testing.assert_allclose([c.center for c in circles], expected)
    assert [c.radius for c in circles] == pytest.approx(9 * [1.8])

def test_photograph(photo):
    "75 x 100 pixels, 12 x 12 read from a square around (53, 38), put back; first and last filter"
    image = shown(photo['image'])
    assert image.shape == (75, 100) and 0 <= image.min() < image.max() <= 1
    F_y, F_x = (filters_by_hand(g, 3.8, 2.4**2, 12, length) for g, length in ((38, 75), (53, 100)))
    patch = F_y @ image @ F_x.T
    np.testing.assert_allclose(shown(photo['patch']), patch, atol=1e-4)
    np.testing.assert_allclose(shown(photo['back']), F_y.T @ patch @ F_x, atol=1e-4)
    for name, k in (('first', 0), ('last', -1)):
        np.testing.assert_allclose(shown(photo[name]), np.outer(F_y[k], F_x[k]), atol=1e-6)
        assert frame(photo[name]) == pytest.approx((32.1, 17.1, 73.9, 58.9), abs=1e-3)
    assert frame(photo['image']) == pytest.approx((32.1, 17.1, 73.9, 58.9), abs=1e-3)

def test_recurrence():
    "A drawing that can be read, inside its frame; arrows end at boxes"
    root = xml.fromstring(recurrence_diagram())
    space = '{http://www.w3.org/2000/svg}'
    boxes = [tuple(float(r.get(k)) for k in ('x', 'y', 'width', 'height'))
             for r in root.iter(f'{space}rect') if r.get('class') == 'box']
    texts = ' '.join(''.join(t.itertext()) for t in root.iter(f'{space}text'))
    for name in ('read', 'encoder', 'sample', 'decoder', 'write', 'canvas'):
        assert texts.count(name) >= 2, name # once for each step
    arrows = [a.get('points').split() for a in root.iter(f'{space}polyline')]
    assert len(arrows) > 30
    for points in arrows:
        x, y = map(float, points[-1].split(','))
        on = [x0 <= x <= x0 + w and y0 <= y <= y0 + h for x0, y0, w, h in boxes]
        assert sum(on) == 1 and 0 <= x <= 780 and 0 <= y <= 690
