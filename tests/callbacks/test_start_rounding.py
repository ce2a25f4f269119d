"""Weights that start on their levels, by error feedback."""

import copy
from itertools import islice

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lq
from lq.callbacks import first_batches
from lq.nn import named_quantized_layers
from lq.point_search.inputs import hessians
from lq.point_search.rounding import feed_back, obstacles
from tests.helpers.modules import TRAINER, Plain, fit, loader, small_cnn

SHAPE = (3, 9, 9)
SETTINGS = {"bits": 3, "calibration_batches": 2, "start_rounding": "error_feedback"}


class First(Callback):
    """Keeps a copy of the network as it is before the first step."""

    net = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.net = self.net or copy.deepcopy(pl_module.net).eval()


def start(net, **settings):
    first = First()
    fit(Plain(net), [lq.LearnedQuantization(**{**SETTINGS, **settings}), first], loader(shape=SHAPE))
    return first.net


def weights(net):
    return {path: layer.weight.detach() for path, layer in named_quantized_layers(net).items()}


def test_weights_start_where_error_feedback_puts_them():
    net = small_cnn()
    begun = start(copy.deepcopy(net))
    hand = copy.deepcopy(net)
    batches = [batch[0] for batch in islice(loader(shape=SHAPE), 2)]
    lq.quantize_model(hand, lq.QuantSpec(bits=3), batches[0])
    layers = named_quantized_layers(hand)
    floats = {path: net.eval().get_submodule(path) for path in layers}
    assert set(feed_back(hand, layers, hessians(net, floats, batches), progress=False).values()) == {""}
    assert len(layers) == 4  # depthwise and grouped ones among them
    nearest = [layer.weight_quantizer.hard(floats[path].weight) for path, layer in layers.items()]
    for (path, expected), other in zip(weights(hand).items(), nearest, strict=True):
        torch.testing.assert_close(weights(begun)[path], expected)
        quantizer = named_quantized_layers(begun)[path].weight_quantizer
        torch.testing.assert_close(quantizer.hard(weights(begun)[path]), weights(begun)[path])
        assert not torch.allclose(expected, other)


def test_the_network_starts_nearer_to_the_float_one():
    net = small_cnn()
    for norm in (net[1], net[4]):
        norm.running_var.fill_(0.1)
    images = torch.cat([batch[0] for batch in islice(loader(shape=SHAPE), 2)])
    errors = {}
    for rounding in (None, "error_feedback"):
        begun = start(copy.deepcopy(net), start_rounding=rounding, activation=None, bits=2, first_last_bits=None)
        with torch.no_grad():
            errors[rounding] = (begun(images) - net.eval()(images)).square().mean().item()
    assert errors["error_feedback"] < 0.7 * errors[None]


def test_a_resumed_fit_does_not_round_again(tmp_path, monkeypatch):
    rounded = []
    monkeypatch.setattr(first_batches, "feed_back", lambda *a, **k: rounded.append(1) or feed_back(*a, **k))
    for epochs, path in ((1, None), (2, tmp_path / "last.ckpt")):
        callbacks = [lq.LearnedQuantization(**SETTINGS, anneal_steps=5), ModelCheckpoint(tmp_path, save_last=True)]
        trainer = Trainer(**{**TRAINER, "enable_checkpointing": True}, max_epochs=epochs, callbacks=callbacks)
        trainer.fit(Plain(small_cnn()), loader(shape=SHAPE), ckpt_path=path, weights_only=True)
        assert trainer.global_step == 12 * epochs
    assert rounded == [1]


def test_a_second_fit_keeps_what_the_first_has_trained(monkeypatch):
    rounded = []
    monkeypatch.setattr(first_batches, "feed_back", lambda *a, **k: rounded.append(1) or feed_back(*a, **k))
    module = Plain(small_cnn())
    for _ in range(2):
        fit(module, [lq.LearnedQuantization(**SETTINGS)], loader(shape=SHAPE))
    assert rounded == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_from_full_sums(dtype):
    """Sums of squares over a batch are beyond float16 and lose their small eigenvalues in bfloat16."""
    layer, x = torch.nn.Conv2d(3, 4, 3), 30 * torch.randn(4, 3, 40, 40)
    expected = hessians(layer, {"": layer}, [x])[""]
    with torch.autocast("cpu", dtype):
        assert torch.equal(hessians(layer, {"": layer}, [x])[""], expected)
    assert expected.max() > torch.finfo(torch.float16).max


def test_mixed_precision_fits(recwarn):
    first = First()
    callbacks = [lq.LearnedQuantization(**SETTINGS), first]
    fit(Plain(small_cnn()), callbacks, loader(shape=SHAPE), precision="bf16-mixed")
    assert not [w for w in recwarn if "start_rounding" in str(w.message)]
    for layer in named_quantized_layers(first.net).values():
        torch.testing.assert_close(layer.weight_quantizer.hard(layer.weight), layer.weight)


def test_normalized_weights_are_left_and_named():
    net = small_cnn()
    with pytest.warns(UserWarning, match="start_rounding leaves net.3, net.6 as they are: it computes its weight"):
        begun = start(copy.deepcopy(net), quantizer="apot")
    assert torch.equal(weights(begun)["3"], net[3].weight)


def test_weights_of_a_quantizer_that_moves_its_levels_are_left():
    net = small_cnn().eval()
    floats, images = copy.deepcopy(net), torch.randn(4, *SHAPE)
    lq.quantize_model(net, lq.QuantSpec(quantizer="qn"), images)
    layers = {"3": named_quantized_layers(net)["3"]}
    layers["3"].weight_quantizer.input_scale.data.mul_(3)  # thresholds elsewhere, levels where they were
    done = feed_back(net, layers, hessians(floats, {"3": floats[3]}, [images]), progress=False)
    assert done == {"3": "its quantizer does not leave a level where it is"}
    assert torch.equal(net[3].weight, floats[3].weight)


def test_a_weight_that_a_float_part_holds_too_is_left():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head, self.words = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4), torch.nn.Embedding(4, 8)
            self.head.weight = self.words.weight

        def forward(self, x):
            return self.head(self.inner(x))

    net = Tied()
    lq.quantize_model(net, lq.QuantSpec(), torch.randn(2, 8))
    assert obstacles(net, named_quantized_layers(net)) == {"inner": "", "head": "its weight is tied to another layer"}


def test_tied_weights_are_left_and_named():
    net = small_cnn()
    net.insert(3, torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    net[3].weight = net[4].weight
    with pytest.warns(UserWarning, match="start_rounding leaves net.3, net.4 as they are: its weight is tied"):
        start(net)
