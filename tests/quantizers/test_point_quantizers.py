import pytest
import torch

import lq
from lq.functional import fit_codebook
from lq.functional.layout import ScaleLayout
from lq.quantizers import APoTQuantizer, CodebookQuantizer, LogQuantizer, SubsetQuantizer, build_activation_quantizer
from lq.spec import LayerSpec


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_subset_quantizer_finds_what_the_search_finds(signed, power, weighted):
    weight = torch.randn(6, 40)
    h = torch.rand(6, 40) if weighted else None
    layout = ScaleLayout.along(weight.shape, 0)
    quantizer = SubsetQuantizer(3, signed=signed, power=power, per_channel=True, layout=layout)
    quantizer.calibrate_(weight, importance=h)
    found = lq.search_subset(weight, bits=3, signed=signed, power=power, importance=h, channel_axis=0)
    torch.testing.assert_close(quantizer.points, found.points, rtol=0, atol=0)
    torch.testing.assert_close(quantizer.scale.detach(), found.scale, rtol=0, atol=0)
    torch.testing.assert_close(quantizer.hard(weight), found.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("signed", [False, True])
def test_a_codebook_quantizer_finds_the_optimum(signed):
    weight = torch.randn(6, 40)
    quantizer = CodebookQuantizer(3, signed=signed)
    quantizer.calibrate_(weight)
    _, loss = fit_codebook(weight, quantizer.points.numel(), signed=signed)
    error = quantizer.hard(weight).detach().double() - weight
    assert error.square().sum().item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_of_apot_learns_and_alpha_as_published(bits):
    quantizer = APoTQuantizer(bits, gradient_scale=False).train()
    weight = torch.randn(4000, requires_grad=True)
    quantizer.calibrate_(weight.detach())
    quantizer.scale.data.fill_(1.5)  # some weights lie outside at every width
    upstream = torch.randn(4000)
    quantizer(weight).backward(upstream)
    torch.testing.assert_close(weight.grad, upstream, rtol=0, atol=0)
    levels, alpha, top = quantizer.hard(weight).detach(), quantizer.scale.item(), quantizer.points.max().item()
    inside = weight.detach().abs() <= alpha * top
    assert 0 < int(inside.sum()) < 4000
    expected = torch.where(inside, (levels - weight.detach()) / alpha, top * weight.detach().sign())
    torch.testing.assert_close(quantizer.scale.grad, (upstream * expected).sum().reshape(1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("span", [None, 7.0])
def test_every_weight_of_logarithmic_levels_learns(span):
    quantizer = LogQuantizer(2, span=span).train()
    weight = torch.randn(4000, requires_grad=True)
    quantizer.calibrate_(weight.detach())
    upstream = torch.randn(4000)
    (gradient,) = torch.autograd.grad(quantizer(weight), weight, upstream)
    assert bool((weight.abs() > quantizer.level_values().max()).any())  # no learned scale brings these back inside
    torch.testing.assert_close(gradient, upstream)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("lowest", [0.0, -1.0])
@pytest.mark.parametrize("method", ["subset", "apot"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uneven_levels_of_inputs_have_straight_through_gradients(method, lowest, bits, channels_last):
    spec = LayerSpec(bits=bits, quantizer=method, activation_levels="subset", gradient_scale=False)
    quantizer = build_activation_quantizer(spec).train()
    x = torch.randn(4, 8, 16, 16).clamp_min(lowest)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    quantizer.calibrate_(x, lowest)
    scale = quantizer.quantizer.scale
    scale.data.mul_(0.8)  # so that some values lie outside
    levels = quantizer.quantizer.level_values()
    x.requires_grad_()
    y = quantizer(x)
    assert y.stride() == x.stride()
    assert torch.equal(y.detach(), quantizer.eval()(x).detach())
    assert set(y.unique().tolist()) <= set(levels.tolist())
    near = levels[(x.detach()[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close((y - x).abs().detach(), (near - x).abs().detach())
    upstream = torch.randn(x.shape)
    y.backward(upstream)
    inside = (x >= levels[0]) & (x <= levels[-1])
    assert 0.3 < inside.float().mean() < 1
    assert torch.equal(x.grad, upstream * inside)
    expected = (upstream * (y - x * inside)).sum() / scale
    torch.testing.assert_close(scale.grad, expected.detach(), rtol=1e-3, atol=1e-2)
