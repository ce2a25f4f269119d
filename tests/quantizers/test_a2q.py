"""Sums of integer weights that no accumulator of a given width overflows with (A2Q, A2Q+)."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lq
from lq.exporting.overflow import check_accumulators
from lq.functional.accumulator import bound_l1, l1_bound, project_l1
from lq.nn import named_quantized_layers
from lq.quantizers import A2QQuantizer
from lq.spec import LayerSpec
from lq.surgery import layer_specs, set_widths
from tests.helpers.modules import Plain, fit, loader, small_cnn
from tests.integration.test_resume import run

SHAPE = (3, 8, 8)


def worst(codes, low, high):
    """Largest magnitude of the sum over all inputs between two codes, per output channel."""
    rows = codes.long().flatten(1)
    most = torch.where(rows > 0, rows * high, rows * low).sum(1)
    least = torch.where(rows > 0, rows * low, rows * high).sum(1)
    return torch.maximum(most.abs(), least.abs())


def bounded_network(method, bits, width, activation="auto"):
    torch.manual_seed(0)
    network = small_cnn()
    fields = {"granularity": "channel", "normalize": True, "first_last_bits": None, "activation": activation}
    lq.quantize_model(network, lq.QuantSpec(quantizer=method, bits=bits, accumulator_bits=width, **fields))
    lq.calibrate(network, [torch.randn(16, *SHAPE)])
    return network


@pytest.mark.parametrize("width", [8, 10, 13, 16])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("method", ["a2q", "a2q_plus"])
def test_no_accumulator_can_overflow_whatever_the_steps(method, bits, width):
    network = bounded_network(method, bits, width)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(3):
        network.train()(torch.randn(8, *SHAPE)).square().sum().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        network.eval()
        for layer in named_quantized_layers(network).values():
            codes, inputs = layer.weight_quantizer.encode(layer.float_weight()), layer.input_quantizer.quantizer.codes
            assert int(worst(codes, inputs.lo, inputs.hi).max()) < 2 ** (width - 1)


@pytest.mark.parametrize("method", ["a2q", "a2q_plus"])
def test_the_integer_engine_agrees_that_16_bits_are_enough(method):
    check_accumulators(lq.IntegerNetwork(bounded_network(method, 4, 16).eval(), SHAPE), 16)
    check_accumulators(lq.IntegerNetwork(bounded_network(method, 4, 10).eval(), SHAPE), 10)
    with pytest.raises(ValueError, match="overflow"):
        check_accumulators(lq.IntegerNetwork(bounded_network(method, 4, 16).eval(), SHAPE), 9)


def test_a_narrow_accumulator_is_used_up():
    for method, share in (("a2q", 0.8), ("a2q_plus", 0.6)):
        network = bounded_network(method, 8, 12, "unsigned")
        for layer in list(named_quantized_layers(network).values())[1:3]:
            codes = layer.weight_quantizer.encode(layer.float_weight())
            norm = codes.long().flatten(1).abs().sum(1).double()
            assert float(norm.max()) > share * layer.weight_quantizer.limit, (method, norm)


def by_hand(weight, log_norm, scale, limit, centred, low, high):
    """Straight from the formulas, with autograd's own derivatives and a straight-through estimator for the rounding."""
    v = weight.flatten(1)
    v = v - v.mean(1, keepdim=True) if centred else v
    norm = torch.minimum(log_norm.exp2(), limit * scale)
    w = v * norm[:, None] / v.abs().sum(1, keepdim=True)
    u = (w / scale[:, None]).clamp(low, high)
    return ((u + (u.trunc() - u).detach()) * scale[:, None]).view_as(weight)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("method", ["a2q", "a2q_plus"])
def test_values_and_gradients_are_those_of_the_formula(method, width):
    layer = list(named_quantized_layers(bounded_network(method, 4, width)).values())[1].double()
    layer.weight_quantizer.gradient_scale = False
    normalizer, quantizer = layer.weight_normalizer, layer.weight_quantizer
    assert isinstance(quantizer, A2QQuantizer)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight) * 0.01)
        normalizer.log_norm.add_(torch.linspace(-1, 1, len(normalizer.log_norm)))
    upstream = torch.randn_like(layer.weight)
    full = normalizer.log_norm > quantizer.largest_norm(torch.float64).log2()
    assert (0 < int(full.sum()) < len(full)) == (width == 8), full
    y = layer._quantize(layer.weight)
    learned = [layer.weight, normalizer.log_norm, quantizer.scale]
    got = torch.autograd.grad(y, learned, upstream)
    twins = [p.detach().clone().requires_grad_() for p in learned]
    limit = quantizer.limit * (1 - 2.0**-14 - 2 * torch.finfo(torch.float64).eps)
    expected = by_hand(*twins, limit, method == "a2q_plus", quantizer.codes.lo, quantizer.codes.hi)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected, twins, upstream)
    torch.testing.assert_close(got[::2], wanted[::2])
    torch.testing.assert_close(got[1][~full], wanted[1][~full])  # norms beyond the limit can come back
    quantizer.gradient_scale = True
    damped = torch.autograd.grad(layer._quantize(layer.weight), quantizer.scale, upstream)[0]
    torch.testing.assert_close(damped, wanted[2] / (layer.weight.numel() / len(full) * quantizer.codes.hi) ** 0.5)
    pull = layer.weight_quantizer.regularizer(layer.float_weight(), kind="nearest")
    assert torch.autograd.grad(pull, quantizer.scale, allow_unused=True)[0] is None


