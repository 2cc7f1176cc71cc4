"""What those who build on the package do, and where it must not go on in silence

Most tests are named for something that once gave another network, another number or other data than
was meant, without an error; some for an error that named something else.
"""
from __future__ import annotations # As many write it; annotations are then strings
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple
import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributions, nn
import draw_nbdev.model as model_module
from draw_nbdev import cli, loading, plots
from draw_nbdev.attention import AttentiveRead, AttentiveWrite, read_patch
from draw_nbdev.checkpoints import differences, read_metrics, read_run
from draw_nbdev.classifier import (NETWORKS, ClassifyTask, Convolutional, ConvolutionalConfig,
                                   DifferentiableRAM, RAMConfig, classification_error,
                                   network_for)
from draw_nbdev.data import Images
from draw_nbdev.data_sets import find
from draw_nbdev.digits import LabelledImages
from draw_nbdev.evaluation import evaluate, evaluating, nearest_images
from draw_nbdev.images import image_folder
from draw_nbdev.loss import bound, importance_weighted_bound, reconstruction_loss
from draw_nbdev.loading import find_weights
from draw_nbdev.model import DRAW, PARTS, Bernoulli, DRAWConfig
from draw_nbdev.options import TrainOptions, learning_rate
from draw_nbdev.plots import learning_curves
from draw_nbdev.runs import check_loading, describe
from draw_nbdev.training import FineTuneTask, Task, train, update_average

SMALL = DRAWConfig(height=5, width=7, channels=2, glimpses=3, hidden_size=8, latent_size=3,
                   read_size=2, write_size=3)
QUICK = TrainOptions(epochs=1, batch_size=4, kl_warmup=0)

