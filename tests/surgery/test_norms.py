"""Scales that follow the batch norm behind a layer: the grid is one of the folded weight."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lq
from lq.nn import named_quantized_layers
from lq.surgery import find_norms
from tests.helpers.modules import Plain, loader, small_cnn
from tests.integration.test_resume import run, same_runs

SHAPE = (3, 8, 8)


def network():
    """Ordinary, depthwise and transposed convolutions, a linear layer, and a last layer without a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -1, 1)
            module.running_var.uniform_(0.1, 4)
    return model


NORMS = {"0": "1", "3": "4", "6": "7", "11": "12"}
SPEC = {"quantizer": "minmax", "bits": 4, "fold_norms": True}


def folded_codes(layer, norm, weight):
    """Fold, then quantize with one scale, in double precision."""
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    groups = layer.groups if axis else 1
    rows = weight.double()
    if axis:  # (I, O/g, ...) with output channels of every group
        rows = rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    rows = rows * factor.reshape(-1, *[1] * (rows.dim() - 1))
    scale = rows.abs().max() / layer.weight_quantizer.codes.hi
    return (rows / scale).round() * factor.sign().reshape(-1, *[1] * (rows.dim() - 1)), scale


def test_codes_are_those_of_the_folded_weight_with_one_scale():
    model = network()
    lq.quantize_model(model, lq.QuantSpec(**SPEC), torch.randn(2, *SHAPE))
    for path, norm_path in NORMS.items():
        layer, norm = model.get_submodule(path), model.get_submodule(norm_path)
        expected, scale = folded_codes(layer, norm, layer.weight.detach())
        codes = layer.weight_quantizer.encode(layer.weight)
        rows = layer.weight_quantizer.layout.rows(codes).reshape(expected.shape)
        assert (rows != expected).float().mean() < 0.01  # ties
        factor = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close((layer.weight_quantizer.scale * factor).double(), scale.expand(len(factor)))
    last = model[14].weight_quantizer
    torch.testing.assert_close(last.scale, model[14].weight.abs().max().expand(4) / 127)


def test_training_follows_the_statistics_as_they_move():
    model = network()
    lq.quantize_model(model, lq.QuantSpec(**SPEC), torch.randn(2, *SHAPE))
    lq.calibrate(model, [torch.randn(4, *SHAPE)])
    layer, norm = model[0], model[1]
    model.train()
    for _ in range(3):
        used = norm.running_var.clone()
        model(torch.randn(16, *SHAPE) * 3)
        factor = norm.weight.detach().abs() / (used + norm.eps).sqrt()
        expected = (layer.weight.detach().flatten(1).abs().amax(1) * factor).max() / 127 / factor
        torch.testing.assert_close(layer.weight_quantizer.scale.detach(), expected)
    assert not torch.equal(used, norm.running_var)


def test_pairs_are_found_by_what_runs_and_a_norm_elsewhere_is_none():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.other(self.second(self.norm(self.first(x))).relu())

    model = Net()
    lq.quantize_model(model, lq.QuantSpec(quantizer="minmax"))
    assert find_norms(model, lambda: model(torch.randn(2, *SHAPE))) == {"first": "norm"}


def test_what_was_changed_in_place_is_no_output_and_two_norms_are_none():
    inplace = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    lq.quantize_model(inplace, lq.QuantSpec(quantizer="minmax"))
    assert find_norms(inplace, lambda: inplace(torch.randn(2, *SHAPE))) == {}
    layer = nn.Conv2d(3, 3, 3, padding=1)
    twice = nn.Sequential(layer, nn.BatchNorm2d(3), layer, nn.BatchNorm2d(3))
    lq.quantize_model(twice, lq.QuantSpec(quantizer="minmax"))
    assert find_norms(twice, lambda: twice(torch.randn(2, *SHAPE))) == {}


