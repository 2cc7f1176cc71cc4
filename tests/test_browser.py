"""The page of `draw demo` in a real browser: what a reader does, and what comes of it

Chromium is driven by Playwright; without either of them the tests are skipped."""
import json, shutil, threading
import numpy as np
import pytest
import torch
from PIL import Image
from draw_nbdev.attention import filters, read_patch
from draw_nbdev.classifier import DifferentiableRAM, RAMConfig
from draw_nbdev.demo import live_files, make_server
from draw_nbdev.filterbank import Window
from draw_nbdev.loss import bound
from draw_nbdev.model import DRAW, DRAWConfig

playwright = pytest.importorskip('playwright.sync_api', reason='no playwright to drive the browser')
NAMES = 'chromium', 'chromium-browser', 'google-chrome'
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium')
WIDGETS = 'draws', 'reads', 'looks', 'blends', 'window'
PIXELS = """canvas => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)
  return Array.from(data)
}"""
UNNAMED = """() =>
  [...document.querySelectorAll('.live :is(input, select, button, canvas, [role])')]
  .filter(e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim())
  .map(e => e.outerHTML)"""

CENTRE = """colour => {
  const context = document.querySelector('[data-live=window] canvas').getContext('2d')
  return context.getImageData(50, 50, 1, 1).data.slice(0, 3).join() === colour.join()
}""" # The picture in the window widget has this colour there
OUTSIDE = """() => [...document.querySelectorAll('main *:not(svg *)')]
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 80))"""

