"""The soft staircase: shifted copies of one odd function, sharpened by its slope from identity to rounding."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.hard import quantize
from lq.functional.layout import pass_inside, positive, reduce_to_scale

__all__ = ["IDENTITY_SLOPE", "STAIRCASES", "soft_staircase"]

STAIRCASES = ("tanh", "atan", "linear")
IDENTITY_SLOPE = 1e-3
_LOGISTIC_FROM = 1 / 16  # below this slope the logistic form of tanh loses digits to cancellation
_BLOCK = 1 << 16  # elements whose dozen passes stay in the cache of a CPU core


def rise_(x: Tensor, staircase: str) -> Tensor:
    """The odd function g, in place. ``"logistic"`` is tanh(x)/2, three times faster than tanh where it is precise."""
    if staircase == "tanh":
        return x.tanh_()
    if staircase == "logistic":
        return x.mul_(2.0).sigmoid_().sub_(0.5)
    if staircase == "atan":
        return x.atan_()
    return x.clamp_(-1.0, 1.0)


def rise_derivative_(x: Tensor, staircase: str) -> Tensor:
    """g', in place."""
    if staircase == "tanh":
        return x.tanh_().square_().neg_().add_(1.0)
    if staircase == "logistic":
        return x.mul_(2.0).sigmoid_().sub_(0.5).square_().neg_().add_(0.25).mul_(2.0)
    if staircase == "atan":
        return x.square_().add_(1.0).reciprocal_()
    return x.abs_().lt_(1.0)


def step_height(slope: Tensor, staircase: str) -> Tensor:
    """2 g(k/2), the rise of one copy before it is normalised to one step."""
    return rise_(slope / 2, staircase) * 2


class _Shape(NamedTuple):
    """What is fixed about a staircase: its codes, its function, and what its forward pass shows."""

    lo: int
    hi: int
    offset: float
    staircase: str
    hard: bool