def test_tied_weights_follow_no_norm_of_their_own():
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    model = nn.Sequential(nn.Conv2d(3, 3, 1), first, nn.BatchNorm2d(3), second, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[4].running_var.copy_(torch.tensor([1.0, 100.0, 1e4]))
    lq.quantize_model(model, lq.QuantSpec(**SPEC), torch.randn(2, *SHAPE))
    assert model[1].weight_quantizer.scale.unique().numel() == 1


def test_a_channel_that_is_switched_off_spoils_nothing():
    model = network()
    nn.init.zeros_(model[4].weight[:2])
    lq.quantize_model(model, lq.QuantSpec(**SPEC), torch.randn(2, *SHAPE))
    quantizer = model[3].weight_quantizer
    assert bool(torch.isfinite(quantizer.scale).all())
    assert bool(torch.isfinite(model.eval()(torch.randn(2, *SHAPE))).all())
    assert bool(quantizer.encode(model[3].weight)[2:].any())


def module():
    torch.manual_seed(0)
    return Plain(network(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))


def whole(folder, ckpt_path=None, **settings):
    saver = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
    callback = lq.LearnedQuantization(**SPEC, calibration_batches=2, regularizer=None, **settings)
    return run(folder, module(), [callback, saver], ckpt_path, data=loader(shape=SHAPE), epochs=3)


def test_a_fit_links_them_and_resumes(tmp_path):
    first = whole(tmp_path / "first")
    same_runs(first, whole(tmp_path / "second", str(tmp_path / "first" / "epoch=1.ckpt")))
    net = first.lightning_module.net
    for path, norm in NORMS.items():
        assert net.get_submodule(path).weight_quantizer._norm == (net.get_submodule(norm),)
    assert {k for k in net.state_dict() if "_norm" in k} == set()
    net, x = net.eval(), torch.randn(4, *SHAPE)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@pytest.mark.parametrize("batches", [0, 20])
def test_folded_weights_have_one_scale_after_a_fit_whoever_moved_the_statistics_last(tmp_path, batches):
    net = whole(tmp_path, reestimate_bn=batches).lightning_module.net
    for path, norm_path in NORMS.items():
        norm, scale = net.get_submodule(norm_path), net.get_submodule(path).weight_quantizer.scale
        steps = scale * norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps))


def test_it_is_stored_and_runs_in_integers(tmp_path):
    network, x = small_cnn(), torch.randn(8, *SHAPE)
    lq.quantize_model(network, lq.QuantSpec(**SPEC), x)
    lq.calibrate(network, [x])
    expected = network.eval()(x)
    architecture = {"import_path": "tests.helpers.modules:small_cnn"}
    path = lq.save(network, tmp_path / "net.lq.safetensors", architecture=architecture)
    assert torch.equal(lq.load(path, allow=[architecture["import_path"]])(x), expected)
    loaded = lq.load(path, allow=[architecture["import_path"]])
    layer = named_quantized_layers(loaded)["3"]
    before = layer.weight_quantizer.scale.detach().clone()
    loaded.train()(x)  # its batch norm is not known, but the ratios of the channels are
    ratio = layer.weight_quantizer.scale.detach() / before
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    near = lq.IntegerNetwork(network, SHAPE)(x)
    assert float((near - expected).abs().median()) < 1e-3 * float(expected.abs().max())


def test_to_look_changes_no_scale():
    model = network()
    lq.quantize_model(model, lq.QuantSpec(**SPEC), torch.randn(2, *SHAPE))
    quantizer = model[0].train().weight_quantizer
    before = quantizer.scale.detach().clone()
    quantizer.statistics(model[0].weight * 2, soft=True)
    assert torch.equal(quantizer.scale, before)
    assert quantizer.training


def test_it_is_of_minmax_and_one_scale_per_tensor():
    for wrong in ({"quantizer": "lsq"}, {"quantizer": "minmax", "granularity": "channel"}):
        with pytest.raises(ValueError, match="fold_norms must be False for quantizer="):
            lq.QuantSpec(fold_norms=True, **wrong)


def test_a_network_compiles_without_a_graph_break():
    model = network()[:3]
    lq.quantize_model(model, lq.QuantSpec(**SPEC), torch.randn(2, *SHAPE))
    lq.calibrate(model, [torch.randn(4, *SHAPE)])
    torch.compiler.reset()
    before = named_quantized_layers(model)["0"].weight_quantizer.scale.clone()
    model[1].running_var.mul_(torch.rand(8) + 0.5)
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(torch.randn(2, *SHAPE))
    assert not torch.equal(model[0].weight_quantizer.scale, before)