def test_a_norm_beyond_its_bound_can_come_back_and_goes_no_further():
    layer = list(named_quantized_layers(bounded_network("a2q", 4, 9)).values())[1].train()
    normalizer, quantizer = layer.weight_normalizer, layer.weight_quantizer
    with torch.no_grad():
        normalizer.log_norm.fill_(20.0)
    w = layer.float_weight()
    assert bool((w.flatten(1).abs().sum(1) <= quantizer.limit * quantizer.scale).all())
    assert bool((normalizer.log_norm == 20).all())  # looking at a weight changes nothing
    grow = torch.autograd.grad(-w.abs().sum(), normalizer.log_norm, retain_graph=True)[0]
    shrink = torch.autograd.grad(w.abs().sum(), normalizer.log_norm)[0]
    assert not bool(grow.any())
    assert bool((shrink > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["a2q", "a2q_plus"])
def test_bounds_hold_in_every_dtype(method, dtype):
    spec = lq.QuantSpec(
        quantizer=method,
        bits=8,
        activation_bits=4,
        granularity="channel",
        normalize=True,
        first_last_bits=None,
        activation="unsigned",
    )
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(48, 1, bias=False))
        lq.quantize_model(model, spec)
        layer = model.to(dtype)[0]
        with torch.no_grad():  # as many codes as the bound allows
            layer.weight.copy_(torch.tensor([1.0, -1.0] if method == "a2q_plus" else [1.0]).repeat(48)[:48] + 0.1)
            layer.weight_quantizer.scale.fill_(2.0**-8 * (1 + seed / 100))
            layer.weight_normalizer.log_norm.fill_(10.0)
        codes = layer.weight_quantizer.encode(layer.float_weight())
        assert 0.8 * 2**15 < int(worst(codes, 0, 15)) < 2**15


def test_a_dip_of_the_scale_does_no_lasting_harm():
    layer = list(named_quantized_layers(bounded_network("a2q", 4, 12)).values())[1].train()
    before, scale = layer.quantized_weight(), layer.weight_quantizer.scale.detach().clone()
    with torch.no_grad():
        layer.weight_quantizer.scale[0] = 0
        layer.weight_quantizer(layer.float_weight())
        layer.weight_quantizer.scale.copy_(scale)
    assert torch.equal(layer.quantized_weight(), before)


@pytest.mark.parametrize("method", ["a2q", "a2q_plus"])
@pytest.mark.parametrize("size", [1e-30, 1e-42])
def test_weights_of_nearly_nothing_have_gradients(method, size):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data.mul_(size)
    lq.quantize_model(model, lq.QuantSpec(quantizer=method, granularity="channel", first_last_bits=None))
    lq.calibrate(model, [torch.randn(8, 8)])
    model.train()(torch.randn(8, 8)).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("method", ["a2q", "a2q_plus"])
def test_rows_of_zeros_can_leave_zero_and_constant_ones_stay_bounded(method):
    model = nn.Sequential(nn.Linear(9, 4, bias=False))
    with torch.no_grad():
        model[0].weight[0], model[0].weight[1] = 0.0, 0.1
    fields = {"granularity": "channel", "normalize": True, "first_last_bits": None, "activation": "unsigned"}
    lq.quantize_model(model, lq.QuantSpec(quantizer=method, bits=8, accumulator_bits=12, **fields))
    layer = model[0]
    layer.weight_quantizer(layer.float_weight()).square().sum().backward()
    assert float(layer.weight.grad.abs().max()) < 1e3
    with torch.no_grad():
        layer.weight[0] += torch.linspace(-1, 1, 9)
        layer.weight_normalizer.log_norm.fill_(8.0)
        layer.weight_quantizer.scale.fill_(0.01)
    codes = layer.weight_quantizer.encode(layer.float_weight())
    assert bool(codes[0].any())
    assert int(worst(codes, 0, 255).max()) < 2**11


