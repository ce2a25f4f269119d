import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.functional import dequantize, hard_quantize, lsq_gradient_scale, lsq_quantize, quantize
from lq.functional.levels import CodeRange
from tests.helpers import numpy_reference

RANGES = [CodeRange(-1, 1, 0.0), CodeRange(-7, 7, 0.0), CodeRange(-8, 7, 0.5), CodeRange(0, 15, 0.0)]


@settings(max_examples=60, deadline=None)
@given(codes=st.sampled_from(RANGES), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_nearest_level_of_all(codes, scale, seed):
    x = np.random.default_rng(seed).normal(0, 4 * scale, 300)
    y = hard_quantize(torch.from_numpy(x), torch.tensor([scale], dtype=torch.double), **codes._asdict())
    np.testing.assert_allclose(y, numpy_reference.hard(x, scale, *codes), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(codes=st.sampled_from(RANGES), scale=st.floats(2**-20, 2**20, width=32), seed=st.integers(0, 999))
def test_codes_give_back_the_very_value(codes, scale, seed):
    x = torch.from_numpy(np.random.default_rng(seed).normal(0, 4 * scale, 300).astype(np.float32))
    s = torch.tensor([scale])
    stored = quantize(x, s, **codes._asdict()).to(torch.int16)
    assert stored.min() >= codes.lo
    assert stored.max() <= codes.hi
    value = hard_quantize(x, s, **codes._asdict())
    assert torch.equal(dequantize(stored, s, offset=codes.offset), value)
    assert torch.equal(hard_quantize(value, s, **codes._asdict()), value)  # levels are fixed points


@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("shape", [(1,), (6, 1)])
def test_lsq_equals_the_published_gradients(codes, shape):
    x = (torch.randn(6, 400, dtype=torch.double) * 4).requires_grad_()
    s = (torch.rand(shape, dtype=torch.double) + 0.2).requires_grad_()
    upstream = torch.randn_like(x)
    y = lsq_quantize(x, s, gradient_scale=0.25, **codes._asdict())
    y.backward(upstream)
    v = (x / s - codes.offset).detach()
    inside = (v >= codes.lo) & (v <= codes.hi)
    q = v.clamp(codes.lo, codes.hi).round() + codes.offset
    torch.testing.assert_close(y, q * s)
    assert x.grad is not None
    assert s.grad is not None
    torch.testing.assert_close(x.grad, upstream * inside)
    per_value = torch.where(inside, q - (x / s).detach(), q)
    torch.testing.assert_close(s.grad, 0.25 * (upstream * per_value).sum_to_size(shape))


@pytest.mark.parametrize("formats", [("x",), ("grad",), ("x", "grad")])
def test_scales_learn_the_same_where_channels_lie_side_by_side(formats):
    given = {"x": torch.randn(2, 6, 5, 4, dtype=torch.double), "grad": torch.randn(2, 6, 5, 4, dtype=torch.double)}
    other = {n: t.to(memory_format=torch.channels_last) if n in formats else t for n, t in given.items()}
    gradients = []
    for tensors in (given, other):
        s = torch.tensor([0.4], dtype=torch.double, requires_grad=True)
        lsq_quantize(tensors["x"], s, lo=-3, hi=3).backward(tensors["grad"])
        gradients.append(s.grad)
    torch.testing.assert_close(*gradients)


def test_lsq_is_the_hard_quantizer_in_float32():
    x, s = torch.randn(10000) * 3, torch.tensor([0.37])
    assert torch.equal(lsq_quantize(x, s, lo=-7, hi=7), hard_quantize(x, s, lo=-7, hi=7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codes", RANGES)
def test_half_precision_is_computed_in_float32_and_kept_as_it_is(dtype, codes):
    values, upstream = (torch.randn(6, 400) * 4).to(dtype), torch.randn(6, 400).to(dtype)
    gradients, kept = [], []
    for x in (values.clone(), values.float()):
        s = torch.tensor([0.37], requires_grad=True)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = lsq_quantize(x.requires_grad_(), s, **codes._asdict())
        assert {t.dtype for t in (y, *kept) if t.numel() > 1} == {x.dtype}
        assert torch.equal(y, hard_quantize(values.float(), s, **codes._asdict()).to(x.dtype))
        y.backward(upstream.to(x.dtype))
        assert x.grad is not None
        gradients.append((x.grad.to(dtype), s.grad))
    (x_half, s_half), (x_whole, s_whole) = gradients
    assert torch.equal(x_half, x_whole)
    torch.testing.assert_close(s_half, s_whole, rtol=1e-4, atol=1e-3)


def test_weights_on_an_end_level_still_learn():
    s = torch.tensor([0.1])
    x = torch.tensor([0.7, -0.7], requires_grad=True)
    lsq_quantize(x, s, lo=-7, hi=7).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1]


def test_gradient_scale():
    assert lsq_gradient_scale(1024, 7) == pytest.approx(1 / (1024 * 7) ** 0.5)
