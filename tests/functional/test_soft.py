import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.functional import hard_quantize, level_values, soft_staircase
from lq.functional.levels import CodeRange
from lq.functional.soft import _BLOCK, STAIRCASES
from tests.helpers import numpy_reference

RANGES = [CodeRange(-1, 1, 0.0), CodeRange(-7, 7, 0.0), CodeRange(-2, 1, 0.5), CodeRange(0, 15, 0.0)]


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from(RANGES),
    staircase=st.sampled_from(STAIRCASES),
    slope=st.floats(0, 60),
    scale=st.floats(0.05, 5),
    seed=st.integers(0, 1000),
)
def test_equals_numpy_reference(codes, staircase, slope, scale, seed):
    x = np.random.default_rng(seed).normal(0, 3 * scale, 200)
    t = torch.from_numpy(x).requires_grad_()
    y = soft_staircase(
        t,
        torch.tensor([scale], dtype=torch.double),
        torch.tensor([slope], dtype=torch.double),
        staircase=staircase,
        **codes._asdict(),
    )
    value, derivative = numpy_reference.soft_staircase(x, scale, slope, *codes, g=staircase)
    np.testing.assert_allclose(y.detach(), value, atol=1e-9 * scale)
    y.sum().backward()
    assert t.grad is not None
    np.testing.assert_allclose(t.grad, derivative, atol=1e-8)


@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.05, 0.1, 1.0, 8.0, 100.0])
def test_float32_stays_near_the_reference_at_every_slope(codes, slope):
    x = np.random.default_rng(0).normal(0, 2, 3000).astype(np.float32)
    y = soft_staircase(torch.from_numpy(x), torch.tensor([0.5]), torch.tensor([slope]), **codes._asdict())
    value, _ = numpy_reference.soft_staircase(x.astype(np.float64), 0.5, slope, *codes)
    assert np.abs(y.numpy() - value).max() < 2e-5


@pytest.mark.parametrize("staircase", STAIRCASES)
@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("shape", [(1,), (4, 1, 1)])
def test_gradcheck(staircase, codes, shape):
    x = torch.randn(4, 3, 5, dtype=torch.double, requires_grad=True)
    s = (torch.rand(shape, dtype=torch.double) * 0.3 + 0.4).requires_grad_()
    k = torch.tensor([2.5], dtype=torch.double)
    assert torch.autograd.gradcheck(
        lambda x, s: soft_staircase(x, s, k, staircase=staircase, **codes._asdict()), (x, s)
    )


@pytest.mark.parametrize("staircase", STAIRCASES)
@pytest.mark.parametrize("codes", RANGES)
def test_passes_through_every_level_at_every_slope(staircase, codes):
    s = torch.tensor([0.3], dtype=torch.double)
    levels = level_values(codes, s)
    for k in (0.0, 0.5, 3.0, 40.0):
        y = soft_staircase(levels, s, torch.tensor([k]), staircase=staircase, **codes._asdict())
        torch.testing.assert_close(y, levels, atol=1e-12, rtol=0)


@pytest.mark.parametrize("staircase", STAIRCASES)
@pytest.mark.parametrize("codes", RANGES)
def test_limits_are_identity_and_rounding(staircase, codes):
    s = torch.tensor([0.3], dtype=torch.double)
    levels = level_values(codes, s)
    x = torch.linspace(levels[0].item(), levels[-1].item(), 501, dtype=torch.double)
    flat = soft_staircase(x, s, torch.tensor([0.0]), staircase=staircase, **codes._asdict())
    torch.testing.assert_close(flat, x, atol=1e-7, rtol=0)
    steep = soft_staircase(x, s, torch.tensor([1e7]), staircase=staircase, **codes._asdict())
    away = ((x / s - codes.offset) % 1 - 0.5).abs() > 1e-3  # a tie has two nearest levels
    torch.testing.assert_close(steep[away], hard_quantize(x, s, **codes._asdict())[away], atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(0, 200), codes=st.sampled_from(RANGES), staircase=st.sampled_from(STAIRCASES))
def test_is_continuous_and_rising(slope, codes, staircase):
    x = torch.linspace(-4, 8, 20001, dtype=torch.double)
    s = torch.tensor([0.5], dtype=torch.double)
    y = soft_staircase(x, s, torch.tensor([slope]), staircase=staircase, **codes._asdict())
    jumps = y.diff()
    assert jumps.min() >= -1e-9
    assert jumps.max() <= 6.01e-4 * (1 + slope)  # Lipschitz with constant k g'(0) / (2 g(k/2))


