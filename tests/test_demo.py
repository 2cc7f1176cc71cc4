"What `draw demo` writes and serves, without a browser"
import json, threading
from urllib.request import urlopen
import numpy as np
import pytest
import torch
from PIL import Image
from draw_nbdev.data import mnist
from draw_nbdev.demo import live_files, make_server
from draw_nbdev.model import DRAW, PARTS, DRAWConfig

@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The files of a demonstration with a network of one's own, which learned from zeros and ones"
    own = tmp_path_factory.mktemp('own')
    DRAW(DRAWConfig(glimpses=2, hidden_size=4)).save_pretrained(own)
    (own / 'training.json').write_text(json.dumps({'data': {'name': 'mnist_once'}}))
    return live_files(tmp_path_factory.mktemp('page'), own)

def test_own_network(page):
    "First in the list, and given images of zeros and ones as those that it learned from"
    first, *others = json.loads((page / 'models.json').read_text())
    assert first['name'] == 'own' and first['binary'] and first['kind'] == 'draw'
    assert 'own' not in [row['name'] for row in others] and others[0]['name'] == 'mnist'
    assert {row['name']: row['binary'] for row in others}['svhn_sample'] is False

def test_packaged_network_that_is_not_in_the_list(tmp_path):
    first, *_ = json.loads((live_files(tmp_path, 'mnist_150_epochs') / 'models.json').read_text())
    assert first['title'] == 'mnist_150_epochs' and first['binary']

@pytest.mark.parametrize('text', ['', '[]', '{"data": 3}', '{"data": null}'])
def test_own_network_with_a_damaged_history(text, tmp_path):
    DRAW(DRAWConfig(glimpses=2, hidden_size=4)).save_pretrained(tmp_path / 'own')
    (tmp_path / 'own/training.json').write_text(text)
    with pytest.raises(ValueError, match='training.json is damaged: remove it'):
        live_files(tmp_path / 'page', tmp_path / 'own')

def test_digits(page):
    "Twenty test digits in each row, a row for each class, in the order of the test set"
    sheet, data = np.asarray(Image.open(page / 'digits.png')), mnist(train=False)
    assert sheet.shape == (280, 560)
    for label in (0, 3, 9):
        row = data.data[data.targets == label][:20].numpy()
        for place in (0, 7, 19):
            found = sheet[28 * label:28 * (label + 1), 28 * place:28 * (place + 1)]
            np.testing.assert_array_equal(found, row[place])

def test_server(page):
    "For this machine alone, read anew every time; a port that is taken is told as that"
    server = make_server(page, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert server.server_address[0] == '127.0.0.1'
        with urlopen(f'http://127.0.0.1:{server.server_port}/live.js') as answer:
            assert answer.headers['Cache-Control'] == 'no-cache'
            assert answer.headers['Content-Type'] == 'text/javascript'
        with pytest.raises(ValueError, match=f'port {server.server_port} is taken: choose another'):
            make_server(page, server.server_port)
    finally:
        server.shutdown()
        server.server_close()

class Other(torch.nn.Module):
    "A likelihood without weights, which a file of weights does not betray"
    def __init__(self, config): super().__init__()
    def forward(self, canvas): return torch.distributions.Normal(canvas, 1.)
    def canvas_of(self, mean): return mean

def test_own_network_with_other_parts(tmp_path, monkeypatch):
    "The page would show it as if it had those of the paper"
    monkeypatch.setitem(PARTS['likelihood'], 'other', Other)
    config = DRAWConfig(glimpses=2, hidden_size=4, likelihood_part='other')
    DRAW(config).save_pretrained(tmp_path / 'own')
    with pytest.raises(ValueError, match='has parts of its own, and the page knows those of'):
        live_files(tmp_path / 'page', tmp_path / 'own')
