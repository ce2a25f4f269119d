"""PACT, SAWB, DSQ and logarithmic levels against what their authors wrote down."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lq.functional.clipping import SAWB_COEFFICIENTS, pact_quantize, sawb_scale
from lq.functional.dsq import dsq_quantize, dsq_soft
from lq.functional.levels import CodeRange, code_range
from lq.functional.log_levels import log_points, log_round, power_of_two_scale

X = torch.linspace(-5, 5, 41, dtype=torch.float64) + 0.013


@pytest.mark.parametrize("codes", [CodeRange(0, 3, 0.0), CodeRange(-3, 3, 0.0)])
def test_pact_learns_its_bound_from_clipped_values_alone(codes):
    scale = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    x, upstream = X.clone().requires_grad_(), torch.randn_like(X)
    y = pact_quantize(x, scale, **codes._asdict())
    y.backward(upstream)
    alpha, low = 0.7 * codes.hi, 0.7 * codes.lo
    steps = np.clip(np.round(X.numpy() / 0.7), codes.lo, codes.hi)
    np.testing.assert_allclose(y.detach().numpy(), steps * 0.7, atol=1e-12)
    inside = (alpha > X) & (low < X)
    torch.testing.assert_close(x.grad, upstream * inside)
    below = -1.0 if codes.lo < 0 else 0.0
    of_alpha = (upstream * (alpha < X)).sum() + below * (upstream * (low > X)).sum()
    # a step of SGD on the scale moves alpha = hi * scale as one on alpha itself would
    torch.testing.assert_close(scale.grad * codes.hi, of_alpha.reshape(1))


@given(st.sampled_from(sorted(SAWB_COEFFICIENTS)), st.floats(0.01, 100))
def test_sawb_is_the_formula_and_scales_with_the_weights(levels, factor):
    codes = code_range(2, levels=levels, grid="mid_tread" if levels % 2 else "mid_rise")
    rows = torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c1, c2 = SAWB_COEFFICIENTS[levels]
    w = rows.numpy()
    bound = c1 * np.sqrt((w**2).mean(1)) + c2 * np.abs(w).mean(1)
    np.testing.assert_allclose(sawb_scale(rows, codes).numpy() * codes.largest, bound, rtol=1e-12)
    torch.testing.assert_close(sawb_scale(rows * factor, codes), sawb_scale(rows, codes) * factor)


@pytest.mark.parametrize("levels", [3, 4, 7, 8, 15, 16])
@pytest.mark.parametrize("density", [torch.distributions.Normal(0, 1), torch.distributions.Laplace(0, 1)])
def test_sawb_is_near_the_bound_with_the_least_error(levels, density):
    codes = code_range(2, levels=levels, grid="mid_tread" if levels % 2 else "mid_rise")
    rows = density.icdf((torch.arange(20001) + 0.5) / 20001).reshape(1, -1)

    def error(scale):
        steps = ((rows / scale - codes.offset).round().clamp(codes.lo, codes.hi) + codes.offset) * scale
        return float((steps - rows).square().mean())

    best = min(error(s) for s in torch.linspace(0.05, 2.5, 400))
    assert error(sawb_scale(rows, codes)) < 1.15 * best


@pytest.mark.parametrize("levels", [*SAWB_COEFFICIENTS, 31, 255, 256])
def test_sawb_outlives_weights_it_was_not_made_for(levels):
    codes = code_range(2, levels=levels, grid="mid_tread" if levels % 2 else "mid_rise")
    rows = torch.stack(
        [
            torch.tensor([1.0, -1.0] * 5),  # of one magnitude
            torch.linspace(-1, 1, 10),
            torch.tensor([1, 1.02, 0.98, 1.1, -1.2, -0.7, 1.3, 0.8, -0.6, 1.0]),
            torch.tensor([0.5] + [0.0] * 9),
        ]
    )
    bound = sawb_scale(rows, codes) * codes.largest
    assert bool((bound <= rows.abs().amax(1) + 1e-6).all())
    assert bool((bound >= 0.85 * rows.square().mean(1).sqrt() - 1e-6).all())
    if levels > 16:
        torch.testing.assert_close(bound, rows.abs().amax(1))
    assert sawb_scale(torch.zeros(1, 4), codes) > 0


def test_sawb_names_the_numbers_of_levels_it_has():
    with pytest.raises(ValueError, match=r"levels must be one of \(3, 4, 7.*or more.*got 5: choose bits and grid"):
        sawb_scale(torch.ones(1, 4), code_range(2, levels=5))
    with pytest.raises(ValueError, match=r"grid must be 'mid_tread' or 'mid_rise' .*'pact', got 'full_range'"):
        sawb_scale(torch.ones(1, 4), code_range(2, grid="full_range"))


def test_values_at_the_bounds_count_as_the_papers_say():
    x = torch.tensor([0.0, 0.5, 3.0, -0.1], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    pact_quantize(x, scale, lo=0, hi=3).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert scale.grad.item() * 3 == pytest.approx(1.0)  # alpha learns where x >= alpha


def test_an_alpha_at_its_bound_or_beyond_comes_back():
    for start in (0.5, 0.6, 1e-4):
        alpha = torch.tensor([start], requires_grad=True)
        dsq_soft(torch.linspace(-1, 1, 7), torch.ones(1), alpha, lo=-1, hi=1).square().sum().backward()
        assert alpha.grad.abs() > 0


@pytest.mark.parametrize("codes", [CodeRange(-3, 3, 0.0), CodeRange(-2, 1, 0.5), CodeRange(0, 3, 0.0)])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.45])
def test_dsq_is_smooth_between_levels_and_its_hard_form_has_that_derivative(codes, alpha):
    x = X[(X / 0.7 - codes.offset - (X / 0.7 - codes.offset).round()).abs() > 0.02].clone().requires_grad_()
    scale = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    shape = torch.tensor([alpha], dtype=torch.float64, requires_grad=True)
    how = codes._asdict()
    assert torch.autograd.gradcheck(lambda *a: dsq_soft(*a, **how), (x, scale, shape), eps=1e-7, atol=1e-5)
    upstream = torch.randn_like(x)
    soft = torch.autograd.grad(dsq_soft(x, scale, shape, **how), (x, scale, shape), upstream)
    hard = torch.autograd.grad(dsq_quantize(x, scale, shape, gradient_scale=0.1, **how), (x, scale, shape), upstream)
    for got, expected, factor in zip(hard, soft, (1, 0.1, 0.1), strict=True):
        torch.testing.assert_close(got, expected * factor)
    steps = np.clip(np.round(x.detach().numpy() / 0.7 - codes.offset), codes.lo, codes.hi) + codes.offset
    np.testing.assert_allclose(dsq_quantize(x, scale, shape, **how).detach().numpy(), steps * 0.7, atol=1e-12)


def test_dsq_formula_in_numpy_and_its_limits():
    alpha, scale = 0.3, 0.5
    k = np.log(2 / alpha - 1)
    x = np.linspace(-0.49, 0.49, 9)  # one step of width 0.5 on either side of zero
    u = x / scale
    i = np.floor(u)
    phi = np.tanh(k * (u - i - 0.5)) / np.tanh(k / 2)  # the authors' S tanh(k(x - m)) with 1/S = 1 - alpha
    assert np.isclose(np.tanh(k / 2), 1 - alpha)
    expected = scale * (i + (phi + 1) / 2)
    args = torch.tensor(x), torch.tensor([scale], dtype=torch.float64)
    got = dsq_soft(*args, torch.tensor([alpha], dtype=torch.float64), lo=-1, hi=1)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    nearly = dsq_soft(*args, torch.tensor([0.0], dtype=torch.float64), lo=-1, hi=1)  # kept at 0.001
    away = np.abs(np.abs(u) - 0.5) > 0.1
    assert np.abs(nearly.numpy() - scale * np.round(u))[away].max() < 0.02


@given(st.integers(2, 16), st.floats(0.5, 12.0))
def test_logarithmic_rounding_is_rounding_of_the_exponent(count, span):
    points = log_points(count, span).double()
    step = span / (count - 1)
    u = torch.exp2(torch.linspace(-span - 2, 1.5, 97, dtype=torch.float64)) * torch.tensor([1.0, -1.0]).repeat(49)[:97]
    position = np.log2(np.abs(u.numpy())) / step
    clear = np.abs(position - np.floor(position) - 0.5) > 1e-5
    expected = np.sign(u.numpy()) * 2 ** (np.clip(np.round(position), 1 - count, 0) * step)
    np.testing.assert_allclose(log_round(u, points).numpy()[clear], expected[clear], rtol=1e-5)


def test_whole_exponents_are_powers_of_two_and_so_is_the_scale():
    assert log_points(8, 7).tolist() == [2.0**-e for e in range(7, -1, -1)]
    rows = torch.tensor([[0.9, -0.1], [0.0, 0.0], [3.1, 0.2], [-2.8, 1.0]])
    assert power_of_two_scale(rows).tolist() == [1.0, 2.0**-39, 4.0, 2.0]
    assert power_of_two_scale(rows, log_points(8, 7))[1] == 2.0**-39


@pytest.mark.parametrize(("bits", "power"), [(2, 2), (3, 2), (3, 4), (4, 2)])
def test_no_power_of_two_loses_less_than_the_scale(bits, power):
    torch.manual_seed(0)
    rows, importance = torch.randn(5, 300).double() * torch.tensor([[1], [0.3], [7], [1e-3], [1]]), torch.rand(5, 300)
    rows[4] = rows[4] ** 3  # a long tail
    points = log_points(2 ** (bits - 1), 2 ** (bits - 1) - 1)
    scale = power_of_two_scale(rows, points, importance, power)

    def losses(s):
        error = (rows - log_round(rows / s[:, None], points) * s[:, None]).abs() ** power
        return (error * importance).sum(1)

    assert torch.equal(scale.log2(), scale.log2().round())
    for octaves in range(-3, 4):
        assert (losses(scale) <= losses(scale * 2.0**octaves) * (1 + 1e-9)).all()
    if bits == 2:
        assert (scale < power_of_two_scale(rows)).all()