def test_bounds_that_come_later_are_those_of_the_method():
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    spec = lq.QuantSpec(quantizer="a2q_plus", granularity="channel", bits=8, accumulator_bits=10)
    lq.quantize_model(model, spec)
    set_widths(model, {path: replace(own, normalize=True) for path, own in layer_specs(model).items()})
    layer = model[1]
    assert layer.weight_quantizer.centred
    with torch.no_grad():
        layer.weight.uniform_(0, 1)
        layer.weight_normalizer.log_norm.fill_(9.0)
    assert int(worst(layer.weight_quantizer.encode(layer.float_weight()), 0, 255).max()) < 2**9
    set_widths(model, {path: replace(own, bits=4, activation_bits=4) for path, own in layer_specs(model).items()})
    assert layer.weight_quantizer.limit == pytest.approx(1022 / 15)


@pytest.mark.parametrize("method", ["a2q", "codebook"])
def test_inputs_stay_quantized_when_widths_fall(method):
    module, settings = Plain(small_cnn()), {"granularity": "channel", "first_last_bits": None, "activation_bits": 8}
    callback = lq.LearnedQuantization(bits=3, quantizer=method, normalize=method == "a2q", **settings)
    fit(module, [callback, lq.ProgressiveBits((8, 4))], data=loader(shape=SHAPE), epochs=1)
    assert all(layer.input_quantizer.is_calibrated for layer in named_quantized_layers(module.net).values())


@given(st.integers(0, 1000), st.floats(0.1, 30.0))
def test_projection_is_the_nearest_point_of_the_ball(seed, limit):
    x = np.random.default_rng(seed).normal(size=(3, 12)) * 3
    near = project_l1(torch.from_numpy(x), torch.full((3,), limit, dtype=torch.float64)).numpy()
    for row, got in zip(x, near, strict=True):
        low, high = 0.0, np.abs(row).max()
        for _ in range(200):  # the amount by which all shrink, by bisection
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(np.abs(row) - middle, 0).sum() > limit else (low, middle)
        expected = row if np.abs(row).sum() <= limit else np.sign(row) * np.maximum(np.abs(row) - high, 0)
        np.testing.assert_allclose(got, expected, atol=1e-9)


def test_bounds():
    assert l1_bound(16, 255) * 255 == 2**15 - 1
    assert l1_bound(16, 255, centred=True) * 255 == 2**16 - 2
    rows = torch.randn(4, 9)
    assert torch.allclose(bound_l1(rows, rows.abs().sum(1).log2(), None), rows)
    sums = bound_l1(rows, torch.full((4,), 9.0), torch.full((4,), 2.0)).abs().sum(1)
    assert torch.allclose(sums, torch.full((4,), 2.0))
    assert torch.equal(bound_l1(torch.zeros(1, 3), torch.ones(1), None), torch.zeros(1, 3))


def test_tied_layers_share_their_norm():
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    model[2].weight = model[1].weight
    lq.quantize_model(model, lq.QuantSpec(quantizer="a2q", granularity="channel", normalize=True))
    assert model[1].weight_normalizer is model[2].weight_normalizer is not None


def test_a_fit_learns_norms(tmp_path):
    torch.manual_seed(0)
    module = Plain(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
    settings = {"granularity": "channel", "normalize": True, "strength": 0.2, "calibration_batches": 2}
    callback = lq.LearnedQuantization(bits=3, quantizer="a2q_plus", accumulator_bits=12, **settings)
    run(tmp_path, module, [callback], data=loader(shape=SHAPE), epochs=1)
    layer = next(layer for layer in named_quantized_layers(module.net).values() if layer.weight_normalizer)
    before = copy.deepcopy(layer.weight_normalizer.log_norm)
    run(
        tmp_path,
        module,
        [lq.LearnedQuantization(bits=3, quantizer="a2q_plus", accumulator_bits=12, **settings)],
        data=loader(shape=SHAPE),
        epochs=1,
    )
    assert not torch.equal(before, layer.weight_normalizer.log_norm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": "tensor"}, "granularity must be 'channel' for a2q, got 'tensor'"),
        ({"activation": None}, "activation must not be None for a2q, got None"),
        ({"grid": "mid_rise"}, "grid must be 'mid_tread' or 'full_range' for a2q, got 'mid_rise'"),
    ],
)
def test_what_cannot_be_bounded_is_refused(fields, message):
    spec = {"quantizer": "a2q", "granularity": "channel", "normalize": True, "first_last_bits": None}
    with pytest.raises(ValueError, match=message):
        lq.quantize_model(small_cnn(), lq.QuantSpec(**{**spec, **fields}))
    with pytest.raises(ValueError, match="accumulator_bits must be an integer from 8 to 32, got 40"):
        LayerSpec(accumulator_bits=40)