def _split(x: Tensor, s: Tensor, shape: _Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Steps before clipping, the stair below, and the position on that stair from its middle."""
    t = x / s
    if shape.offset:
        t = t.sub_(shape.offset)
    u = t.clamp(shape.lo, shape.hi)
    floor = u.floor().clamp_(max=shape.hi - 1)
    return t, floor, u.sub_(floor).sub_(0.5)


def _value(x: Tensor, s: Tensor, slope: Tensor, shape: _Shape, out: Tensor | None = None) -> Tensor:
    if shape.hard:
        u = quantize(x, s, lo=shape.lo, hi=shape.hi, offset=shape.offset)
    else:
        _, u, r = _split(x, s, shape)
        u = u.add_(rise_(r.mul_(slope), shape.staircase).div_(step_height(slope, shape.staircase))).add_(0.5)
    return torch.mul(u.add_(shape.offset) if shape.offset else u, s, out=out)


def _gradient(x: Tensor, grad: Tensor, s: Tensor, slope: Tensor, shape: _Shape, out: Tensor | None = None) -> Tensor:
    """Upstream gradient times dQ/dx."""
    t, _, r = _split(x, s, shape)
    derivative = rise_derivative_(r.mul_(slope), shape.staircase)
    derivative = derivative.mul_(slope / step_height(slope, shape.staircase))
    return torch.mul(pass_inside(grad, t, shape.lo, shape.hi), derivative, out=out)


def _in_blocks(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], s: Tensor, *rest: Any) -> Tensor:
    """``function`` over all of ``inputs``, on a CPU block by block so that its dozen passes stay in the cache."""
    x = inputs[0]
    per_row = s.numel() > 1
    plain = torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= _BLOCK
    if plain or not all(i.is_contiguous() for i in inputs) or (per_row and s.numel() != s.shape[0]):
        return function(*inputs, s, *rest)
    out = torch.empty_like(x)
    rows = [i.view(x.shape[0] if per_row else 1, -1) for i in (*inputs, out)]
    height = max(1, _BLOCK // rows[0].shape[1])
    width = max(1, _BLOCK // height)
    scales = s.view(-1, 1)
    for i in range(0, rows[0].shape[0], height):
        step = scales[i : i + height] if per_row else scales
        for j in range(0, rows[0].shape[1], width):
            *parts, target = (row[i : i + height, j : j + width] for row in rows)
            function(*parts, step, *rest, out=target)
    return out


class _SoftStaircase(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        slope: Tensor,
        shape: _Shape,
        slope_cap: float,
        gradient_scale: float,
        straight_through: bool,
    ) -> Tensor:
        s = positive(scale)
        slope = slope.to(s.dtype).clamp_min(IDENTITY_SLOPE)
        eager_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if shape.staircase == "tanh" and eager_cpu and min(float(slope), slope_cap) > _LOGISTIC_FROM:
            shape = shape._replace(staircase="logistic")
        y = _in_blocks(_value, (x,), s, slope, shape)
        ctx.save_for_backward(x, y, scale, slope.clamp_max(slope_cap))
        ctx.shape, ctx.gradient_scale, ctx.straight_through = shape, gradient_scale, straight_through
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, scale, slope = ctx.saved_tensors
        s = positive(scale)
        grad_x = _in_blocks(_gradient, (x, grad), s, slope, ctx.shape)
        # dQ/ds = (y - x dQ/dx)/s inside and y/s outside, where dQ/dx = 0: one formula, two inner products
        moved = grad_x
        if ctx.straight_through:
            low, high = ctx.shape.lo + ctx.shape.offset, ctx.shape.hi + ctx.shape.offset
            moved = pass_inside(grad, x / s, low, high)
        grad_scale = (reduce_to_scale(grad, y, s) - reduce_to_scale(moved, x, s)) / s
        return grad_x, grad_scale * torch.sign(scale) * ctx.gradient_scale, *[None] * 5


def soft_staircase(
    x: Tensor,
    scale: Tensor,
    slope: Tensor,
    *,
    lo: int,
    hi: int,
    offset: float = 0.0,
    staircase: str = "tanh",
    hard: bool = False,
    slope_backward_max: float = math.inf,
    gradient_scale: float = 1.0,
    straight_through_scale: bool = False,
) -> Tensor:
    """Soft uniform quantizer that passes through every level, is continuous, and sharpens with its slope ``k``::

        u    = clip(x/s - offset, lo, hi)     f = min(floor(u), hi - 1)     r = u - f - 1/2
        phi  = f + 1/2 + g(k r) / (2 g(k/2))                    Q = s * (phi + offset)
        dQ/dx = k g'(k r) / (2 g(k/2)) inside the range, 0 outside
        dQ/ds = phi + offset - (x/s) dQ/dx inside, lo + offset or hi + offset outside    (times ``gradient_scale``)

    ``k -> 0`` is the identity inside the range (slopes below 1e-3 count as that), ``k -> infinity`` is rounding.

    Args:
        x: floating point, any shape.
        scale: learned step, shape broadcastable to ``x``; its magnitude is used.
        slope: ``k >= 0``, one element; a tensor, so that compiled code does not recompile as it moves.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps (1/2 for mid-rise).
        staircase: ``g``: ``"tanh"``, ``"atan"`` or ``"linear"`` (the ramp ``clip(x, -1, 1)``).
        hard: round in the forward pass, keep the soft derivative in the backward pass.
        slope_backward_max: cap on the slope in the derivative alone, which vanishes between levels as k grows.
        gradient_scale: factor on the gradient of ``scale``, see `lsq_gradient_scale`.
        straight_through_scale: take ``dQ/ds = phi + offset - x/s`` inside, as if dQ/dx were its mean, 1. The exact one
            has the same mean, but a spread that grows with the largest level: 127 times LSQ's at 8 bits.

    Returns:
        Softly quantized values, shape of ``x``.

    Raises:
        ValueError: for an unknown ``staircase``.

    Source: the tanh pieces are those of Gong et al., Differentiable Soft Quantization, ICCV 2019, equations 3 to 5;
    the linearly rising slope and soft forward after Yang et al., Quantization Networks, CVPR 2019, section 3.

    >>> x, s = torch.tensor([0.0, 0.125, 0.5]), torch.tensor([0.5])
    >>> soft_staircase(x, s, torch.tensor([0.0]), lo=-1, hi=1)
    tensor([0.0000, 0.1250, 0.5000])
    >>> soft_staircase(x, s, torch.tensor([1e4]), lo=-1, hi=1)
    tensor([0.0000, 0.0000, 0.5000])
    """
    if staircase not in STAIRCASES:
        raise ValueError(f"staircase must be one of {STAIRCASES}, got {staircase!r}: choose one of those")
    shape = _Shape(lo, hi, offset, staircase, hard)
    return _SoftStaircase.apply(  # type: ignore[no-any-return]
        x, scale, slope, shape, slope_backward_max, gradient_scale, straight_through_scale
    )
