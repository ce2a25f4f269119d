"""LSQ+: published values and gradients, a least-squares start, and what an offset means for export."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.exporting.c import CProgram, write_c
from lq.exporting.onnx import write_onnx
from lq.functional.affine import best_affine
from lq.functional.levels import CodeRange
from lq.functional.scale import initial_scale
from lq.quantizers import build_activation_quantizer
from lq.quantizers.lsq_plus import LSQPlusQuantizer
from lq.spec import LayerSpec
from lq.surgery import make_plan, swap_report

CODES = CodeRange(0, 15, 0.0)


def made(scale=0.2, offset=-0.3, **common):
    quantizer = LSQPlusQuantizer(CODES, **common)
    with torch.no_grad():
        quantizer.scale.fill_(scale)
        quantizer.offset.fill_(offset)
    return quantizer


def test_values_and_gradients_are_the_published_ones():
    torch.manual_seed(0)
    x = (torch.randn(7, 40) * 2).requires_grad_()
    upstream = torch.randn(7, 40)
    quantizer = made(gradient_scale=False)
    quantizer.train()(x).backward(upstream)
    s, b, v, g = 0.2, -0.3, x.detach().double().numpy(), upstream.double().numpy()
    t = (v - b) / s
    codes = np.round(np.clip(t, 0, 15))
    np.testing.assert_allclose(quantizer(x).detach(), codes * s + b, rtol=1e-5, atol=1e-6)
    inside = (t >= 0) & (t <= 15)
    np.testing.assert_allclose(x.grad, g * inside, rtol=1e-6)
    np.testing.assert_allclose(quantizer.offset.grad, [(g * ~inside).sum()], rtol=1e-4)
    np.testing.assert_allclose(quantizer.scale.grad, [(g * np.where(inside, codes - t, codes)).sum()], rtol=1e-3)


def test_the_gradient_scale_is_that_of_the_step():
    x = torch.randn(7, 40) * 3
    gradients = []
    for scaled in (True, False):
        quantizer = made(gradient_scale=scaled)
        quantizer.train()(x).sum().backward()
        gradients.append(torch.cat([quantizer.offset.grad, quantizer.scale.grad]))
    torch.testing.assert_close(gradients[0], gradients[1] / (40 * 15) ** 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_every_way_to_the_levels_is_the_same(training):
    quantizer, x = made().train(training), torch.linspace(-2, 5, 300)
    with torch.no_grad():
        without = quantizer(x)
    assert torch.equal(quantizer(x), without)
    assert torch.equal(quantizer.hard(x), without)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), without)
    assert set(without.tolist()) == set(quantizer.level_values().tolist())


def brute(x, h, codes):
    """Least loss over a fine grid of both ends."""
    low, high = x.min(), x.max()
    best = np.inf
    for a in np.linspace(low, 0, 60):
        for z in np.linspace(0.05 * high, high, 120):
            s = (z - a) / codes.hi
            best = min(best, (h * (x - (np.clip(np.round((x - a) / s), 0, codes.hi) * s + a)) ** 2).sum())
    return best


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["swish", "relu", "gaussian"])
def test_the_start_is_about_the_best_there_is(kind, bits):
    torch.manual_seed(0)
    x = torch.randn(3000)
    x = {"swish": nn.functional.silu(2 * x), "relu": x.relu(), "gaussian": x}[kind]
    h = torch.rand(3000)
    codes = CodeRange(0, 2**bits - 1, 0.0)
    scale, offset = best_affine(x, codes, h)
    y = ((x - offset) / scale).round().clamp(0, codes.hi) * scale + offset
    loss = float((h * (x - y).square()).sum())
    assert loss < 1.02 * brute(x.double().numpy(), h.double().numpy(), codes)


def test_swish_is_where_an_offset_pays():
    torch.manual_seed(0)
    x = nn.functional.silu(torch.randn(4000))
    losses = {}
    for method in ("lsq", "lsq_plus"):
        inputs = build_activation_quantizer(LayerSpec(quantizer=method, bits=4))
        inputs.calibrate_(x, float(x.min()))
        losses[method] = float((inputs.eval()(x) - x).square().mean())
    assert losses["lsq_plus"] < 0.5 * losses["lsq"]


def test_values_that_are_all_the_same_and_values_that_are_none():
    scale, offset = best_affine(torch.full((100,), 3.0), CODES)
    assert float(scale) > 0
    assert float(offset) == 3
    assert best_affine(torch.zeros(100), CODES)[0] == initial_scale(torch.zeros(1, 100), CODES)
    with pytest.raises(ValueError, match="cannot set a scale from values that are not finite"):
        best_affine(torch.tensor([1.0, float("nan")]), CODES)


def network(activation=nn.SiLU, bits=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), activation(), nn.Conv2d(4, 4, 3, padding=1), activation())
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(4 * 36, 3))
    lq.quantize_model(model, lq.QuantSpec(quantizer="lsq_plus", bits=bits))
    lq.calibrate(model, [torch.randn(32, 3, 6, 6)])
    return model.eval()


def test_padding_inserts_zeros_in_float_and_in_onnx(tmp_path):
    model = network()
    layer, x = model[2], torch.randn(5, 3, 6, 6)
    assert not bool((layer.input_quantizer.quantizer.level_values() == 0).any())
    seen = torch.randn(1, 4, 6, 6)
    inside = nn.functional.pad(layer.input_quantizer(seen), (1,) * 4)
    expected = nn.functional.conv2d(inside, layer.quantized_weight(), layer.bias)
    torch.testing.assert_close(layer(seen), expected)
    runtime = pytest.importorskip("onnxruntime")
    path = write_onnx(model, tmp_path / "net.onnx", (3, 6, 6))
    (y,) = runtime.InferenceSession(path).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(y, model(x).detach(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_keep_zeros_and_offsets(tmp_path, bits):
    model, x = network(nn.ReLU, bits), torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        model[2].input_quantizer.quantizer.offset.fill_(-0.13)
    expected = model(x)
    integers = lq.IntegerNetwork(model, (3, 6, 6))
    near = integers(x)
    largest = float(expected.abs().max())
    assert float((near - expected).abs().median()) < 2e-3 * largest
    assert float((near - expected).abs().max()) < 0.1 * largest  # ties
    takes = integers.layers[1].takes
    assert 0 not in takes.points.tolist()
    levels = model[2].input_quantizer.quantizer.level_values()
    unit = float(levels.diff()[0]) / float(takes.points.diff()[0])
    torch.testing.assert_close(takes.points * unit, levels, atol=unit / 2, rtol=1e-5)
    assert int(takes.points.abs().max()) >= 2**13  # as fine as 16 bits hold
    assert int(takes.points.abs().max()) < 2**15


def test_offsets_leave_room_for_sums():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4000), nn.ReLU(), nn.Linear(4000, 3))
    lq.quantize_model(model, lq.QuantSpec(quantizer="lsq_plus", bits=8))
    lq.calibrate(model, [torch.randn(32, 12)])
    with torch.no_grad():
        model[2].input_quantizer.quantizer.offset.fill_(-0.13)
        model[2].weight.fill_(1.0)  # all at the end of their range
    x = torch.randn(16, 12)
    engine = lq.IntegerNetwork(model.eval(), (12,))
    assert int(engine.layers[1].bounds.abs().max()) < 2**31
    torch.testing.assert_close(engine(x).float(), model(x), rtol=1e-2, atol=1e-1)


def test_the_program_in_c_takes_the_same_codes(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    model, x = network(nn.ReLU), torch.randn(16, 3, 6, 6)
    engine = lq.IntegerNetwork(model, (3, 6, 6))
    write_c(engine, tmp_path / "net.c")
    program = CProgram(tmp_path / "net.c")
    codes = program.encode(x)
    assert torch.equal(codes.int(), engine.encode(x))
    assert torch.equal(program.run(codes), engine.run(engine.encode(x)))


def test_codes_are_unsigned_whatever_the_values():
    model = network()
    report = swap_report(make_plan(model, lq.QuantSpec(quantizer="lsq_plus")))
    assert {row.activation for row in report.rows} == {"shifted"}
    assert model[0].input_quantizer.quantizer.codes == CodeRange(0, 255, 0.0)
    assert bool((model[0].input_quantizer.quantizer.level_values() < 0).any())
    half = model[0].input_quantizer(torch.randn(4, 3, 6, 6).half())
    assert half.dtype == torch.float16