def toy(split='train', kind=Images):
    "Noise of zeros and ones"
    pixels = torch.rand(8, 2, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    return kind(pixels, 'toy', split)

# Weights

def test_a_folder_named_like_packaged_weights(tmp_path, monkeypatch):
    "`train` returns what it trained; a `Path` is a folder; a name that could be both is refused"
    monkeypatch.chdir(tmp_path)
    trained = train(SMALL, toy(), toy('valid'), 'mnist', QUICK)
    assert trained.config == SMALL
    for place in (Path('mnist'), './mnist'):
        assert DRAW.from_pretrained(place).config == SMALL
    with pytest.raises(ValueError, match='write ./mnist'): find_weights('mnist')
    assert find_weights('two_digits').is_absolute() # no such folder here

def test_what_a_part_or_a_task_lacks(tmp_path):
    "One line that names it, where an AttributeError would come from far away"
    class Blind(nn.Module):
        def forward(self, images, errors, hidden): return images.flatten(1), None
    class Pixels(nn.Module):
        def forward(self, canvas): return distributions.Normal(canvas, 1., validate_args=False)
    class Bare(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.weight = config, nn.Parameter(torch.ones(()))
    class Plain(Task):
        network = Bare
        def start(self, config, train_set): return Bare(config)
    with pytest.raises(ValueError, match='Blind has no features'):
        DRAW(SMALL, read=Blind())
    with pytest.raises(ValueError, match='Pixels has no method canvas_of'):
        DRAW(SMALL, likelihood=Pixels()).start_from(toy().mean())
    with pytest.raises(ValueError, match='Bare has no save_pretrained'):
        train(SMALL, toy(), toy('valid'), tmp_path / 'run', QUICK, Plain())
    for config in ('mnist', None, DRAWConfig):
        with pytest.raises(ValueError, match='config is the sizes of a network'):
            train(config, toy(), toy('valid'), tmp_path / 'run', QUICK)
    assert not (tmp_path / 'run/state-00000001').exists()

def test_pictures_of_a_network_with_windows_of_another_kind(tmp_path):
    "Drawn without frames by the command; drawing frames says what is missing"
    class Round(NamedTuple):
        radius: torch.Tensor
    class RoundWrite(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.shape = config.channels, config.height, config.width
            self.layer = nn.Linear(config.hidden_size, config.height * config.width)
        def forward(self, hidden):
            return self.layer(hidden).view(-1, *self.shape), Round(hidden[:, 0])
    PARTS['write']['round'] = RoundWrite
    try:
        DRAW(replace(SMALL, channels=1, write_part='round')).save_pretrained(tmp_path / 'own')
        cli.generate_command(str(tmp_path / 'own'), 4, None, tmp_path / 'drawing', 0)
        drawing = DRAW.from_pretrained(tmp_path / 'own').generate(1)
        with pytest.raises(ValueError, match='center_x.* and these do not'):
            plots.sequence_grid(drawing.canvases.sigmoid(), drawing.windows, 3)
    finally: del PARTS['write']['round']
    assert (tmp_path / 'drawing/sequence.png').is_file()

def test_nothing_is_written_for_images_that_cannot_be_shown(tmp_path):
    DRAW(SMALL).save_pretrained(tmp_path / 'own') # of two channels
    with pytest.raises(ValueError, match='1 or 3'):
        cli.generate_command(str(tmp_path / 'own'), 4, None, tmp_path / 'drawing', 0)
    assert not (tmp_path / 'drawing').exists()

def test_a_part_exchanged_after_construction(tmp_path):
    model = DRAW(SMALL)
    model.likelihood = nn.Module()
    with pytest.raises(ValueError, match='likelihood was exchanged'):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / 'config.json').exists()

class Halving(DRAW):
    "Half of the canvas is forgotten in every step"
    def __init__(self, config: DRAWConfig): super().__init__(config)

    def steps(self, images, noise):
        for step in super().steps(images, noise): yield step._replace(canvas=step.canvas / 2)

def test_a_subclass_is_not_taken_for_draw(tmp_path):
    "config.json has its name; it may begin with weights of DRAW, and not the other way round"
    Halving(SMALL).save_pretrained(tmp_path / 'half')
    assert json.loads((tmp_path / 'half' / 'config.json').read_text())['model_type'] == 'Halving'
    assert type(Halving.from_pretrained(tmp_path / 'half')) is Halving
    with pytest.raises(ValueError, match="'Halving'"): DRAW.from_pretrained(tmp_path / 'half')
    DRAW(SMALL).save_pretrained(tmp_path / 'plain')
    assert type(Halving.from_pretrained(tmp_path / 'plain')) is Halving

def test_steps_without_decode():
    "A network with steps of its own does not generate by DRAW's"
    with pytest.raises(ValueError, match='write Halving.decode'): Halving(SMALL).generate()
    class Whole(Halving): decode = DRAW.decode
    assert len(Whole(SMALL).generate(2).canvases) == 4

class Exchanging(DRAW):
    def __init__(self, config: DRAWConfig):
        super().__init__(config)
        self.read = Dropping(5, 7, 2, 2, 8)

def test_a_subclass_that_exchanges_a_part(tmp_path):
    "Its constructor does so again when it is loaded"
    model = Exchanging(SMALL)
    model.save_pretrained(tmp_path)
    again = Exchanging.from_pretrained(tmp_path)
    assert type(again.read) is Dropping and again.config == SMALL

def test_a_hub_that_cannot_be_reached(monkeypatch):
    def download(*_, **__): raise ConnectionError('no route')
    monkeypatch.setattr(loading, 'hf_hub_download', download)
    with pytest.raises(OSError, match='hf://owner/name cannot be fetched .no route'):
        DRAW.from_pretrained('hf://owner/name')

def test_a_subclass_on_the_hub(tmp_path, monkeypatch):
    "The same as from a folder"
    Halving(SMALL).save_pretrained(tmp_path)
    def download(owner_name, file, **options):
        assert (owner_name, options) == ('owner/half', {'revision': 'first'})
        return str(tmp_path / file)
    monkeypatch.setattr(loading, 'hf_hub_download', download)
    with pytest.raises(ValueError, match="'Halving'"):
        DRAW.from_pretrained('hf://owner/half', revision='first')

def test_a_configuration_that_is_given(tmp_path):
    DRAW(SMALL).save_pretrained(tmp_path)
    longer = replace(SMALL, glimpses=9)
    assert DRAW.from_pretrained(tmp_path, config=longer).config == longer

def test_wrong_arguments_are_not_damaged_weights(tmp_path):
    DRAW(SMALL).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match='glimpses'): DRAW.from_pretrained(tmp_path, glimpses=2)

class Bare(DRAW):
    def __init__(self, config): super().__init__(config) # Says nothing about its argument

@dataclass(frozen=True)
class Named(DRAWConfig):
    count: int = 3
    title: str = ''

def test_annotations_that_are_missing_or_strings(tmp_path):
    Bare(SMALL).save_pretrained(tmp_path)
    assert Bare.from_pretrained(tmp_path).config == SMALL
    with pytest.raises(ValueError, match='count must be int'): Named(count='3')

@pytest.mark.parametrize('owner, name', [(AttentiveRead, 'forward'), (DRAW, 'steps'),
                                         (nn.LayerNorm, 'forward')])
def test_patched_code_runs(owner, name, monkeypatch):
    "A method exchanged on the class takes effect in `forward`, too"
    model, images = DRAW(replace(SMALL, layer_norm=True)), torch.rand(2, 2, 5, 7).round()
    assert model.unchanged()
    known, called = getattr(owner, name), []
    def patched(*args):
        called.append(name)
        return known(*args)
    monkeypatch.setattr(owner, name, patched)
    assert not model.unchanged()
    model(images)
    assert called

# Numbers

@pytest.mark.parametrize('pick', [lambda x: x[:, 0], lambda x: x[0, 0], lambda x: x[:1]])
def test_images_that_would_be_broadcast(pick):
    model, images = DRAW(replace(SMALL, channels=1)), torch.rand(4, 1, 5, 7).round()
    with pytest.raises(ValueError, match='does not fit'):
        bound(model(images), pick(images), model.likelihood)

@pytest.mark.parametrize('summed', [0, 1, 3])
def test_a_log_prob_summed_beforehand(summed):
    "A likelihood may be `Independent`, and its canvas may have more channels than the images"
    def likelihood(canvas):
        mean, log_deviation = canvas.chunk(2, dim=1)
        normal = distributions.Normal(mean, log_deviation.exp())
        return distributions.Independent(normal, summed) if summed else normal
    canvas, images = torch.randn(2, 4, 3, 5), torch.randn(2, 2, 3, 5)
    expected = -distributions.Normal(canvas[:, :2], canvas[:, 2:].exp()).log_prob(images)
    losses = reconstruction_loss(canvas, images, likelihood)
    torch.testing.assert_close(losses, expected.sum((1, 2, 3)))
    with pytest.raises(ValueError, match='does not fit'):
        reconstruction_loss(canvas, images[:, 0], likelihood)

def test_glimpses_that_contradict():
    model, images = DRAW(SMALL), torch.rand(1, 2, 5, 7)
    for call in (lambda: model(images, glimpses=0), lambda: model.generate(glimpses=0),
                 lambda: importance_weighted_bound(model, images, 1, glimpses=0)):
        with pytest.raises(ValueError, match='at least 1'): call()
    for noise, glimpses in ((torch.randn(4, 1, 3), 2), (torch.randn(0, 1, 3), None)):
        with pytest.raises(ValueError, match='noise of shape'): model(images, noise, glimpses)
    assert len(model(images, torch.randn(5, 1, 3)).means) == 5

class Dropping(AttentiveRead):
    "With dropout, and a count of the calls in either mode"
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.dropout, self.modes = nn.Dropout(.5), []
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, images, errors, h_dec):
        self.modes.append(self.training)
        if self.training: self.calls += 1
        reading, window = super().forward(images, errors, h_dec)
        return self.dropout(reading), window

