"""Quantization networks: published formula and gradients, thresholds from k-means, what is stored and exported."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.exporting import UnsupportedError
from lq.exporting.onnx import write_onnx
from lq.functional.codebook import fit_codebook
from lq.functional.layout import ScaleLayout
from lq.functional.levels import CodeRange, code_range
from lq.functional.sigmoid_sum import reached, sigmoid_sum
from lq.nn import named_quantized_layers
from lq.quantizers import SigmoidSumQuantizer, build_activation_quantizer, build_weight_quantizer
from lq.spec import LayerSpec
from tests.helpers.modules import small_cnn

THRESHOLDS = torch.tensor([-1.4, -0.4, 0.7])


def formula(x, s, u, t):
    rises = 1 / (1 + np.exp(-t * (x[..., None] / u - THRESHOLDS.double().numpy())))
    return s * (-2 + rises.sum(-1))


def test_values_are_the_published_ones():
    x = torch.linspace(-3, 3, 200)
    for temperature in (1.0, 10.0, 40.0):
        y = sigmoid_sum(x, torch.tensor([0.3]), torch.tensor([0.8]), THRESHOLDS, torch.tensor([temperature]), lowest=-2)
        np.testing.assert_allclose(y, formula(x.double().numpy(), 0.3, 0.8, temperature), atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_no_cache_holds_is_summed_piece_by_piece_all_the_same(layout):
    """More elements than one piece, a number that pieces do not divide, any order in memory; and none at all."""
    x = torch.randn(7, 9, 33, 35, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    s, u, t = torch.tensor([0.3]), torch.tensor([0.8]), torch.tensor([10.0])
    for part in (x, x[:1, :1], x[:, :0], x[:0], x[0, 0, 0, 0]):
        y = sigmoid_sum(part, s, u, THRESHOLDS, t, lowest=-2)
        np.testing.assert_allclose(y, formula(part.double().numpy(), 0.3, 0.8, 10.0).reshape(y.shape), atol=1e-5)
    hard = sigmoid_sum(x.requires_grad_(), s, u, THRESHOLDS, t, lowest=-2, hard=True)
    soft = sigmoid_sum(x, s, u, THRESHOLDS, t, lowest=-2)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (hard, soft)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("temperature", [20.0, 60.0, 124.5, 320.0])
def test_no_number_is_so_small_that_a_cpu_is_slow_with_it(temperature):
    x, one = torch.linspace(-9, 9, 4001).requires_grad_(), torch.ones(1)
    y = sigmoid_sum(x, one, one, torch.tensor([-1.4, 0.7, 2.1]), torch.tensor([temperature]), lowest=0)
    y.sum().backward()
    for values in y.detach(), x.grad:
        assert float(values[values != 0].abs().min()) > 1e-8
    assert bool((values == 0).any())


@pytest.mark.parametrize("hard", [False, True])
def test_gradients_are_those_of_the_formula(hard):
    torch.manual_seed(0)
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    s = (torch.rand(3, 1, dtype=torch.float64) + 0.5).requires_grad_()
    u = (torch.rand(3, 1, dtype=torch.float64) + 0.5).requires_grad_()
    b, t = THRESHOLDS.double(), torch.tensor([5.0], dtype=torch.float64)
    if not hard:
        assert torch.autograd.gradcheck(lambda *a: sigmoid_sum(*a, b, t, lowest=-2), (x, s, u))
        return
    upstream = torch.randn(3, 20, dtype=torch.float64)
    found = {}
    for how in (True, False):
        y = sigmoid_sum(x, s, u, b, t, lowest=-2, hard=how)
        found[how] = torch.autograd.grad(y, (x, s, u), upstream)
    for at in (0, 2):  # a hard forward changes the gradient of what it multiplies alone
        torch.testing.assert_close(found[True][at], found[False][at])
    steps = reached(x.detach(), u.detach(), b) - 2
    torch.testing.assert_close(found[True][1], (upstream * steps).sum(1, keepdim=True))


@pytest.mark.parametrize("hard", [False, True])
def test_the_derivative_may_be_that_of_wider_sigmoids(hard):
    x, s, u = (torch.randn(40, dtype=torch.float64, requires_grad=True), torch.tensor([0.7]), torch.tensor([0.9]))
    s, u, b = s.double().requires_grad_(), u.double().requires_grad_(), THRESHOLDS.double()
    found = {}
    for name, temperature, cap in (("capped", 42.0, 3.0), ("wide", 3.0, 99.0)):
        t = torch.tensor([temperature], dtype=torch.float64)
        y = sigmoid_sum(x, s, u, b, t, lowest=-2, hard=hard, temperature_backward_max=cap)
        if not hard:
            np.testing.assert_allclose(y.detach(), formula(x.detach().numpy(), 0.7, 0.9, temperature), atol=1e-6)
        found[name] = torch.autograd.grad(y.sum(), (x, u))
    torch.testing.assert_close(found["capped"], found["wide"])


def test_gradients_stay_level_as_the_temperature_rises():
    weight = torch.randn(64, 64)
    norms = {}
    for cap in (LayerSpec().slope_backward_max, None):
        spec = LayerSpec(quantizer="qn", bits=2, slope_backward_max=cap)
        quantizer = build_weight_quantizer(spec, ScaleLayout(), weight.numel())
        quantizer.calibrate_(weight)
        for slope in (1.0, 16.0):
            quantizer.slope.fill_(slope)
            given = weight.clone().requires_grad_()
            quantizer(given).backward(torch.ones_like(weight))
            norms[cap, slope] = float(given.grad.norm() / 64)
    assert norms[1.0, 16.0] == pytest.approx(norms[1.0, 1.0])
    assert norms[1.0, 16.0] < 1 < 0.7 * norms[None, 16.0]


def test_a_growing_temperature_turns_sigmoids_into_steps():
    x = torch.linspace(-3, 3, 301) + 1e-2
    one = torch.ones(1)
    steps = reached(x, one, THRESHOLDS) - 2
    gaps = [
        float((sigmoid_sum(x, one, one, THRESHOLDS, torch.tensor([t]), lowest=-2) - steps).abs().mean())
        for t in (5.0, 20.0, 80.0, 1e9)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3


def test_the_start_is_that_of_the_authors():
    torch.manual_seed(0)
    weight = torch.randn(8, 200)
    quantizer = SigmoidSumQuantizer(code_range(3))
    quantizer.calibrate_(weight)
    unit = float(weight.abs().max()) / 3 / 1.25
    assert quantizer.input_scale.item() == pytest.approx(unit)
    steps, found = (weight / unit).flatten(), quantizer.thresholds[:6]
    centres, _ = fit_codebook(torch.cat([steps, -steps]), 7, signed=True)
    torch.testing.assert_close(found, ((centres[1:] + centres[:-1]) / 2).float(), rtol=1e-5, atol=1e-5)
    assert quantizer.thresholds[6] == torch.inf
    codes = quantizer.encode(weight).float()
    assert quantizer.scale.item() == pytest.approx(float((codes * weight).sum() / codes.square().sum()), rel=1e-5)
    quantizer.calibrate_(weight, "max")
    assert quantizer.scale.item() == pytest.approx(unit)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["gelu", "far", "constant", "gaussian", "shifted"])
def test_no_sample_is_quantized_far_worse_than_by_even_levels(kind, bits):
    torch.manual_seed(0)
    x = torch.randn(5000)
    kinds = {"gelu": nn.functional.gelu(2 * x), "far": torch.rand(5000) + 1, "constant": x * 0 - 2.5, "shifted": x + 1}
    x = kinds.get(kind, x)
    losses = {}
    for method in ("qn", "lsq"):
        inputs = build_activation_quantizer(LayerSpec(quantizer=method, bits=bits))
        inputs.calibrate_(x, float(x.min()))
        losses[method] = float((inputs.eval()(x) - x).detach().square().sum())
    assert losses["qn"] <= 2.01 * losses["lsq"] + 1e-6


def test_frozen_values_stay_at_their_codes_as_scales_part():
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    quantizer = SigmoidSumQuantizer(code_range(3), layout=ScaleLayout.per_channel(weight.shape))
    quantizer.calibrate_(weight)
    with torch.no_grad():
        quantizer.input_scale.mul_(1.7)
        quantizer.scale.mul_(0.6)
    codes = quantizer.encode(weight)
    assert not torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
    assert torch.equal(quantizer.encode(quantizer.hold(codes)), codes)
    pulled = quantizer.hold(codes).requires_grad_()
    quantizer.regularizer(pulled, kind="nearest").backward()
    assert pulled.grad.abs().max() < 1e-6


def test_figures_are_of_its_own_thresholds():
    torch.manual_seed(0)
    weight = torch.randn(4000)
    quantizer = SigmoidSumQuantizer(code_range(4))
    quantizer.calibrate_(weight)
    found, hard = quantizer.statistics(weight), quantizer.hard(weight)
    assert float(found.loss) == pytest.approx(float((weight - hard).square().sum()), rel=1e-4)
    assert float(found.zero_fraction) == pytest.approx(float((hard == 0).float().mean()))


@pytest.mark.parametrize("sample", [torch.rand(500) + 5, torch.cat([torch.full((500,), -4.0), torch.rand(500)])])
def test_zero_stays_a_level_wherever_the_clusters_are(sample):
    inputs = build_activation_quantizer(LayerSpec(quantizer="qn", bits=3))
    inputs.calibrate_(sample, float(sample.min()))
    assert not bool(inputs.eval()(torch.zeros(4)).any())
    limits = inputs.quantizer.thresholds
    assert bool((limits.diff()[limits.diff().isfinite()] >= 0).all())


def test_settled_levels_are_their_own_hard_values():
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    quantizer = SigmoidSumQuantizer(CodeRange(-3, 3, 0.0), layout=ScaleLayout.per_channel(weight.shape))
    quantizer.calibrate_(weight)
    with torch.no_grad():
        quantizer.input_scale.mul_(1.7)  # as training may
    hard, levels = quantizer.hard(weight), quantizer.level_values()
    assert not torch.equal(quantizer.hard(hard), hard)
    quantizer.settle_()
    assert torch.equal(quantizer.hard(hard), hard)
    assert torch.equal(quantizer.level_values(), levels)


def trained_apart():
    """A network whose two scales have parted, as training has them."""
    torch.manual_seed(0)
    network = small_cnn()
    lq.quantize_model(network, lq.QuantSpec(quantizer="qn", bits=3))
    x = torch.randn(32, 3, 8, 8)
    lq.calibrate(network, [x])
    with torch.no_grad():
        for layer in named_quantized_layers(network).values():
            for quantizer in (layer.weight_quantizer, layer.input_quantizer.quantizer):
                if isinstance(quantizer, SigmoidSumQuantizer):
                    quantizer.input_scale.mul_(1.3)
                    quantizer.scale.mul_(0.8)
    network(x)  # statistics of the batch norms
    return network.eval(), x


def test_two_scales_survive_storing_integers_and_onnx(tmp_path):
    network, x = trained_apart()
    expected = network(x).detach()
    architecture = {"import_path": "tests.helpers.modules:small_cnn"}
    path = lq.save(network, tmp_path / "net.lq.safetensors", architecture=architecture)
    loaded = lq.load(path, allow=[architecture["import_path"]])
    assert torch.equal(loaded(x), expected)
    near = lq.IntegerNetwork(network, (3, 8, 8))(x)
    assert float((near - expected).abs().median()) < 1e-3 * float(expected.abs().max())
    runtime = pytest.importorskip("onnxruntime")
    file = write_onnx(network, tmp_path / "net.onnx", (3, 8, 8))
    (y,) = runtime.InferenceSession(file).run(None, {"input": x.numpy()})
    assert np.median(np.abs(y - expected.numpy())) < 1e-4 * float(expected.abs().max())


def tied():
    """Two layers that share their weight."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    return model


def test_tied_weights_are_stored_settled(tmp_path):
    torch.manual_seed(0)
    model, x = tied(), torch.randn(32, 8)
    lq.quantize_model(model, lq.QuantSpec(quantizer="qn", bits=3))
    lq.calibrate(model, [x])
    with torch.no_grad():
        model[2].weight_quantizer.input_scale.mul_(1.4)
    architecture = {"import_path": "tests.quantizers.test_sigmoid_sum:tied"}
    path = lq.save(model, tmp_path / "net.lq.safetensors", architecture=architecture)
    assert torch.equal(lq.load(path, allow=[architecture["import_path"]])(x), model.eval()(x))


def test_integers_need_uniform_inputs_of_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))
    lq.quantize_model(model, lq.QuantSpec(quantizer="qn", first_last_bits=None))
    lq.calibrate(model, [torch.randn(8, 3, 6, 6)])
    with pytest.raises(UnsupportedError, match="0: inputs of the network must be uniform: leave first_last_bits=8"):
        lq.IntegerNetwork(model, (3, 6, 6))
