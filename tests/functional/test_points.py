import numpy as np
import pytest
import torch

from lq.functional import PointSet, decode_points, encode_points, point_regularizer, point_staircase, soft_staircase
from lq.functional.points import nearest_point
from lq.functional.soft_points import point_statistics
from tests.helpers import numpy_reference

POINTS = torch.tensor([0.25, 0.5, 1.5], dtype=torch.float64)
SIGNED = torch.tensor([-2.0, -0.5, 0.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("rows", [False, True])
def test_nearest_point_by_comparison_with_all(count, rows):
    torch.manual_seed(0)
    points = torch.rand(3, count).sort(1).values if rows else torch.rand(count).sort().values
    u = torch.rand(3, 500) * 1.2 - 0.1
    expected = (u[..., None] - (points[:, None] if rows else points)).abs().argmin(-1)
    assert torch.equal(nearest_point(u, points), expected)


def test_codes_give_back_values_and_know_their_sign():
    x = torch.tensor([[-9.0, -0.3, -0.0, 0.0, 0.3, 9.0]]).double()
    codes = encode_points(x, POINTS, torch.ones(1).double(), bits=3, signed=False)
    assert codes.tolist() == [[6, 4, 0, 0, 0, 2]]
    values = decode_points(codes, POINTS, torch.ones(1).double(), bits=3, signed=False)
    assert values.tolist() == [[-1.5, -0.25, 0.25, 0.25, 0.25, 1.5]]
    codes = encode_points(x, SIGNED, torch.ones(1).double(), bits=2, signed=True)
    assert decode_points(codes, SIGNED, torch.ones(1).double(), bits=2, signed=True).tolist() == [
        [-2.0, -0.5, 0.0, 0.0, 0.0, 1.0]
    ]


@pytest.mark.parametrize("g", ["tanh", "atan"])
@pytest.mark.parametrize("k", [1e-3, 2.0, 20.0])
@pytest.mark.parametrize("signed", [False, True])
def test_staircase_and_gradients_match_the_formula(g, k, signed):
    set_ = PointSet(SIGNED if signed else POINTS, 3, signed)
    levels = set_.levels.numpy()
    s = 0.7
    x = torch.linspace(-2.0, 2.0, 80, dtype=torch.float64)[None].requires_grad_()
    scale = torch.tensor([s], dtype=torch.float64, requires_grad=True)
    y = point_staircase(x, scale, torch.tensor([k], dtype=torch.float64), set_, staircase=g)
    value, slope = numpy_reference.point_staircase(x.detach()[0].numpy() / s, k, levels, g)
    np.testing.assert_allclose(y.detach()[0].numpy(), s * value, atol=1e-9)
    y.sum().backward()
    np.testing.assert_allclose(x.grad[0].numpy(), slope, atol=1e-6)
    expected = (y.detach() - x.detach() * torch.from_numpy(slope)).sum() / s
    assert float(scale.grad) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradcheck_where_smooth(per_channel):
    torch.manual_seed(0)
    points = torch.tensor([[0.2, 0.6, 1.0], [0.1, 0.3, 0.9]]).double() if per_channel else POINTS
    set_ = PointSet(points, 3, False)
    x = torch.randn(2, 9, dtype=torch.float64) * 0.4
    scale = torch.tensor([0.8, 1.3], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, s: point_staircase(x, s, slope, set_), (x.requires_grad_(), scale), eps=1e-7, atol=1e-5
    )


def test_limits_of_the_slope_and_straight_through():
    set_ = PointSet(POINTS, 3, False)
    x = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64)[None].requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(point_staircase(x, one, 0 * one, set_), x, atol=1e-6, rtol=0)
    sharp = point_staircase(x, one, 1e6 * one, set_)
    away = (x.detach().abs() - torch.tensor([0.375, 1.0])[:, None, None]).abs().amin(0) > 1e-3
    away &= x.detach().abs() > 1e-3
    torch.testing.assert_close(sharp[away], set_.hard(x, one)[away])
    beyond = torch.cat([x.detach(), torch.full((1, 1), 9.0, dtype=torch.float64)], dim=1)
    for cap in (1e-3, 0.0):
        given, scale = beyond.clone().requires_grad_(), one.clone().requires_grad_()
        hard = point_staircase(given, scale, 5 * one, set_, hard=True, slope_backward_max=cap)
        assert torch.equal(hard, set_.hard(given, scale))
        hard.sum().backward()
        torch.testing.assert_close(given.grad, (beyond.abs() <= 1.5).to(beyond))
        inside = beyond.abs() <= 1.5
        torch.testing.assert_close(scale.grad, (hard - beyond * inside).sum().reshape(1).detach(), atol=1e-4, rtol=0)


def test_equal_gaps_give_the_uniform_staircase():
    torch.manual_seed(0)
    x = torch.randn(1, 200).double()
    scale, slope = torch.tensor([0.3]).double(), torch.tensor([4.0]).double()
    points = torch.tensor([0.5, 1.5, 2.5, 3.5]).double()
    mine = point_staircase(x, scale, slope, PointSet(points, 3, False))
    torch.testing.assert_close(mine, soft_staircase(x, scale, slope, lo=-4, hi=3, offset=0.5))


def test_regularizer_pulls_towards_the_nearest_level():
    set_ = PointSet(POINTS, 3, False)
    x = torch.tensor([[0.3, -0.7, 5.0, 1.2]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    point_regularizer(x, scale, set_).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.05, -0.2, 0.0, -0.3]]).double())
    assert scale.grad is None
    for kind in ("nearest", "l1", "sine"):
        on_levels = set_.levels[None]
        assert float(point_regularizer(on_levels, scale, set_, kind=kind)) == pytest.approx(0, abs=1e-12)
        y = torch.randn(1, 30, dtype=torch.float64, requires_grad=True)
        with_scale = point_regularizer(y, scale, set_, kind=kind, scale_gradient=True)
        assert torch.autograd.grad(with_scale, scale)[0].abs() > 0
    with pytest.raises(ValueError, match="regularizer must be one of"):
        point_regularizer(x, scale, set_, kind="cubic")
    with pytest.raises(ValueError, match="staircase must be one of"):
        point_staircase(x, scale, scale, set_, staircase="step")


def test_statistics_count_in_gaps():
    set_ = PointSet(POINTS, 3, False)
    stats = point_statistics(torch.tensor([[0.25, 0.375, -9.0, 1.5]]).double(), torch.ones(1).double(), set_)
    assert float(stats.distance) == pytest.approx(0.5)
    assert float(stats.clipped) == 1
    assert float(stats.loss) == pytest.approx(0.125**2 + 7.5**2)