def test_evaluation_without_dropout():
    "The same numbers again, and every module as it was"
    model = DRAW(SMALL, read=Dropping(5, 7, 2, 2, 8)).train()
    model.write.eval()
    assert evaluate(model, toy('valid')).bound == evaluate(model, toy('valid')).bound
    assert not any(model.read.modes)
    assert model.training and model.read.dropout.training and not model.write.training
    with pytest.raises(KeyError), evaluating(model): raise KeyError
    assert model.training

def test_classification_without_dropout():
    model, modes = Convolutional(ConvolutionalConfig(height=40, width=40)).train(), []
    model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    images = torch.zeros(2, 1, 40, 40, dtype=torch.uint8)
    classification_error(model, LabelledImages(images, torch.tensor([1, 2]), 'black', 'valid'))
    assert modes == [False] and model.training

def test_validation_without_dropout_and_with_buffers(tmp_path):
    "The averaged network is in evaluation mode, and has the buffers of the one that learns"
    seen = []
    class Dropped(DRAW):
        def __init__(self, config): super().__init__(config, read=Dropping(5, 7, 2, 2, 8))

    class Looking(Task):
        network = Dropped

        def validate(self, model, data, glimpses, limit):
            seen.append((model.training, model.read.training, model.read.calls.item()))
            return super().validate(model, data, glimpses, limit)

    train(SMALL, toy(), toy('valid'), tmp_path, QUICK, Looking())
    assert seen == [(False, False, 6)] # two updates of three steps

@dataclass(frozen=True)
class Wider(DRAWConfig): kernel: int = 3

class Sub(DRAW): pass

def normed(config):
    model = DRAW(config)
    torch.nn.utils.parametrizations.weight_norm(model.encoder.gates)
    return model

@pytest.mark.parametrize('config, start, told', [
    (Wider(**asdict(SMALL)), DRAW, 'with kernel: make a subclass whose __init__'),
    (SMALL, lambda c: DRAW(c, read=Dropping(5, 7, 2, 2, 8)), "no read part 'Dropping'"),
    (SMALL, lambda c: DRAW(c, likelihood=partial(Bernoulli)), r'likelihood= was a partial'),
    (SMALL, Sub, "holds a network of type 'Sub'"),
    (SMALL, normed, 'make a subclass whose __init__ exchanges it'),
], ids=['field', 'part', 'nameless', 'subclass', 'exchanged'])
def test_what_could_not_be_loaded_is_not_trained(config, start, told, tmp_path):
    "Training says so before its first update, and not after its last epoch"
    class Starting(Task):
        def start(self, config, train_set): return start(config)
    told = f'^what this run keeps could not be loaded again: .*{told}'
    with pytest.raises(ValueError, match=told):
        train(config, toy(), toy('valid'), tmp_path / 'run', QUICK, Starting())
    assert not (tmp_path / 'run/run.json').exists()

def test_networks_that_want_more(tmp_path):
    class Wanting(DRAW):
        def __init__(self, config, classes): super().__init__(config)
    class Starting(Task):
        network = Wanting
        def start(self, config, train_set): return Wanting(config, 3)
    with pytest.raises(ValueError, match="^what this run keeps could not be .*'classes'"):
        train(SMALL, toy(), toy('valid'), tmp_path / 'run', QUICK, Starting())

def test_no_room_to_rehearse(tmp_path, monkeypatch):
    "Then the run goes on without"
    def refuse(*_, **__): raise FileNotFoundError('No usable temporary directory found')
    monkeypatch.setattr('tempfile.TemporaryDirectory', refuse)
    check_loading(DRAW(SMALL), DRAW)

def test_rehearsal_draws_nothing(tmp_path):
    "What is loaded to try it is made of other random numbers than the run"
    class Watching(Task):
        def start(self, config, train_set):
            model = super().start(config, train_set)
            self._after = torch.get_rng_state()
            return model

        def optimizers(self, model, options):
            assert torch.equal(torch.get_rng_state(), self._after)
            return super().optimizers(model, options)
    train(SMALL, toy(), toy('valid'), tmp_path, QUICK, Watching())

def test_windows_of_another_size():
    "The paper's part, made with another size, is not one that the fused scan knows"
    for kind, made in (('read', AttentiveRead), ('write', AttentiveWrite)):
        part = {kind: made(5, 7, 2, 4, 8)}
        model, images = DRAW(SMALL, **part), torch.rand(3, 2, 5, 7)
        noise = torch.randn(SMALL.glimpses, 3, SMALL.latent_size)
        *_, last = model.steps(images, noise)
        torch.testing.assert_close(model(images, noise).canvas, last.canvas)
        assert not model.unchanged() and DRAW(SMALL).unchanged()