def test_hard_forward_keeps_the_soft_derivative():
    x = torch.randn(500, dtype=torch.double, requires_grad=True)
    s, k = torch.tensor([0.3], dtype=torch.double), torch.tensor([4.0])
    soft = torch.autograd.grad(soft_staircase(x, s, k, lo=-3, hi=3).sum(), x)[0]
    y = soft_staircase(x, s, k, lo=-3, hi=3, hard=True)
    assert torch.equal(y, hard_quantize(x, s, lo=-3, hi=3))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], soft, atol=0, rtol=0)


def test_cap_on_the_backward_slope_changes_the_derivative_alone():
    x = torch.randn(500, dtype=torch.double, requires_grad=True)
    s = torch.tensor([0.3], dtype=torch.double)
    steep = soft_staircase(x, s, torch.tensor([50.0]), lo=-3, hi=3)
    capped = soft_staircase(x, s, torch.tensor([50.0]), lo=-3, hi=3, slope_backward_max=4.0)
    mild = soft_staircase(x, s, torch.tensor([4.0]), lo=-3, hi=3)
    assert torch.equal(steep, capped)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (capped, mild)]
    assert torch.equal(*gradients)


def test_scale_gradient_outside_the_range_is_the_end_level():
    s = torch.tensor([0.5], requires_grad=True)
    soft_staircase(torch.tensor([9.0]), s, torch.tensor([3.0]), lo=-2, hi=1, offset=0.5).backward()
    assert s.grad is not None
    assert s.grad.item() == pytest.approx(1.5)


def test_straight_through_scale_gradient_has_the_mean_of_the_exact_one_and_less_spread():
    upstream = torch.randn(200, 5000, dtype=torch.double)
    x = torch.rand(200, 5000, dtype=torch.double) * 14 - 7
    gradients = []
    for flag in (False, True):
        s = torch.ones(200, 1, dtype=torch.double, requires_grad=True)
        k = torch.tensor([6.0])
        y = soft_staircase(x, s, k, lo=-7, hi=7, straight_through_scale=flag)
        gradients.append(torch.autograd.grad(y, s, upstream)[0])
        if flag:
            torch.testing.assert_close(gradients[1], (upstream * (y - x)).sum(1, keepdim=True).detach())
        constant = torch.autograd.grad(soft_staircase(x, s, k, lo=-7, hi=7, straight_through_scale=flag).mean(), s)[0]
        assert constant.abs().max() < 1e-3
    assert gradients[0].std() > 5 * gradients[1].std()


def test_blocks_give_what_one_pass_gives():
    x = torch.randn(5, _BLOCK // 2 + 17)
    for s in (torch.tensor([0.2]), torch.rand(5, 1) + 0.1):
        results = []
        for tensor in (x, x.t().contiguous().t()):  # the second is not contiguous and takes the plain path
            tensor = tensor.detach().requires_grad_()
            scale = s.clone().requires_grad_()
            y = soft_staircase(tensor, scale, torch.tensor([6.0]), lo=-7, hi=7)
            y.square().sum().backward()
            results.append((y.detach(), tensor.grad, scale.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_negative_scale_counts_as_its_magnitude():
    x, k = torch.randn(100), torch.tensor([5.0])
    plus, minus = (torch.tensor([v], requires_grad=True) for v in (0.3, -0.3))
    a, b = (soft_staircase(x, s, k, lo=-3, hi=3) for s in (plus, minus))
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert plus.grad is not None
    assert minus.grad is not None
    assert plus.grad.item() == -minus.grad.item()


def test_compiles_without_a_graph_break_and_without_recompiling_as_the_slope_moves():
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(lambda x, s, k: soft_staircase(x, s, k, lo=-7, hi=7), fullgraph=True, backend=counter)
    x, s = torch.randn(50, requires_grad=True), torch.tensor([0.2], requires_grad=True)
    for k in (0.5, 3.0, 9.0):
        slope = torch.tensor([k])
        torch.testing.assert_close(function(x, s, slope), soft_staircase(x, s, slope, lo=-7, hi=7), atol=1e-5, rtol=0)
    assert counter.frame_count == 1


def test_unknown_staircase():
    with pytest.raises(ValueError, match="staircase must be one of .* got 'cosine': choose"):
        soft_staircase(torch.ones(1), torch.ones(1), torch.ones(1), lo=-1, hi=1, staircase="cosine")


def test_no_slope_backward_cap_by_default():
    x = torch.tensor([0.25], requires_grad=True)
    soft_staircase(x, torch.tensor([0.5]), torch.tensor([30.0]), lo=-1, hi=1).backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(15.0, rel=1e-4)
