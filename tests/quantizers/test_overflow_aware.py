"""Overflow-aware ranges: what is counted are integer sums, and ranges widen until they fit."""

import math

import pytest
import torch
from torch import nn

import lq
from lq.functional.accumulator import range_factor_step
from lq.nn import named_quantized_layers
from tests.helpers.modules import small_cnn

LAYERS = {
    "linear": (nn.Linear(12, 5), (3, 12)),
    "linear, sequences": (nn.Linear(12, 5, bias=False), (3, 4, 12)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 7)),
    "one image": (nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "depthwise": (nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), (2, 4, 5, 5)),
}


def integer_twin(layer, x):
    """The layer's own operator on codes, in whole numbers."""
    weight, inputs = layer.weight_quantizer.encode(layer.weight), layer.input_quantizer.quantizer.encode(x)
    weight, inputs = weight.double(), inputs.double()
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight)
    given = {n: getattr(layer, n) for n in ("stride", "padding", "groups")}
    if isinstance(layer, nn.ConvTranspose2d):
        return nn.functional.conv_transpose2d(inputs, weight, **given)
    operator = nn.functional.conv1d if isinstance(layer, nn.Conv1d) else nn.functional.conv2d
    return operator(inputs, weight, **given)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_counted_are_the_sums_of_codes(monkeypatch, name, granularity):
    torch.manual_seed(0)
    given, shape = LAYERS[name]
    model = nn.Sequential(type(given)(**_arguments(given)))
    spec = lq.QuantSpec(quantizer="oaq", bits=8, granularity=granularity, first_last_bits=None)
    lq.quantize_model(model, spec)
    x = torch.randn(shape)
    lq.calibrate(model, [x])
    layer = model[0].train()
    seen = []
    monkeypatch.setattr(layer.weight_quantizer, "see_sums_", lambda sums, inputs: seen.append(sums))
    layer.input_quantizer.quantizer.momentum = 1.0  # so that it does not move between here and there
    model(x)
    expected = integer_twin(layer, x)
    torch.testing.assert_close(seen[0].double(), expected, atol=0.02, rtol=1e-4)
    layer.eval()(x)
    assert len(seen) == 1


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
    return {n: getattr(layer, n) for n in names}


def test_steps_follow_the_formula():
    counts = torch.tensor([0.0, 1.0, 50.0, 1e9])
    expected = [-1e-4, *(min(0.01 * math.log(1 + n), 0.1) for n in (1, 50, 1e9))]
    assert range_factor_step(counts).tolist() == pytest.approx(expected)


def test_ranges_widen_until_sums_fit_and_the_ends_stay():
    torch.manual_seed(0)
    network = small_cnn()
    spec = lq.QuantSpec(quantizer="oaq", bits=8, accumulator_bits=14)
    x = torch.randn(8, 3, 8, 8)
    lq.quantize_model(network, spec, x)
    lq.calibrate(network, [x])
    layers = list(named_quantized_layers(network).values())
    inner = layers[1:-1]
    sums = {}
    for layer in inner:
        see = layer.weight_quantizer.see_sums_
        layer.weight_quantizer.see_sums_ = lambda s, i, see=see, key=layer: (sums.__setitem__(key, s), see(s, i))
    network.train()
    network(x)
    overflowing = [layer for layer in inner if bool((sums[layer].abs() > 2**13 - 1).any())]
    assert overflowing
    scales = [layer.weight_quantizer.scale.clone() for layer in inner]
    for _ in range(200):
        network(x)
    for layer, before in zip(inner, scales, strict=True):
        assert sums[layer].abs().max() <= 2**13 - 1
        factor = layer.weight_quantizer.range_factor
        assert torch.equal(factor, layer.input_quantizer.quantizer.range_factor)
        assert (factor > 1) == (layer in overflowing)
        ratio = layer.weight_quantizer.scale / before
        assert (ratio > 1).all() == (layer in overflowing)
        codes = layer.weight_quantizer.encode(layer.weight)
        assert codes.abs().max() == round(127 / factor.item())
    for layer in (layers[0], layers[-1]):
        assert layer.layer_spec.accumulator_bits == 32
        assert layer.weight_quantizer.range_factor == 1


def test_a_range_that_fits_narrows_again_but_not_below_the_values():
    layer = nn.Sequential(nn.Linear(8, 8))
    lq.quantize_model(layer, lq.QuantSpec(quantizer="oaq", bits=4, first_last_bits=None))
    lq.calibrate(layer, [torch.rand(4, 8)])
    weights, inputs = layer[0].weight_quantizer, layer[0].input_quantizer.quantizer
    weights.widen_(torch.tensor([1.00015]))
    inputs.widen_(torch.tensor([1.00015]))
    found = []
    for _ in range(3):
        layer.train()(torch.rand(4, 8))
        found.append(weights.range_factor.item())
    assert found == pytest.approx([1.00005, 1.0, 1.0])
    assert inputs.range_factor == 1


def test_a_layer_compiles_without_a_graph_break():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    lq.quantize_model(model, lq.QuantSpec(quantizer="oaq", bits=8, accumulator_bits=8, first_last_bits=None))
    x = torch.randn(2, 4, 7, 7)
    lq.calibrate(model, [x])
    torch.compiler.reset()
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(x)
    assert model[0].weight_quantizer.range_factor > 1


def test_sums_of_float_inputs_are_not_counted():
    with pytest.raises(ValueError, match="activation must not be None for oaq, got None: .* quantizer='minmax'"):
        lq.quantize_model(nn.Sequential(nn.Linear(8, 8)), lq.QuantSpec(quantizer="oaq", activation=None))