def test_classifiers_of_ones_own(tmp_path, monkeypatch):
    "Two networks of one configuration are not mixed up; one without known matrices has Adam"
    class Head(DifferentiableRAM):
        model_type = 'head'
        def __init__(self, config):
            super().__init__(config)
            self.lstm = None
            self.cell = nn.GRUCell(config.channels * config.read_size**2, config.hidden_size)
    monkeypatch.setitem(NETWORKS, 'head', Head)
    with pytest.raises(ValueError, match='DifferentiableRAM and Head are made from RAMConfig'):
        network_for(RAMConfig())
    for options in (QUICK, replace(QUICK, weight_decay=0.1), replace(QUICK, optimizer='muon')):
        head = Head(RAMConfig())
        [optimizer] = ClassifyTask(Head).optimizers(head, options)
        assert {p for o in optimizer.param_groups for p in o['params']} == {*head.parameters()}
    sizes, task = RAMConfig(height=5, width=7, channels=2), ClassifyTask(DifferentiableRAM)
    with pytest.raises(ValueError, match='toy says nothing of classes'):
        train(sizes, toy(), toy('valid'), tmp_path, QUICK, task)

def test_curves_of_a_density():
    "A density may be above one, and its reconstruction loss below zero"
    rows = [dict(step=step, epoch=0, split='valid', bound=-90., reconstruction=-100., latent=10.)
            for step in (1, 2)]
    low, high = learning_curves(rows).axes[1].get_ylim()
    assert low < -100 and high > 10

def test_images_without_channels_are_refused():
    with pytest.raises(ValueError, match='shape'):
        read_patch(torch.rand(4, 8, 8), torch.rand(4, 2, 8), torch.rand(4, 2, 8))
    half = read_patch(torch.rand(4, 1, 8, 8).bfloat16(), torch.rand(4, 2, 8), torch.rand(4, 2, 8))
    assert half.dtype == torch.float32

def test_fields_of_other_kinds():
    @dataclass(frozen=True)
    class Config(DRAWConfig):
        kernel: tuple[int, int] = (3, 5)
        padding: Literal['same', 'valid'] = 'same'
        depth: int | None = None
    assert Config().kernel == (3, 5)
    with pytest.raises(ValueError, match='depth must be at least 1'): Config(depth=0)

def test_buffers_follow():
    model = nn.BatchNorm1d(2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    model(torch.randn(5, 2) + 3)
    update_average(averaged, model, 0.9)
    assert torch.equal(averaged.module.running_mean, model.running_mean)

# Data

def test_bits():
    "Truth values are bits; bytes that are nothing but 0 and 1 of 255 are a mistake"
    pixels = torch.rand(3, 1, 4, 5) < 0.5
    bits = Images(pixels, 'bits', 'train')
    assert bits.levels == 1 and torch.equal(bits.batch([0, 1, 2]), pixels.float())
    with pytest.raises(ValueError, match='levels=1'): Images(pixels.to(torch.uint8), 'b', 'train')
    assert Images(pixels.to(torch.uint8), 'dark', 'train', levels=255).levels == 255
    for black in (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 1 / 255)):
        assert Images(black, 'black', 'train').levels == 255

def test_other_kinds_of_data_sets():
    data = torch.utils.data.TensorDataset(torch.rand(4, 2, 5, 7))
    with pytest.raises(TypeError, match='TensorDataset is no Images'): evaluate(DRAW(SMALL), data)
    with pytest.raises(TypeError, match='TensorDataset'): train(SMALL, data, data, 'run', QUICK)

def save_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count): Image.new('L', (6, 4), 10 * i).save(folder / f'{i}.png')

def test_classes_that_are_named_like_splits(tmp_path):
    "COCO has a class of trains"
    for name in ('train', 'car', 'bus'): save_images(tmp_path / name, 20)
    with pytest.warns(UserWarning, match='39 more images are left out'):
        assert len(image_folder(tmp_path, 'train')) == 16

def test_a_folder_named_like_a_data_set(tmp_path, monkeypatch):
    "It is not mistaken for that set: not its path, however short, nor the network's data later"
    save_images(tmp_path / 'mnist', 20)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / 'mnist', Path('mnist'), './mnist'):
        assert find(path, 'train').name == 'mnist_images'

def test_runs_differ_by_what_they_learn(tmp_path):
    "Levels, kind of data and task; runs from before these were written down go on"
    class Louder(Task): pass
    class Redrawn(Images): pass
    given = SMALL, toy(), toy('valid'), QUICK
    run = describe(*given, Task())
    assert differences(run, describe(*given, Task())) == []
    assert differences(run, describe(*given, Louder())) == ['task.kind Task there, Louder here']
    redrawn = describe(SMALL, toy(kind=Redrawn), toy('valid'), QUICK, Task())
    assert differences(run, redrawn) == ['data.kind Images there, Redrawn here']
    grey = Images(toy().pixels * 2, 'toy', 'train', levels=2)
    grey.checksum = toy().checksum
    assert differences(run, describe(SMALL, grey, toy('valid'), QUICK, Task())) == [
        'data.levels 1 there, 2 here']
    labelled = [LabelledImages(toy('valid').pixels, torch.arange(len(toy('valid'))) % n, 'toy',
                               'valid', levels=1) for n in (2, 3)]
    runs = [describe(SMALL, toy(), images, QUICK, Task()) for images in labelled]
    [different] = differences(*runs)
    assert different.startswith('data.valid_labels')
    assert 'data.valid_kind Images there, LabelledImages here' in differences(run, runs[0])
    newer = json.loads(json.dumps(run))
    newer['options']['of_tomorrow'] = None
    assert differences(newer, run) == ['options.of_tomorrow None there, None here']
    old = json.loads(json.dumps(run))
    for name in ('levels', 'kind', 'valid_levels', 'valid_kind'): del old['data'][name]
    del old['task']
    file = tmp_path / 'run.json'
    file.write_text(json.dumps(old), encoding='utf-8')
    assert differences(read_run(file), run) == []

