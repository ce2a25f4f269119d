import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.functional import hard_quantize, level_regularizer, level_statistics, level_values
from lq.functional.levels import CodeRange
from lq.functional.regularizer import REGULARIZERS
from tests.helpers import numpy_reference

RANGES = [CodeRange(-1, 1, 0.0), CodeRange(-7, 7, 0.0), CodeRange(-2, 1, 0.5)]


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from(RANGES),
    kind=st.sampled_from(REGULARIZERS),
    scale=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_value_equals_numpy_reference(codes, kind, scale, seed):
    x = np.random.default_rng(seed).normal(0, 3 * scale, 200)
    value = level_regularizer(
        torch.from_numpy(x), torch.tensor([scale], dtype=torch.double), **codes._asdict(), kind=kind
    )
    assert value.item() == pytest.approx(numpy_reference.regularizer(x, scale, *codes, kind=kind), rel=1e-6)


@pytest.mark.parametrize("kind", REGULARIZERS)
@pytest.mark.parametrize("shape", [(1,), (5, 1)])
def test_gradient_equals_autograd_of_the_formula(kind, shape):
    x = torch.randn(5, 40, dtype=torch.double, requires_grad=True)
    s = (torch.rand(shape, dtype=torch.double) + 0.2).requires_grad_()
    level_regularizer(x, s, lo=-2, hi=1, offset=0.5, kind=kind, scale_gradient=True).backward()
    got = x.grad, s.grad
    x.grad = s.grad = None
    u = (x / s - 0.5).clamp(-2, 1)
    d = u - u.round().detach()
    f = {"nearest": d**2, "l1": d.abs(), "sine": torch.sin(torch.pi * d) ** 2 / torch.pi**2}[kind]
    (0.5 * s.detach() ** 2 * f).sum().backward()
    torch.testing.assert_close(got[0], x.grad)
    torch.testing.assert_close(got[1], s.grad)


def test_nearest_pulls_by_exactly_the_residual():
    x = (torch.rand(200) - 0.5).requires_grad_()
    s = torch.tensor([0.1])
    level_regularizer(x, s, lo=-7, hi=7).backward()
    torch.testing.assert_close(x.grad, (x - hard_quantize(x, s, lo=-7, hi=7)).detach(), atol=1e-6, rtol=0)


def test_scale_gets_no_gradient_unless_asked():
    s = torch.tensor([0.1], requires_grad=True)
    value = level_regularizer(torch.randn(9, requires_grad=True), s, lo=-7, hi=7)
    assert torch.autograd.grad(value, s, allow_unused=True) == (None,)


@pytest.mark.parametrize("kind", REGULARIZERS)
def test_is_zero_on_the_levels(kind):
    s = torch.tensor([0.5])
    levels = level_values(RANGES[2], s)
    assert level_regularizer(levels, s, **RANGES[2]._asdict(), kind=kind).item() == pytest.approx(0, abs=1e-9)


def test_unknown_kind():
    with pytest.raises(ValueError, match="regularizer must be one of .* got 'cubic'"):
        level_regularizer(torch.ones(1), torch.ones(1), lo=-1, hi=1, kind="cubic")


def test_statistics_of_known_values():
    s, codes = torch.tensor([0.5]), CodeRange(-2, 2, 0.0)
    on = level_statistics(torch.tensor([-1.0, 0.0, 0.5]), s, codes)
    assert (on.alignment.item(), on.loss.item(), on.zero_fraction.item()) == pytest.approx((1, 0, 1 / 3))
    midway = level_statistics(torch.tensor([0.25, -0.75]), s, codes)
    assert midway.alignment.item() == pytest.approx(-1)
    clipped = level_statistics(torch.tensor([3.0, 0.1]), s, codes, power=4)
    assert clipped.clipped_fraction.item() == 0.5
    assert clipped.loss.item() == pytest.approx(2.0**4 + 0.1**4)
    assert clipped.sqnr_db.item() == pytest.approx(10 * np.log10((3**4 + 0.1**4) / (2**4 + 0.1**4)), rel=1e-5)


def test_alignment_of_uniform_residuals_is_zero():
    x = torch.linspace(-1, 1, 400001)
    assert level_statistics(x, torch.tensor([0.25]), CodeRange(-4, 4, 0.0)).alignment.item() == pytest.approx(
        0, abs=1e-3
    )