@pytest.fixture(scope='module')
def address(tmp_path_factory):
    "The page, with a small network in colour and three bad ones at the end of the list"
    folder = tmp_path_factory.mktemp('live')
    small = DRAWConfig(height=6, width=9, channels=3, glimpses=4, hidden_size=5, latent_size=3)
    DRAW(small).save_pretrained(folder / 'mine')
    live = live_files(folder / 'page', folder / 'mine')
    weights, file = live / 'weights', live / 'models.json'
    for name in ('damaged', 'foreign'): shutil.copytree(weights / 'mnist', weights / name)
    whole = (weights / 'mnist/model.safetensors').read_bytes()
    (weights / 'damaged/model.safetensors').write_bytes(whole[:1000])
    shutil.copy(weights / 'two_digits/config.json', weights / 'foreign')
    mine, *rows = json.loads(file.read_text())
    bad = [rows[0] | {'name': name, 'title': name} for name in ('damaged', 'foreign', 'missing')]
    file.write_text(json.dumps([*rows, mine, *bad]))
    server = make_server(live, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()

@pytest.fixture(scope='module')
def browser():
    "One Chromium for all tests"
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield found
        found.close()

class Reader:
    "Someone with the page open"
    def __init__(self, browser, address, **options):
        self.page, self.complaints, self.bytes = browser.new_page(**options), [], 0
        self.page.on('console', self.hear)
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.on('requestfinished', self.count)
        self.page.goto(address)

    def hear(self, message):
        "Keep what the console calls an error"
        if message.type == 'error': self.complaints.append(message.text)

    def count(self, request):
        "Add what a request has brought"
        sizes = request.sizes()
        self.bytes += sizes['responseBodySize'] + sizes['responseHeadersSize']

    def widget(self, name):
        "Scroll to a widget and wait until it is there"
        place = self.page.locator(f'[data-live="{name}"]')
        place.scroll_into_view_if_needed()
        self.page.wait_for_selector(f'[data-live="{name}"][data-state="ready"]')
        loaded = 'place => !place.querySelector("progress:not([hidden])")'
        self.page.wait_for_function(loaded, arg=place.element_handle())
        return place

    def noise(self, seed):
        "What the page makes of a seed, shape (64, 1, 100)"
        script = f"import('./math.js').then(math => Array.from(math.normal({seed}, 6400)))"
        return torch.tensor(self.page.evaluate(script)).view(64, 1, 100)

    def wide(self, name, width):
        "Wait until the first picture of a widget is so many pixels wide"
        script = f"document.querySelector('[data-live={name}] canvas').width === {width}"
        self.page.wait_for_function(script)

    def pixels(self, place, label):
        "Of the picture whose label begins so, shape (height, width, 3), 0 to 255"
        canvas = place.locator(f'canvas[aria-label^="{label}"]').first
        height, width = canvas.evaluate('canvas => [canvas.height, canvas.width]')
        return np.array(canvas.evaluate(PIXELS)).reshape(height, width, 4)[..., :3]

    def slide(self, place, label, *keys):
        "Press keys on a slider"
        slider = place.get_by_label(label, exact=True)
        slider.focus()
        for key in keys: slider.press(key)

@pytest.fixture(scope='module')
def reader(browser, address):
    "One reader for most tests, who asked for little motion, so that drawings end at once"
    size = {'width': 1400, 'height': 900}
    found = Reader(browser, address, viewport=size, reduced_motion='reduce')
    yield found
    assert found.complaints == []

@pytest.mark.parametrize('width, scheme', [(400, 'light'), (1400, 'dark')])
def test_page(browser, address, width, scheme):
    "All widgets come up, nothing overflows, the console is silent, and it all takes less than 3 MB"
    size = {'width': width, 'height': 800}
    reader = Reader(browser, address, viewport=size, color_scheme=scheme)
    for name in WIDGETS:
        place = reader.widget(name)
        assert not place.locator('.live-problem').count() and place.locator('canvas').count()
    assert reader.page.evaluate('document.documentElement.scrollWidth') <= width
    assert reader.page.evaluate(OUTSIDE) == []
    assert reader.complaints == [] and 2e6 < reader.bytes < 3e6
    assert reader.page.evaluate(UNNAMED) == []
    reader.page.close()

def test_rests_until_seen(browser, address):
    "Of five widgets, only those near the view have asked for anything"
    reader = Reader(browser, address, viewport={'width': 1000, 'height': 800})
    reader.widget('draws')
    asked = reader.page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert any('draws.js' in name for name in asked)
    assert not [name for name in asked if 'window.js' in name or 'cluttered' in name]
    reader.page.close()

def test_plays(browser, address):
    "The drawing goes on by itself, pauses when it is told to, and goes on by one step"
    reader = Reader(browser, address, viewport={'width': 1000, 'height': 800})
    place = reader.widget('draws')
    shown = "document.querySelector('[data-live=draws] .live-transport output').textContent"
    def step(): return int(reader.page.evaluate(shown).split()[0])
    reader.page.wait_for_function(f'parseInt({shown}) >= 3')
    place.get_by_role('button', name='Pause').press('Enter')
    paused = step()
    reader.page.wait_for_timeout(300)
    assert step() == paused
    place.get_by_role('button', name='Step', exact=True).press('Enter')
    assert step() == paused + 1
    place.get_by_role('button', name='New sample').click()
    assert place.get_by_label('Seed').input_value() != '0'
    reader.page.close()

def test_sample_is_pytorchs(reader):
    "The last picture, for a seed, is the one PyTorch draws from the same noise"
    place = reader.widget('draws')
    place.get_by_label('Seed').fill('5')
    reader.slide(place, 'Step', 'End')
    found = reader.pixels(place, 'The drawing after step 64')
    model = DRAW.from_pretrained('mnist')
    with torch.no_grad():
        canvas, _, decoder = model.initial_states(1)
        for z in reader.noise(5):
            decoder = model.decoder(z, decoder)
            canvas = canvas + model.write(decoder[0])[0]
    expected = 255 * canvas.sigmoid()[0, 0].numpy()
    assert abs(found - expected[..., None]).max() < 0.55 and expected.max() > 250 # but for rounding
    reader.slide(place, 'Spread of z', 'Home')
    assert abs(reader.pixels(place, 'The drawing after step 64') - found).max() > 100

@pytest.mark.parametrize('bad', ['-3', '2.5', '1000000', ''])
def test_a_seed_that_is_none(bad, reader):
    "It is marked, nothing is drawn with it, and the spread goes on from the seed before"
    place = reader.widget('draws')
    seed = place.get_by_label('Seed')
    reader.slide(place, 'Spread of z', 'End')
    seed.fill('5')
    reader.slide(place, 'Step', 'End')
    before = reader.pixels(place, 'The drawing')
    def edge(): return seed.evaluate('e => getComputedStyle(e).borderColor')
    usual = edge()
    seed.fill(bad)
    seed.press('Tab')
    assert edge() != usual
    assert seed.evaluate('e => e.matches(":invalid") && e.validationMessage.length > 0')
    for key in ('ArrowLeft', 'ArrowRight'): reader.slide(place, 'Spread of z', key)
    assert (reader.pixels(place, 'The drawing') == before).all()

BAD = {'damaged': 'damaged: the weights are damaged', 'foreign': 'do not fit their config.json',
       'missing': 'could not be loaded'}

def test_other_networks_and_bad_ones(reader):
    "A network in colour draws; for a bad one there is a line, and the one before stays"
    place = reader.widget('draws')
    network = place.get_by_label('Network')
    network.select_option('own')
    reader.wide('draws', 9)
    found = reader.pixels(place, 'The drawing')
    assert found.shape == (6, 9, 3)
    for name, said in BAD.items():
        network.select_option(name)
        line = place.locator('.live-problem').filter(has_text=said)
        line.wait_for()
        assert '\n' not in line.inner_text() and place.locator('.live-problem').count() == 1
        assert (reader.pixels(place, 'The drawing') == found).all()
    network.select_option('mnist')
    reader.wide('draws', 28)
    assert not place.locator('.live-problem').count()
    reader.complaints[:] = [text for text in reader.complaints if '404' not in text] # the missing

THREE = [(9, 7), (12, 5), (17, 6), (18, 9), (15, 13), (13, 13), (17, 15), (19, 18), (16, 22),
         (11, 23), (8, 21)] # Column and row, in pixels

def stroke(reader, canvas, points, side=28):
    "Drag the mouse over the pixels of a picture, counted from 0"
    box = canvas.bounding_box()
    def at(point): return (box['x'] + (point[0] + 0.5) / side * box['width'],
                           box['y'] + (point[1] + 0.5) / side * box['height'])
    reader.page.mouse.move(*at(points[0]))
    reader.page.mouse.down()
    for point in points[1:]: reader.page.mouse.move(*at(point), steps=4)
    reader.page.mouse.up()

def test_plays_on_a_phone(browser, address):
    "The drawing goes on while it is in view, and its controls below it are not"
    reader = Reader(browser, address, viewport={'width': 390, 'height': 700})
    place = reader.widget('reads')
    place.locator('canvas').first.evaluate('e => e.scrollIntoView()')
    stroke(reader, place.locator('canvas[aria-label="Your drawing"]'), THREE)
    controls = place.locator('.live-transport')
    assert controls.bounding_box()['y'] > 700
    shown = "document.querySelector('[data-live=reads] .live-transport output').textContent"
    reader.page.wait_for_function(f'parseInt({shown}) >= 3')
    assert controls.bounding_box()['y'] > 700
    reader.page.close()

def test_grey_is_no_price(reader):
    "Of a network of grey images nothing is said about sending; without a window, nothing of one"
    place = reader.widget('reads')
    network, words = place.get_by_label('Network'), place.locator('.live-words')
    network.select_option('two_digits')
    reader.wide('reads', 60)
    assert words.inner_text().startswith('The loss') and 'bound' not in words.inner_text()
    network.select_option('mnist_no_attention')
    reader.wide('reads', 28)
    assert words.inner_text().startswith('The bound')
    captions = ' '.join(place.locator('figcaption:visible').all_inner_texts())
    assert 'Green' not in captions and 'Red' not in captions
    network.select_option('mnist')
    place.get_by_text('Green: where it looks').wait_for()

def test_draws_what_the_mouse_drew(reader):
    "A 3 drawn with the mouse is drawn again: nearer to the strokes by far than the mean image"
    place = reader.widget('reads')
    before = reader.pixels(place, 'Your drawing') / 255
    stroke(reader, place.locator('canvas[aria-label="Your drawing"]'), THREE)
    drawn = reader.pixels(place, 'Your drawing') / 255
    assert (drawn != before).any() and set(np.unique(drawn)) == {0, 1}
    assert 40 < drawn[..., 0].sum() < 200
    assert 'The bound' in place.locator('.live-words').inner_text()
    again = reader.pixels(place, 'Its drawing') / 255
    reader.slide(place, 'Step', 'Home')
    mean = reader.pixels(place, 'Its drawing') / 255
    assert ((again - drawn)**2).sum() < 0.3 * ((mean - drawn)**2).sum()

def test_nats_are_pytorchs(reader):
    "Reconstruction, KL and their sum for an example, with the noise of seed 0"
    place = reader.widget('reads')
    place.get_by_role('button', name='Example of a 7').click()
    said = [float(text.split()[0]) for text in place.locator('dd').all_inner_texts()]
    grey = reader.pixels(place, 'Your drawing')[..., 0]
    image = torch.tensor(grey / 255, dtype=torch.float32)[None, None]
    model = DRAW.from_pretrained('mnist')
    with torch.no_grad(): output = model(image, reader.noise(0))
    losses = bound(output, image, model.likelihood)
    expected = [v.item() for v in (losses.reconstruction, losses.latent, losses.total)]
    np.testing.assert_allclose(said, expected, atol=0.06) # shown with one decimal

def test_draws_what_the_keys_drew(reader):
    "Arrow keys and Space on the pad"
    place = reader.widget('reads')
    place.get_by_role('button', name='Clear').click()
    assert reader.pixels(place, 'Your drawing').max() == 0
    sheet = place.get_by_role('application')
    sheet.focus()
    for key in ['ArrowLeft'] * 3 + ['Space'] + ['Shift+ArrowDown'] * 6: sheet.press(key)
    drawn = reader.pixels(place, 'Your drawing')[..., 0] > 128
    assert drawn[13:20, 10].all() and not drawn[:, 16:].any()

STALE = """IntersectionObserver = class extends IntersectionObserver {
  constructor(heard, options) {
    const stale = ({ target }) => ({ target, isIntersecting: false })
    super(news => heard([...news.map(stale), ...news]), options)
  }
}"""

def test_plays_when_news_come_together(browser, address):
    "That a picture was out of view and then came into view may be told at once: it plays"
    context = browser.new_context(viewport={'width': 1000, 'height': 800})
    context.add_init_script(STALE)
    reader = Reader(context, address)
    reader.widget('reads')
    shown = "document.querySelector('[data-live=reads] .live-transport output').textContent"
    reader.page.wait_for_function(f'parseInt({shown}) >= 3')
    context.close()

def test_the_pen_stays(browser, address):
    "Whoever draws by keys sees the pen while the network draws"
    reader = Reader(browser, address, viewport={'width': 1000, 'height': 800})
    sheet = reader.widget('reads').get_by_role('application')
    sheet.focus()
    sheet.press('Space')
    shown = "document.querySelector('[data-live=reads] .live-transport output').textContent"
    reader.page.wait_for_function(f'parseInt({shown}) >= 3')
    assert sheet.locator('.live-cursor').count() == 1
    reader.page.close()

def test_looks_for_the_digit(reader):
    "Percentages for every glimpse; another puzzle, other answers; the empty sheet is empty"
    place = reader.widget('looks')
    puzzle, table = reader.pixels(place, 'The puzzle'), place.locator('tbody')
    assert puzzle.shape == (100, 100, 3) and place.locator('tbody tr').count() == 8
    rows = [row.split()[1:] for row in table.inner_text().splitlines()]
    shares = np.array(rows).astype(int)
    assert shares.shape == (8, 10) and (abs(shares.sum(1) - 100) <= 5).all() # rounded
    text = table.inner_text()
    place.get_by_role('button', name='New puzzle').click()
    assert (reader.pixels(place, 'The puzzle') != puzzle).any()
    assert table.inner_text() != text
    assert ' It is a ' in place.locator('.live-words').inner_text()
    place.get_by_role('button', name='Empty sheet').click()
    assert reader.pixels(place, 'The puzzle').max() == 0
    place.get_by_role('button', name='Add clutter').click()
    assert reader.pixels(place, 'The puzzle').max() > 0

@pytest.mark.parametrize('sizes', [dict(height=27), dict(classes=4)])
def test_looks_for_digits_alone(sizes, browser, tmp_path):
    "A classifier for which there are no puzzles says so in a line; the packaged ones go on"
    small = RAMConfig(glimpses=2, hidden_size=4, **sizes)
    DifferentiableRAM(small).save_pretrained(tmp_path / 'own')
    server = make_server(live_files(tmp_path / 'page', tmp_path / 'own'), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = dict(viewport={'width': 1000, 'height': 800}, reduced_motion='reduce')
    reader = Reader(browser, f'http://127.0.0.1:{server.server_port}/', **options)
    place = reader.widget('looks')
    place.get_by_text('the puzzles are digits: they need ten classes').wait_for()
    place.get_by_label('Network').select_option('cluttered_4')
    reader.wide('looks', 100)
    assert not place.locator('.live-problem').count() and reader.complaints == []
    reader.page.close()
    server.shutdown()
    server.server_close()

def test_blend(reader):
    "At its ends the blend is the two samples, and between them neither"
    place = reader.widget('blends')
    ends = []
    for key in ('Home', 'End'):
        reader.slide(place, 'Blend', key)
        ends.append(reader.pixels(place, 'The first' if key == 'Home' else 'The second'))
    place.get_by_role('button', name='Blend 5 of 9').click()
    middle = reader.pixels(place, '50 %')
    for one, two in ((middle, ends[0]), (middle, ends[1]), ends): assert abs(one - two).max() > 100
    place.get_by_role('button', name='New second sample').click()
    reader.slide(place, 'Blend', 'Home')
    assert (reader.pixels(place, 'The first') == ends[0]).all()

LABELS = 'Column gX', 'Row gY', 'Stride δ', 'Variance σ2', 'Intensity γ'

def window_values(place):
    "Where the sliders are: g_X, g_Y, delta, sigma^2, gamma"
    values = [float(place.get_by_label(label, exact=True).input_value()) for label in LABELS]
    return [*values[:3], *np.exp(values[3:])]

def test_sliders_move_the_window(reader):
    "The patch changes with the sliders, and is the one that the package reads"
    place = reader.widget('window')
    before = reader.pixels(place, 'The patch')
    reader.slide(place, 'Column gX', 'PageUp', 'ArrowRight')
    reader.slide(place, 'Intensity γ', 'ArrowLeft')
    reader.slide(place, 'Stride δ', 'ArrowLeft')
    reader.slide(place, 'Variance σ2', 'ArrowRight')
    found = reader.pixels(place, 'The patch')
    assert (before != found).any()
    image = torch.tensor(reader.pixels(place, 'The image')[..., 0] / 255)[None, None]
    window = Window(*(torch.tensor([v], dtype=torch.float64) for v in window_values(place)))
    patch = window.intensity * read_patch(image, *filters(window, 5, 28, 28))
    assert abs(found[..., 0] - 255 * patch[0, 0].clamp(0, 1).numpy()).max() < 0.55

def test_the_number_of_filters_leaves_the_size(reader):
    "Through N = 2 and N = 1 and back the window is what it was, and the slider says its stride"
    place = reader.widget('window')
    stride, patch = window_values(place)[2], reader.pixels(place, 'The patch')
    reader.slide(place, 'Filters N', *['ArrowLeft'] * 3)
    assert window_values(place)[2] == pytest.approx(min(4 * stride, 28), abs=0.06)
    reader.slide(place, 'Filters N', 'ArrowLeft', *['ArrowRight'] * 4)
    assert window_values(place)[2] == pytest.approx(stride, abs=0.06)
    assert abs(reader.pixels(place, 'The patch') - patch).max() <= 1

def test_mouse_moves_the_window(reader):
    "Dragged inside, the window moves; dragged at its corner, the stride changes; so do keys"
    place = reader.widget('window')
    canvas = place.locator('canvas').first
    x, y, stride, *_ = window_values(place)
    stroke(reader, canvas, [(x + 0.5, y + 0.5), (x + 2.5, y - 2.5)])
    np.testing.assert_allclose(window_values(place)[:3], [x + 2, y - 3, stride], atol=0.15)
    x, y, stride, *_ = window_values(place)
    corner = x + 2 * stride - 1, y + 2 * stride - 1
    stroke(reader, canvas, [corner, (corner[0] - 2, corner[1] - 2)])
    np.testing.assert_allclose(window_values(place)[:3], [x, y, stride - 1], atol=0.15)
    for key in ('ArrowLeft', '+'): place.locator('svg.live-grips').press(key)
    np.testing.assert_allclose(window_values(place)[:3], [x - 1, y, stride - 0.8], atol=0.15)

def test_window_over_other_images(reader):
    "A photograph in colour, and an empty sheet to draw on, where the mouse leaves the window alone"
    place = reader.widget('window')
    source = place.get_by_label('Image', exact=True)
    source.select_option('photograph')
    reader.wide('window', 100)
    assert np.ptp(reader.pixels(place, 'The image').astype(int), axis=2).max() > 50 # has colours
    source.select_option('own')
    reader.wide('window', 28)
    before = window_values(place)
    stroke(reader, place.locator('canvas').first, [(9, 9), (12, 9)])
    assert (reader.pixels(place, 'The image')[9, 9:13, 0] == 255).all()
    assert window_values(place) == before

def test_a_picture_file(reader, tmp_path):
    "A bad file leaves image and list as they were; a good one can be followed by another"
    place = reader.widget('window')
    source, file = place.get_by_label('Image', exact=True), place.locator('input[type=file]')
    source.select_option('digit')
    (tmp_path / 'bad.png').write_text('no picture')
    Image.new('RGB', (30, 20), 'red').save(tmp_path / 'red.png')
    Image.new('RGB', (30, 20), 'blue').save(tmp_path / 'blue.png')
    file.set_input_files(tmp_path / 'bad.png')
    place.get_by_text('this file is no picture').wait_for()
    assert source.input_value() == 'digit'
    source.select_option('photograph')
    assert not place.locator('.live-problem').count()
    for channel, name in ((0, 'red'), (2, 'blue')):
        file.set_input_files(tmp_path / f'{name}.png')
        reader.page.wait_for_function(CENTRE, arg=(255 * np.eye(3, dtype=int)[channel]).tolist())
        assert place.get_by_role('button', name='Another file').count() == 1
        image = reader.pixels(place, 'The image')
        assert image.shape == (100, 100, 3) and image[50, 50].argmax() == channel
        assert source.input_value() == 'file'