def test_another_setting_of_a_task_is_another_run(tmp_path):
    "Numbers, texts and nothing; a run from before they were written down goes on"
    def run(limit):
        return describe(SMALL, toy(), toy('valid'), QUICK, ClassifyTask(Convolutional, limit=limit))
    assert run(64)['task'] == {
        'every_glimpse': False, 'limit': 64, 'score': 'error', 'kind': 'ClassifyTask',
        'network': 'Convolutional'}
    assert differences(run(64), run(64)) == []
    assert differences(run(64), run(None)) == ['task.limit 64 there, None here']
    assert differences(run(None), run(64)) == ['task.limit None there, 64 here']
    counting = Task()
    counting.beta, counting._count = 2., 3
    assert describe(SMALL, toy(), toy('valid'), QUICK, counting)['task'] == {
        'beta': 2., 'score': 'bound', 'kind': 'Task', 'network': 'DRAW'}
    # what a task counts for itself is no setting
    file = tmp_path / 'run.json'
    file.write_text(json.dumps({**run(64), 'task': 'ClassifyTask'}), encoding='utf-8')
    assert differences(read_run(file), run(16)) == []

def test_training_on_with_a_network_of_ones_own(tmp_path):
    "Its parts may share a tensor, and its configuration may have a field that the weights' has not"
    class Twin(DRAW):
        def __init__(self, config: DRAWConfig, **parts):
            super().__init__(config, **parts)
            self.write.window = self.read.window
    class TwinTask(FineTuneTask): network = Twin
    @dataclass(frozen=True)
    class More(DRAWConfig): classes: int = 3
    Twin(SMALL).save_pretrained(tmp_path)
    task = TwinTask(tmp_path)
    begun, kept = task.start(SMALL, toy()), Twin.from_pretrained(tmp_path)
    assert begun.write.window is begun.read.window
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), kept.parameters()))
    with pytest.raises(ValueError, match='has classes None, and the run is to have 3'):
        task.check(More(**asdict(SMALL)))

def test_settings_of_a_class_and_labels_are_another_run():
    "Whatever keeps them: a class, its base, a tuple; the network; the classes of the images"
    def run(task, train_set=None):
        return describe(SMALL, train_set or toy(), toy('valid'), QUICK, task)

    class First(Task): weight, sizes = 0.5, (1, 2)
    class Second(First): pass
    task = run(Second())['task']
    assert task['weight'] == 0.5 and task['sizes'] == [1, 2] # as run.json will have it
    for name, value, told in (('weight', 100, '0.5'), ('sizes', (3, 4), '[1, 2]'),
                              ('score', 'latent', 'bound'), ('network', Halving, 'DRAW')):
        class Other(Second): pass
        setattr(Other, name, value)
        different = differences(run(Second()), run(Other()))
        assert len(different) == 2 and f'task.{name} {told} there' in '; '.join(different)
    class Odd(Task): names = {'a': object()}
    with pytest.raises(ValueError, match='begins with an underscore'): run(Odd())

    one, two = (LabelledImages(toy().pixels == 1, torch.arange(8) % classes, 'toy', 'train')
                for classes in (2, 3))
    different = differences(run(Task(), one), run(Task(), two))
    assert len(different) == 1 and different[0].startswith('data.labels')

# Training

def test_rates_of_groups_keep_their_ratio(tmp_path):
    "The schedule scales what a task's optimiser was made with, also when a run goes on"
    seen = []
    class Watched(torch.optim.Adam):
        def step(self, closure=None):
            seen.append([group['lr'] for group in self.param_groups])
            return super().step(closure)
    class Groups(Task):
        def optimizers(self, model, options):
            decoder = list(model.decoder.parameters())
            rest = [p for name, p in model.named_parameters() if not name.startswith('decoder')]
            return [Watched([{'params': decoder, 'lr': 0.}, {'params': rest, 'lr': 1e-4}])]
    for epochs in (1, 2):
        options = replace(QUICK, epochs=epochs, learning_rate=1e-2, rate_warmup=2)
        train(SMALL, toy(), toy('valid'), tmp_path / 'run', options, Groups())
    assert len(seen) == 4 and all(frozen == 0 for frozen, _ in seen)
    expected = [1e-4 * rate / 1e-2 for rate in (
        *(learning_rate(replace(options, epochs=1), step, 2) for step in (0, 1)),
        *(learning_rate(options, step, 4) for step in (2, 3)))]
    np.testing.assert_allclose([rate for _, rate in seen], expected)

