"""Every quantizer in the registry passes the same battery."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.functional import hard_quantize, point_staircase, soft_staircase
from lq.functional.clipping import sawb_scale
from lq.functional.dsq import dsq_quantize
from lq.functional.layout import ScaleLayout
from lq.functional.learned_steps import learned_step_quantize
from lq.functional.log_levels import log_round, power_of_two_scale
from lq.functional.sigmoid_sum import sigmoid_sum
from lq.quantizers import (
    REGISTRY,
    APoTQuantizer,
    LearnedStepsQuantizer,
    LogQuantizer,
    Method,
    PointQuantizer,
    SigmoidSumQuantizer,
    build_activation_quantizer,
    build_weight_quantizer,
    register_quantizer,
)
from lq.spec import POINT_QUANTIZERS, LayerSpec
from lq.testing import check_quantizer
from tests.helpers import numpy_reference

SPECS = {
    f"{name}-{grid}-{granularity}-{bits}": LayerSpec(quantizer=name, grid=grid, granularity=granularity, bits=bits)
    for name in ("soft", "lsq")
    for grid in ("mid_tread", "mid_rise")
    for granularity in ("tensor", "channel")
    for bits in (2, 4, 8)
} | {
    "soft-hard-forward": LayerSpec(forward="hard"),
    "soft-atan": LayerSpec(staircase="atan", slope_backward_max=None),
    "soft-linear": LayerSpec(staircase="linear"),
    "soft-exact": LayerSpec(scale_gradient="exact"),
    "lsq-full-range-2": LayerSpec(quantizer="lsq", grid="full_range", bits=2),
    "soft-full-range": LayerSpec(grid="full_range", bits=3, granularity="channel"),
    "dsq-full-range": LayerSpec(quantizer="dsq", grid="full_range"),
    "levels=15": LayerSpec(bits=2, levels=15),
    "subset-4": LayerSpec(quantizer="subset"),
    "subset-2": LayerSpec(quantizer="subset", bits=2),
    "subset-channel-3": LayerSpec(quantizer="subset", bits=3, granularity="channel"),
    "subset-channel-points": LayerSpec(quantizer="subset", granularity="channel", points_per="channel"),
    "subset-zero": LayerSpec(quantizer="subset", bits=3, zero=True, power=4),
    "subset-signed": LayerSpec(quantizer="subset", bits=3, signed_points=True),
    "subset-uniform-8": LayerSpec(quantizer="subset", bits=8, candidates="uniform"),
    "subset-hard": LayerSpec(quantizer="subset", forward="hard", scale_gradient="exact"),
    "codebook-4": LayerSpec(quantizer="codebook"),
    "codebook-channel": LayerSpec(quantizer="codebook", bits=2, granularity="channel", points_per="channel"),
    "codebook-shared": LayerSpec(quantizer="codebook", bits=3, granularity="channel", signed_points=True),
    "minmax-8": LayerSpec(quantizer="minmax", bits=8),
    "minmax-channel": LayerSpec(quantizer="minmax", bits=3, granularity="channel"),
    "pact-2": LayerSpec(quantizer="pact", bits=2),
    "pact-mid-rise": LayerSpec(quantizer="pact", bits=3, grid="mid_rise", granularity="channel"),
    "dsq-2": LayerSpec(quantizer="dsq", bits=2),
    "dsq-mid-rise": LayerSpec(quantizer="dsq", grid="mid_rise", granularity="channel"),
    "log2": LayerSpec(quantizer="log2"),
    "log2-channel": LayerSpec(quantizer="log2", bits=2, granularity="channel"),
    "dlq": LayerSpec(quantizer="dlq", bits=3),
    "apot-2": LayerSpec(quantizer="apot", bits=2),
    "apot-channel": LayerSpec(quantizer="apot", granularity="channel"),
    "a2q-2": LayerSpec(quantizer="a2q", bits=2, normalize=False),
    "a2q-channel": LayerSpec(quantizer="a2q", granularity="channel", normalize=False),
    "a2q-plus-8": LayerSpec(quantizer="a2q_plus", bits=8, granularity="channel", normalize=False),
    "oaq-8": LayerSpec(quantizer="oaq", bits=8),
    "oaq-channel": LayerSpec(quantizer="oaq", bits=4, granularity="channel"),
    "lsq-plus-2": LayerSpec(quantizer="lsq_plus", bits=2),
    "lsq-plus-channel": LayerSpec(quantizer="lsq_plus", bits=4, granularity="channel"),
    "qn-2": LayerSpec(quantizer="qn", bits=2),
    "qn-channel": LayerSpec(quantizer="qn", bits=4, granularity="channel"),
    "qn-mid-rise": LayerSpec(quantizer="qn", bits=3, grid="mid_rise", scale_init="max"),
    "qn-full-range": LayerSpec(quantizer="qn", bits=2, grid="full_range"),
    "nulsq-2": LayerSpec(quantizer="nulsq", bits=2),
    "nulsq-channel": LayerSpec(quantizer="nulsq", granularity="channel"),
}


def test_the_battery_covers_the_registry():
    assert {"soft", "lsq"} <= {spec.quantizer for spec in SPECS.values()} == set(REGISTRY)


@pytest.fixture(params=SPECS, ids=list(SPECS))
def made(request):
    spec = SPECS[request.param]
    weight = torch.randn(6, 4, 3, 3)
    layout = ScaleLayout.per_channel(weight.shape) if spec.granularity == "channel" else ScaleLayout()
    quantizer = build_weight_quantizer(spec, layout, weight.numel())
    quantizer.calibrate_(weight, spec.scale_init)
    quantizer.set_slope(6.0)
    return spec, quantizer, weight


def reference(quantizer, weight):
    """By comparison with every level: of uniform ones by formula, of points from the chosen points."""
    if isinstance(quantizer, PointQuantizer):
        if isinstance(quantizer, LogQuantizer):
            return log_reference(quantizer, weight)
        rows = quantizer.layout.rows(weight).double().numpy()
        points = quantizer.points.double().numpy() * quantizer.scale.detach().double().numpy()[:, None]
        near = numpy_reference.nearest(rows, points, signed=quantizer.signed)
        return quantizer.layout.unrows(torch.from_numpy(near), weight.shape)
    codes = quantizer.codes
    scale = quantizer.layout.broadcast(quantizer.scale.detach()).expand_as(weight).double().numpy()
    if isinstance(quantizer, SigmoidSumQuantizer):
        unit = quantizer.layout.broadcast(quantizer.input_scale.detach()).double().numpy()
        count = (weight.double().numpy()[..., None] / unit[..., None] >= quantizer.thresholds.numpy()).sum(-1)
        return torch.from_numpy((count + codes.lo + codes.offset) * scale)
    return torch.from_numpy(numpy_reference.hard(weight.double().numpy(), scale, codes.lo, codes.hi, codes.offset))


def log_reference(quantizer, weight):
    """Exponents rounded by formula: evenly spaced ones, clipped at both ends."""
    rows, scale = quantizer.layout.rows(weight).double().numpy(), quantizer.scale.double().numpy()[:, None]
    count = quantizer.points.numel()
    step = -np.log2(float(quantizer.points[0])) / (count - 1)
    exponent = np.clip(np.round(np.log2(np.abs(rows) / scale) / step), 1 - count, 0) * step
    near = torch.from_numpy(np.sign(rows) * scale * 2**exponent)
    return quantizer.layout.unrows(near, weight.shape)


def test_evaluation_is_the_nearest_level(made):
    _, quantizer, weight = made
    torch.testing.assert_close(quantizer.eval()(weight).double(), reference(quantizer, weight), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_all_pass_the_checks_that_others_can_run(name):
    check_quantizer(SPECS[name])


def test_module_equals_function(made):
    spec, quantizer, weight = made
    quantizer.gradient_scale = False
    scale, codes = quantizer.layout.broadcast(quantizer.scale), quantizer.codes._asdict()
    if isinstance(quantizer, LogQuantizer):
        rows = quantizer.layout.rows(weight)
        column = power_of_two_scale(rows, quantizer.points)[:, None]
        inside = torch.minimum(torch.maximum(rows, -column), column)
        y = inside + (log_round(rows / column, quantizer.points) * column - inside)
        expected = quantizer.layout.unrows(y, weight.shape)
    elif isinstance(quantizer, LearnedStepsQuantizer):
        column = quantizer.scale[:, None]
        y = learned_step_quantize(quantizer.layout.rows(weight) / column, quantizer.steps, quantizer.below) * column
        expected = quantizer.layout.unrows(y, weight.shape)
    elif isinstance(quantizer, SigmoidSumQuantizer):
        unit = quantizer.layout.broadcast(quantizer.input_scale)
        lowest, temperature = quantizer.codes.lo + quantizer.codes.offset, torch.full((1,), 20 * 6.0)
        expected = sigmoid_sum(weight, scale, unit, quantizer.thresholds, temperature, lowest=lowest)
    elif isinstance(quantizer, APoTQuantizer):
        rows, scale = quantizer.layout.rows(weight), quantizer.scale.detach()
        expected = quantizer.layout.unrows(quantizer.point_set.hard(rows, scale), weight.shape)
    elif spec.quantizer in POINT_QUANTIZERS:
        rows = quantizer.layout.rows(weight)
        soft = {"hard": spec.forward == "hard", "slope_backward_max": spec.slope_backward_max}
        y = point_staircase(rows, quantizer.scale, quantizer.slope, quantizer.point_set, **soft)
        expected = quantizer.layout.unrows(y, weight.shape)
    elif spec.quantizer == "soft":
        hard, cap = spec.forward == "hard", spec.slope_backward_max or float("inf")
        extra = {"staircase": spec.staircase, "hard": hard, "slope_backward_max": cap}
        expected = soft_staircase(weight, scale, quantizer.slope, **codes, **extra)
    elif spec.quantizer == "dsq":
        expected = dsq_quantize(weight, scale, quantizer.alpha, **codes)
    elif spec.quantizer == "pact":
        fresh = sawb_scale(quantizer.layout.rows(weight), quantizer.codes)
        expected = weight + (hard_quantize(weight, quantizer.layout.broadcast(fresh), **codes) - weight)
    else:
        expected = hard_quantize(weight, scale, **codes)
    assert torch.equal(quantizer.train()(weight), expected)


def test_survives_pickling(made):
    _, quantizer, weight = made
    assert torch.equal(pickle.loads(pickle.dumps(quantizer)).train()(weight), quantizer.train()(weight))


def test_compiles_without_a_graph_break(made):
    _, quantizer, weight = made
    torch.compiler.reset()
    compiled = torch.compile(quantizer.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), quantizer(weight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_codes_give_back_hard_values_in_any_precision(name, dtype):
    spec = LayerSpec(quantizer=name, bits=4, granularity="channel")
    weight = torch.randn(6, 50, dtype=dtype)
    quantizer = build_weight_quantizer(spec, ScaleLayout.along(weight.shape, 0), weight.numel()).to(dtype)
    quantizer.calibrate_(weight)
    assert torch.equal(quantizer.decode(quantizer.encode(weight)).to(dtype), quantizer.hard(weight))


@pytest.mark.parametrize("name", REGISTRY)
def test_evaluation_compiles_and_exports_whole(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.rand(4, 8)
    lq.quantize_model(model, lq.QuantSpec(quantizer=name, bits=3, granularity="channel", first_last_bits=None))
    lq.calibrate(model, [x])
    expected = model.eval()(x)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
@pytest.mark.parametrize("name", REGISTRY)
def test_inputs_compile_without_a_graph_break(name, sign):
    sample = torch.randn(8, 12) if sign == "signed" else torch.rand(8, 12)
    inputs = build_activation_quantizer(LayerSpec(quantizer=name, bits=3, activation=sign))
    inputs.calibrate_(sample, float(sample.min()))
    inputs.quantizer.set_slope(6.0)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(inputs.train()), fullgraph=True, backend="aot_eager")  # ranges move
    torch.testing.assert_close(compiled(sample), inputs(sample), atol=1e-4, rtol=1e-4)


def test_slope_zero_is_the_identity_inside_the_range():
    quantizer = build_weight_quantizer(LayerSpec(forward="soft"), ScaleLayout(), 10)
    x = torch.linspace(-7, 7, 50)
    torch.testing.assert_close(quantizer.train()(x), x, atol=1e-3, rtol=0)


def test_activations_pass_through_until_calibrated_then_find_their_sign():
    inputs = build_activation_quantizer(LayerSpec(bits=4))
    assert inputs is not None
    x = torch.rand(64, 5)
    assert inputs(x) is x
    inputs.calibrate_(x, 0.0)
    assert (inputs.quantizer.codes.lo, inputs.quantizer.codes.hi) == (0, 15)
    assert inputs.eval()(x).unique().numel() == 16
    fresh = build_activation_quantizer(LayerSpec(bits=4))
    assert fresh is not None
    fresh.load_state_dict(inputs.state_dict())
    assert torch.equal(fresh.eval()(x), inputs(x))
    inputs.calibrate_(x - 0.5, -0.5)
    assert (inputs.quantizer.codes.lo, inputs.quantizer.codes.hi) == (-7, 7)


def test_activation_of_a_given_sign_and_none():
    signed = build_activation_quantizer(LayerSpec(activation="signed"))
    assert signed is not None
    signed.calibrate_(torch.rand(9), 0.0)
    assert signed.quantizer.codes.lo == -7
    assert build_activation_quantizer(LayerSpec(activation=None)) is None
    soft = build_activation_quantizer(LayerSpec(activation_forward="soft"))
    assert soft is not None
    assert hasattr(soft.quantizer, "slope")


def test_gradient_scale_counts_weights_per_scale_and_features_per_sample():
    x = torch.randn(32, 10, requires_grad=True)
    gradients = []
    for scaled in (True, False):
        quantizer = build_weight_quantizer(LayerSpec(quantizer="lsq", gradient_scale=scaled), ScaleLayout(), 320)
        quantizer.train()(x).square().sum().backward()
        gradients.append(quantizer.scale.grad)
    torch.testing.assert_close(gradients[0], gradients[1] / (320 * 7) ** 0.5)
    inputs = build_activation_quantizer(LayerSpec(quantizer="lsq"))
    assert inputs is not None
    assert inputs.quantizer.count == 0
    inputs.calibrate_(x.detach(), -1.0)
    scale = inputs.quantizer.scale
    inputs.train()(x).sum().backward()
    with_scale = scale.grad
    assert with_scale is not None
    scale.grad, inputs.quantizer.gradient_scale = None, False
    inputs(x).sum().backward()
    torch.testing.assert_close(with_scale, scale.grad / (10 * 7) ** 0.5)


def test_registry_refuses_a_taken_name_and_names_what_there_is():
    with pytest.raises(ValueError, match=r"name must be new, got 'soft': taken are"):
        register_quantizer("soft", REGISTRY["soft"])
    with pytest.raises(ValueError, match=r"quantizer must be one of \('soft', 'lsq'.*got 'twn': choose"):
        lq.quantize_model(nn.Sequential(nn.Linear(2, 2)), lq.QuantSpec(quantizer="twn"))


def test_a_new_method_can_be_registered_and_used(monkeypatch):
    monkeypatch.delitem(REGISTRY, "mine", raising=False)
    lsq = REGISTRY["lsq"]
    register_quantizer("mine", Method(lsq.weight, lsq.activation, "a copy"))
    model = nn.Sequential(nn.Linear(2, 2))
    lq.quantize_model(model, lq.QuantSpec(quantizer="mine"))
    assert type(model[0].weight_quantizer).__name__ == "LSQQuantizer"
    del REGISTRY["mine"]
