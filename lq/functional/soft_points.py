"""The soft staircase between neighbouring, unequally spaced levels, and the pull towards them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.layout import pass_inside, positive, reduce_to_scale
from lq.functional.lookup import count_reached, look_up, take
from lq.functional.points import decode_points, encode_points, midpoints, signed_levels
from lq.functional.regularizer import REGULARIZERS
from lq.functional.soft import IDENTITY_SLOPE, STAIRCASES, rise_, rise_derivative_, step_height
from lq.functional.statistics import LevelStatistics

__all__ = ["PointSet", "point_regularizer", "point_staircase", "point_statistics"]

_TINY = 1e-12  # a zero of sign-magnitude points stands twice among the levels


class PointSet(NamedTuple):
    """A set of points and how their codes are made.

    Args:
        points: ascending, in units of the scale, shape ``(K,)`` or ``(C, K)``; magnitudes unless ``signed``.
        bits: width of a code.
        signed: whether the points carry their sign.
    """

    points: Tensor
    bits: int
    signed: bool

    @property
    def levels(self) -> Tensor:
        """All levels in units of the scale, ascending."""
        return signed_levels(self.points, signed=self.signed)

    def hard(self, x: Tensor, scale: Tensor) -> Tensor:
        """Nearest level of each value, shape ``(C, N)``, any for one scale: exactly what the stored codes give back."""
        if self.signed and self.points.dim() == scale.numel() == 1:
            levels = self.points.to(scale.dtype) * scale
            return look_up(x / scale, midpoints(self.points), levels)
        codes = encode_points(x, self.points, scale, bits=self.bits, signed=self.signed)
        return decode_points(codes, self.points, scale, bits=self.bits, signed=self.signed)


class _Place(NamedTuple):
    """Where values lie among the levels: the level below, the gap to the next, the position from its middle."""

    low: Tensor
    gap: Tensor
    r: Tensor
    inside: Tensor


def _locate(x: Tensor, s: Tensor, levels: Tensor) -> _Place:
    t, ends = x / s.reshape(-1, 1), (levels[..., :1], levels[..., -1:])
    u = torch.minimum(torch.maximum(t, ends[0]), ends[1])
    index = count_reached(u, levels[..., 1:-1])
    low, high = take(levels, index), take(levels, index + 1)
    gap = (high - low).clamp_min(_TINY)
    return _Place(low, gap, (u - low) / gap - 0.5, _inside(t, levels))


def _inside(t: Tensor, levels: Tensor) -> Tensor:
    ends = levels[..., :1], levels[..., -1:]
    margin = 1e-6 * ends[1].abs()
    return (t >= ends[0] - margin) & (t <= ends[1] + margin)


def _pass_inside(grad: Tensor, x: Tensor, s: Tensor, levels: Tensor) -> Tensor:
    if levels.dim() > 1 or s.numel() > 1:
        return grad * _inside(x / s, levels)
    # the range brought to -1 .. 1, so that the bounds are numbers without waiting for a device
    half, middle = (levels[-1] - levels[0]) / 2, (levels[-1] + levels[0]) / 2
    return pass_inside(grad, (x / (s * half)).sub_(middle / half), -1.0, 1.0)


class _PointStaircase(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        slope: Tensor,
        points: Tensor,
        how: tuple[int, bool, str, bool],
        slope_cap: float,
        gradient_scale: float,
        straight_through: bool,
    ) -> Tensor:
        bits, signed, staircase, hard = how
        s = positive(scale)
        slope = slope.to(s.dtype).clamp_min(IDENTITY_SLOPE)
        set_ = PointSet(points.to(x.dtype), bits, signed)
        if hard:
            y = set_.hard(x, s)
        else:
            place = _locate(x, s, set_.levels)
            rise = rise_(place.r * slope, staircase).div_(step_height(slope, staircase)).add_(0.5)
            y = (rise * place.gap + place.low) * s.reshape(-1, 1)
        ctx.save_for_backward(x, y, scale, slope.clamp_max(slope_cap), set_.levels)
        ctx.how = staircase, gradient_scale, straight_through, slope_cap == 0
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, scale, slope, levels = ctx.saved_tensors
        staircase, gradient_scale, straight_through, flat = ctx.how
        s = positive(scale)
        column = s.reshape(-1, 1)
        if flat:
            grad_x = passed = _pass_inside(grad, x, column, levels)
        else:
            place = _locate(x, s, levels)
            derivative = rise_derivative_(place.r * slope, staircase) * (slope / step_height(slope, staircase))
            passed = grad * place.inside
            grad_x = passed * derivative
        moved = passed if straight_through else grad_x
        grad_scale = (reduce_to_scale(grad, y, column) - reduce_to_scale(moved, x, column)) / column
        grad_scale = grad_scale.reshape(scale.shape) * torch.sign(scale) * gradient_scale
        return grad_x, grad_scale, *[None] * 6


def point_staircase(
    x: Tensor,
    scale: Tensor,
    slope: Tensor,
    set_: PointSet,
    *,
    staircase: str = "tanh",
    hard: bool = False,
    slope_backward_max: float = math.inf,
    gradient_scale: float = 1.0,
    straight_through_scale: bool = False,
) -> Tensor:
    """Soft quantizer onto unequally spaced levels ``s * L_i``; between two neighbours a copy of one odd function::

        u = clip(x/s, L_0, L_last)     L_i <= u <= L_{i+1},  gap = L_{i+1} - L_i     r = (u - L_i)/gap - 1/2
        Q = s * (L_i + gap * (1/2 + g(k r) / (2 g(k/2))))
        dQ/dx = k g'(k r) / (2 g(k/2)) inside the range, 0 outside         dQ/ds = (Q - x dQ/dx) / s

    Args:
        x: shape ``(C, N)``, or ``(1, N)`` for one scale.
        scale: learned factor of all levels, shape ``(C,)`` or ``(1,)``; its magnitude is used.
        slope: ``k >= 0``, one element; 0 is the identity inside the range, infinity the nearest level.
        set_: the points.
        staircase: g: "tanh", "atan" or "linear".
        hard: nearest level in the forward pass, soft derivative in the backward pass.
        slope_backward_max: cap on the slope in the derivative alone; 0 makes it straight-through.
        gradient_scale: factor on the gradient of the scale.
        straight_through_scale: take dQ/dx for 1, its mean, in dQ/ds.

    Returns:
        Softly quantized values, shape of ``x``.

    Raises:
        ValueError: for an unknown ``staircase``.

    Source: design of `lq.functional.soft_staircase`, for unequal gaps; Yang et al., Quantization Networks, CVPR 2019.

    >>> points = PointSet(torch.tensor([0.25, 1.0]), 2, False)
    >>> point_staircase(torch.tensor([[-0.3, 0.8]]), torch.ones(1), torch.tensor([1e4]), points)
    tensor([[-0.2500,  1.0000]])
    """
    if staircase not in STAIRCASES:
        raise ValueError(f"staircase must be one of {STAIRCASES}, got {staircase!r}: choose one of those")
    how = (set_.bits, set_.signed, staircase, hard)
    return _PointStaircase.apply(  # type: ignore[no-any-return]
        x, scale, slope, set_.points, how, slope_backward_max, gradient_scale, straight_through_scale
    )


def point_regularizer(
    x: Tensor, scale: Tensor, set_: PointSet, *, kind: str = "nearest", scale_gradient: bool = False
) -> Tensor:
    """Pull of weights towards unequally spaced levels::

        R = 1/2 sum sg(s)^2 gap^2 f(d / gap)          f as in `lq.functional.level_regularizer`, d to the nearest level

    so that "nearest" has the gradient ``x - Q(x)``, as there.

    Args:
        x: shape ``(C, N)``.
        scale: shape ``(C,)`` or ``(1,)``.
        set_: the points.
        kind: "nearest", "l1" or "sine".
        scale_gradient: whether the scale receives a gradient, through d alone.

    Returns:
        The sum, a scalar.

    Raises:
        ValueError: for an unknown ``kind``.

    >>> point_regularizer(torch.tensor([[1.0]]), torch.ones(1), PointSet(torch.tensor([0.5, 2.0]), 2, False))
    tensor(0.1250)
    """
    if kind not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {REGULARIZERS}, got {kind!r}: choose one of those")
    s = positive(scale)
    levels = set_.levels.to(x.dtype)
    place = _locate(x.detach(), s.detach(), levels)
    t = x / (s if scale_gradient else s.detach()).reshape(-1, 1)
    # the nearer end of the gap, and the distance to it as a share of the gap
    nearest = torch.where(place.r < 0, place.low, place.low + place.gap)
    d = (t - nearest) / place.gap * place.inside
    shape = {"nearest": d.square, "l1": d.abs, "sine": lambda: (math.pi * d).sin().div(math.pi).square()}[kind]()
    return (shape * (place.gap * s.detach().reshape(-1, 1)).square()).sum() / 2


def point_statistics(
    x: Tensor, scale: Tensor, set_: PointSet, power: int = 2, chosen: Tensor | None = None
) -> LevelStatistics:
    """Sums that describe how ``x`` sits on its levels; distances count in gaps.

    Args:
        x: shape ``(C, N)``.
        scale: positive, shape ``(C,)`` or ``(1,)``.
        set_: the points.
        power: 2 or 4.
        chosen: level of each value, one of the two around it, where not the nearest.

    Returns:
        `LevelStatistics` of float64 scalars.

    >>> point_statistics(torch.tensor([[0.25, 1.0]]), torch.ones(1), PointSet(torch.tensor([0.5, 2.0]), 2, False)).loss
    tensor(0.3125, dtype=torch.float64)
    """
    place = _locate(x, scale, set_.levels.to(x.dtype))
    value = set_.hard(x, scale) if chosen is None else chosen
    upper = value / scale.reshape(-1, 1) > place.low + place.gap / 2
    sums = (
        (place.r + 0.5 - upper.to(place.r)).abs_().sum(dtype=torch.float64),
        (x - value).abs_().pow_(power).sum(dtype=torch.float64),
        x.abs().pow_(power).sum(dtype=torch.float64),
        (~place.inside).sum(dtype=torch.float64),
        (value == 0).sum(dtype=torch.float64),
    )
    return LevelStatistics(*sums, torch.full_like(sums[0], x.numel()))