@pytest.mark.parametrize('value', [float('nan'), None, 'low', torch.tensor(float('nan'))])
def test_validation_that_gives_no_number(value, tmp_path):
    "One line, and no weights that were chosen by it"
    class Wrong(Task):
        def validate(self, model, data, glimpses, limit):
            return {} if value is None else {'bound': value}
    with pytest.raises(ValueError, match='validation gave bound = '):
        train(SMALL, toy(), toy('valid'), tmp_path, QUICK, Wrong())
    assert not (tmp_path / 'best').exists()

def test_a_start_of_other_sizes(tmp_path):
    "The run would say one number of steps and its weights another"
    class Longer(Task):
        def start(self, config, train_set): return DRAW(replace(config, glimpses=7))
    with pytest.raises(ValueError, match='glimpses 7, and the run is to have 3'):
        train(SMALL, toy(), toy('valid'), tmp_path / 'run', QUICK, Longer())

def test_options_of_ones_own(tmp_path):
    "A subclass of `TrainOptions` goes on like any other"
    @dataclass(frozen=True)
    class More(TrainOptions): weight: float = 1.
    for epochs in (1, 2):
        train(SMALL, toy(), toy('valid'), tmp_path, More(epochs=epochs, batch_size=4, weight=2.))

# Parts

class ThroughHoles(nn.Module):
    "Writes one channel for two"
    def __init__(self, config, *_):
        super().__init__()
        self.layer = nn.Linear(config.hidden_size, config.height * config.width)
        self.size = config.height, config.width

    def forward(self, hidden): return self.layer(hidden).view(-1, 1, *self.size), None

def test_an_update_of_another_shape():
    "It is not repeated over channels or images"
    model = DRAW(replace(SMALL, attention=False), write=ThroughHoles)
    with pytest.raises(ValueError, match=r'update of shape \(4, 1, 5, 7\)'):
        model(torch.rand(4, 2, 5, 7))
    with pytest.raises(ValueError, match='update of shape'): model.generate(2)

def test_a_part_that_is_called_like_another(tmp_path):
    "Loading would make the one that `PARTS` has"
    def lstm(config, size): return model_module.LSTMCell(size, config.hidden_size)
    with pytest.raises(ValueError, match="another cell part 'lstm'"): DRAW(SMALL, cell=lstm)
    assert DRAW(SMALL, cell=model_module.lstm).config.cell_part == 'lstm'
    with pytest.raises(ValueError, match="as read_part='whole'"): DRAW(SMALL, read='whole')

def test_a_part_of_a_part_exchanged(tmp_path):
    model = DRAW(SMALL)
    model.encoder.norm = nn.Tanh()
    with pytest.raises(ValueError, match='encoder.norm was exchanged'):
        model.save_pretrained(tmp_path)

class WithParts(DRAW):
    "Hands on whatever it is given"
    def __init__(self, config: DRAWConfig, **parts):
        super().__init__(config, **parts)
        self.head = nn.Linear(3, 3, bias=False) # of a task
        self.register_buffer('mask', torch.tensor([0., -torch.inf]))

def test_a_subclass_with_more(tmp_path):
    "Keywords, a head and a mask: it is loaded, goes on, and the fused scan serves it"
    class Wide(Task): network = WithParts
    for epochs in (1, 2):
        model = train(SMALL, toy(), toy('valid'), tmp_path, replace(QUICK, epochs=epochs), Wide())
    assert type(model) is WithParts and model.unchanged()
    model.read.window.register_forward_hook(lambda *_: None)
    assert not model.unchanged()

class Tied(DRAW):
    "Reads and writes by one window"
    def __init__(self, config: DRAWConfig):
        super().__init__(config)
        self.write.window = self.read.window

def test_parts_that_share_weights(tmp_path):
    "They are saved, go on and are loaded as one"
    class Sharing(Task): network = Tied
    for epochs in (1, 2):
        options = replace(QUICK, epochs=epochs)
        model = train(SMALL, toy(), toy('valid'), tmp_path, options, Sharing())
    assert model.write.window is model.read.window

# What is not meant

def test_bits_are_weighted_like_floats():
    "Noise is not cast to whatever the images are"
    model, images = DRAW(SMALL), toy().batch([0, 1, 2])
    def weighted(x):
        return importance_weighted_bound(model, x, 5, torch.Generator().manual_seed(0))
    for kind in (torch.bool, torch.uint8, torch.long):
        torch.testing.assert_close(weighted(images.to(kind)), weighted(images))

def test_what_no_network_takes():
    "Bytes up to 255, latents of another length, fewer than no images, no glimpse"
    model = DRAW(SMALL)
    with pytest.raises(ValueError, match='divide them by 255'):
        model(torch.full((1, 2, 5, 7), 255, dtype=torch.uint8))
    for shape in ((0, 3, 3), (2, 3, 5), (3, 3)):
        with pytest.raises(ValueError, match='latents of shape'): model.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match='count must be'): model.generate(-1)
    reader = DifferentiableRAM(RAMConfig(7, 9, glimpses=2, hidden_size=6, read_size=3, classes=3))
    for glimpses in (0, -1):
        with pytest.raises(ValueError, match='glimpses must be at least 1'):
            reader(torch.zeros(1, 1, 7, 9), glimpses)

def test_what_no_set_takes():
    pixels = torch.zeros(2, 1, 3, 4, dtype=torch.uint8)
    for levels in (0, -1):
        with pytest.raises(ValueError, match='levels must be'):
            Images(pixels, 'a', 'valid', levels=levels)
    data = Images(pixels, 'a', 'valid')
    with pytest.raises(ValueError, match='queries must be floats'): nearest_images(pixels, data)
    with pytest.raises(ValueError, match='rows at least 1'):
        nearest_images(pixels.float(), data, -1)

def test_validation_images_of_another_shape(tmp_path):
    "It is told before anything is trained or written"
    other = Images(toy().pixels[..., :5] == 1, 'toy', 'valid')
    with pytest.raises(ValueError, match='do not fit'):
        train(SMALL, toy(), other, tmp_path / 'run', QUICK)
    assert not (tmp_path / 'run').exists()

def test_lines_that_are_no_metrics(tmp_path):
    good = {'step': 3, 'epoch': 0, 'split': 'valid', 'bound': 1.}
    rows = [good, {'step': 3}, {**good, 'split': 'test'}, {**good, 'epoch': None}, [], 'x']
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    assert read_metrics(tmp_path) == [good]

# Options

@pytest.mark.parametrize('wrong', [dict(epochs=1.5), dict(batch_size=50.), dict(clip_norm='1'),
                                   dict(learning_rate='0.1'), dict(seed=True)])
def test_options_of_another_type(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be of type'):
        TrainOptions(**wrong)

def test_numbers_of_numpy():
    assert TrainOptions(learning_rate=np.float64(2e-3)).learning_rate == 2e-3

def test_export_with_any_number_of_images():
    "The whole network, reference and all, with a batch that is left open"
    model = DRAW(SMALL, scan='reference').eval()
    batch = torch.export.Dim('batch', min=2, max=64)
    given = torch.rand(4, 2, 5, 7), torch.randn(3, 4, 3)
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {1: batch}))
    images, noise = torch.rand(9, 2, 5, 7), torch.randn(3, 9, 3)
    got, expected = program.module()(images, noise), model(images, noise)
    torch.testing.assert_close(tuple(got), tuple(expected))

# Parts, tasks and data that nobody had foreseen

class Scaled(nn.Module):
    "A likelihood with a setting that the configuration does not have"
    def __init__(self, config, deviation=1., drop=0.1):
        super().__init__()
        self.deviation, self.drop = deviation, nn.Dropout(drop)

    def forward(self, canvas):
        return distributions.Normal(self.drop(canvas), self.deviation, validate_args=False)

    def canvas_of(self, mean): return mean

@pytest.mark.parametrize('setting, told', [
    (dict(deviation=0.3), 'deviation = 0.3, and loading would make it with 1.0'),
    (dict(drop=0.5), 'drop.p = 0.5, and loading would make it with 0.1')])
def test_settings_of_a_part_that_loading_would_forget(setting, told, tmp_path, monkeypatch):
    "Refused when it is saved; a function that makes the part keeps them"
    with pytest.raises(ValueError, match=told):
        DRAW(SMALL, likelihood=Scaled(SMALL, **setting)).save_pretrained(tmp_path)
    assert not (tmp_path / 'model.safetensors').exists()
    DRAW(SMALL, likelihood=Scaled(SMALL)).save_pretrained(tmp_path / 'usual')
    monkeypatch.setitem(PARTS['likelihood'], 'mine', lambda config: Scaled(config, **setting))
    DRAW(replace(SMALL, likelihood_part='mine')).save_pretrained(tmp_path / 'mine')
    again = DRAW.from_pretrained(tmp_path / 'mine').likelihood
    expected = Scaled(SMALL, **setting)
    assert (again.deviation, again.drop.p) == (expected.deviation, expected.drop.p)

def test_training_goes_on_from_weights_in_training_mode(tmp_path):
    "`from_pretrained` gives a network in evaluation mode, in which dropout does nothing"
    DRAW(SMALL, likelihood=Scaled).save_pretrained(tmp_path / 'first')
    modes = []
    class Fine(Task):
        def start(self, config, train_set):
            return DRAW.from_pretrained(tmp_path / 'first', likelihood=Scaled)
        def loss(self, model, *more, **weights):
            modes.append((model.training, model.likelihood.drop.training))
            return super().loss(model, *more, **weights)
    named = replace(SMALL, likelihood_part='Scaled')
    PARTS['likelihood']['Scaled'] = Scaled
    try: train(named, toy(), toy('valid'), tmp_path / 'second', QUICK, Fine())
    finally: del PARTS['likelihood']['Scaled']
    assert modes and set(modes) == {(True, True)}

def test_training_leaves_the_random_numbers_of_its_caller(tmp_path):
    "A random search would try the same thing again and again"
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drawn = []
    for name in 'abc':
        drawn.append(torch.rand(()))
        train(SMALL, toy(), toy('valid'), tmp_path / name, QUICK)
    torch.testing.assert_close(torch.stack(drawn), expected)

@dataclass
class Pair:
    low: float = 0.

@pytest.mark.parametrize('one, other', [
    (np.float32(1), np.float32(4)), (np.int64(1), np.int64(2)), (np.zeros(3), np.ones(3)),
    (torch.tensor(1.), torch.tensor(2.)), (torch.zeros(2, 2), torch.zeros(4)[:2].repeat(2) + 1),
    ({'a'}, {'a', 'b'}), (Path('a'), Path('b')), (Pair(), Pair(1.))],
    ids=['float32', 'int64', 'array', 'number', 'tensor', 'set', 'path', 'dataclass'])
def test_settings_of_every_kind_of_data(one, other):
    "A run does not go on with another setting, whatever holds it"
    def said(value):
        task = Task()
        task.setting = value
        return describe(SMALL, toy(), toy('valid'), QUICK, task)
    assert differences(said(one), said(other)) and not differences(said(one), said(one))

def test_layers_that_are_none(tmp_path):
    "What is no linear layer learns by Adam"
    class Deep(DRAW):
        def __init__(self, config: DRAWConfig):
            super().__init__(config)
            self.posterior = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 6))
            gates = self.encoder.gates
            self.encoder.gates = nn.Sequential(nn.Linear(gates.in_features, 32), nn.Identity())
    class Deeper(Task): network = Deep
    for name in ('adam', 'muon'):
        options = replace(QUICK, optimizer=name)
        assert type(train(SMALL, toy(), toy('valid'), tmp_path / name, options, Deeper())) is Deep

def of_loss(shown):
    class Wrong(Task):
        def loss(self, *given, **weights): return super().loss(*given, **weights)[0], shown
    return Wrong()

def of_validation(**shown):
    class Wrong(Task):
        def validate(self, *given): return super().validate(*given) | shown
    return Wrong()

def of_optimizers():
    class Wrong(Task):
        def optimizers(self, model, options): return torch.optim.Adam(model.parameters())
    return Wrong()

@pytest.mark.parametrize('task, told', [
    (of_loss({'cost': 3.}), "Wrong.loss shows 'cost' as float: make it Tensor"),
    (of_loss({'step': torch.zeros(4)}), "Wrong.loss shows 'step', which a row has already"),
    (of_loss({'kl_weight': torch.zeros(4)}), "Wrong.loss shows 'kl_weight', which a row has"),
    (of_validation(seconds=3.), "Wrong.validate shows 'seconds', which a row has already"),
    (of_validation(picture=object()), "Wrong.validate shows 'picture' as object"),
    (of_optimizers(), 'Wrong.optimizers is to return a list of optimisers, and not Adam'),
    (Task, r'give a task, Task\(\), and not its class')])
def test_tasks_that_give_what_a_run_cannot_use(task, told, tmp_path):
    "One line that names the method"
    with pytest.raises(ValueError, match=told):
        train(SMALL, toy(), toy('valid'), tmp_path, QUICK, task)

def test_options_that_are_a_dictionary(tmp_path):
    with pytest.raises(ValueError, match='must be a TrainOptions, and not dict'):
        train(SMALL, toy(), toy('valid'), tmp_path, {'epochs': 1})

def test_validation_may_give_tensors(tmp_path):
    "They are written as numbers"
    task = of_validation(extra=torch.tensor(2.5), more=torch.arange(3), mean=np.float32(0.5))
    train(SMALL, toy(), toy('valid'), tmp_path, QUICK, task)
    row, = (row for row in read_metrics(tmp_path) if row['split'] == 'valid')
    assert (row['extra'], row['more'], row['mean']) == (2.5, [0, 1, 2], 0.5)

class Both(nn.Sequential):
    "A likelihood without layers, which Python takes for false"
    def __init__(self, config): super().__init__()
    def forward(self, canvas): return distributions.Normal(canvas, 0.1, validate_args=False)
    def canvas_of(self, mean): return mean

def test_a_likelihood_that_is_empty():
    images, canvas = toy().batch(range(3)), torch.rand(3, 2, 5, 7)
    expected = -distributions.Normal(canvas, 0.1).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction_loss(canvas, images, Both(SMALL)), expected)

class Beta(nn.Module):
    "Two channels of canvas for each of the images"
    def __init__(self, config): super().__init__()
    def forward(self, canvas):
        mean, total = canvas[:, :2].sigmoid(), canvas[:, 2:].exp() + 2
        return distributions.Beta(mean * total, (1 - mean) * total, validate_args=False)

def test_images_of_a_canvas_with_more_channels():
    "The pictures have as many as the data"
    model = DRAW(SMALL, likelihood=Beta)
    canvases = torch.randn(3, 5, 4, 5, 7)
    pictures = model.images(canvases)
    assert pictures.shape == (3, 5, 2, 5, 7)
    torch.testing.assert_close(pictures, canvases[:, :, :2].sigmoid())

@pytest.mark.parametrize('window', [torch.zeros(4, 3), {'x': torch.zeros(4)}, 'window'])
def test_a_window_that_is_no_named_tuple(window):
    "Found in the first pass, not when pictures are made after the training"
    class Odd(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.read = model_module.attentive_read(config)
            self.features = self.read.features
        def forward(self, *given): return self.read(*given)[0], window
    model = DRAW(SMALL, read=Odd)
    with pytest.raises(ValueError, match=f'a NamedTuple .* not {type(window).__name__}'):
        model(torch.rand(4, 2, 5, 7))

def test_devices_without_numbers():
    "`meta` tells shapes, of a network and within a context, without disturbing another"
    images = torch.rand(4, 2, 5, 7)
    assert DRAW(SMALL).to('meta')(images.to('meta')).canvas.shape == images.shape
    model, noise = DRAW(replace(SMALL, height=6)), torch.randn(3, 4, 3)
    images = torch.rand(4, 2, 6, 7)
    with torch.device('meta'): canvas = model(images, noise).canvas
    torch.testing.assert_close(canvas, model(images, noise).canvas)

def test_names_and_arrays_in_the_place_of_others():
    with pytest.raises(ValueError, match=r'not of str: preset\(NAME\) is one'): DRAW('mnist')
    with pytest.raises(ValueError, match='must be a tensor, not ndarray: torch.as_tensor'):
        Images(np.zeros((3, 1, 4, 4)), 'toy', 'train')
