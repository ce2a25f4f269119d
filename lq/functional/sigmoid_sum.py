"""A staircase of shifted sigmoids at fixed thresholds, with learned scales of what goes in and of what comes out."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.layout import positive, reduce_to_scale
from lq.functional.lookup import count_reached

__all__ = ["reached", "sigmoid_sum"]

_SHARPEST = 2000.0
_STEEPEST = 80.0  # exp(-80) is a normal number
_CACHED = 1 << 15  # elements


class _SigmoidSum(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        input_scale: Tensor,
        thresholds: Tensor,
        temperature: Tensor,
        lowest: float,
        hard: bool,
        gradient_scale: float,
        temperature_backward_max: float,
    ) -> Tensor:
        temperature = temperature.to(x.dtype).clamp_max(_SHARPEST)
        slope = temperature.clamp_max(temperature_backward_max)
        twice = hard or math.isfinite(temperature_backward_max)
        t = x / positive(input_scale)
        steps, derivative = torch.full_like(t, lowest), torch.zeros_like(t)
        sharp, wide = None if hard else temperature, slope if twice else None
        for pieces in zip(_parts(t), _parts(steps), _parts(derivative), strict=True):
            _add_sigmoids(*pieces, thresholds.to(x.dtype), sharp, wide)
        if hard:
            steps = reached(x, input_scale, thresholds).to(x.dtype) + lowest
        ctx.save_for_backward(x, steps, derivative.mul_(slope), scale, input_scale)
        ctx.gradient_scale = gradient_scale
        return steps * positive(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, steps, derivative, scale, input_scale = ctx.saved_tensors
        unit = positive(input_scale)
        grad_x = grad * derivative * (positive(scale) / unit)
        grad_scale = reduce_to_scale(grad, steps, scale) * torch.sign(scale)
        grad_input = -reduce_to_scale(grad_x, x, input_scale) / unit * torch.sign(input_scale)
        return grad_x, grad_scale * ctx.gradient_scale, grad_input * ctx.gradient_scale, *[None] * 6


def _parts(x: Tensor) -> list[Tensor]:
    """Pieces that a processor's cache holds while all sigmoids are added to them: several times as fast there."""
    if x.device.type != "cpu" or x.dim() == 0 or torch.compiler.is_compiling():
        return [x]
    length = max(1, _CACHED * len(x) // max(1, x.numel()))
    return [x[i : i + length] for i in range(0, len(x), length)]


def _add_sigmoids(
    t: Tensor, steps: Tensor, derivative: Tensor, thresholds: Tensor, temperature: Tensor | None, wide: Tensor | None
) -> None:
    """Add the sigmoids to the steps unless they are hard, and their derivatives, or those of wider ones, in place."""
    rise = t
    for threshold in thresholds:
        above = t - threshold
        if temperature is not None:
            rise = _sigmoid_(above * temperature)
            steps.add_(rise)
        if wide is not None:
            rise = _sigmoid_(above.mul_(wide))
        derivative.add_(rise).addcmul_(rise, rise, value=-1)


def _sigmoid_(x: Tensor) -> Tensor:
    """In place, and 0 below the rounding error of a step.

    The exponentials of far thresholds, and products of a few of them, are so small that they cost a CPU many times as
    much as other numbers.
    """
    return torch.threshold_(x.clamp_(-_STEEPEST, _STEEPEST).sigmoid_(), torch.finfo(x.dtype).eps, 0.0)


def sigmoid_sum(
    x: Tensor,
    scale: Tensor,
    input_scale: Tensor,
    thresholds: Tensor,
    temperature: Tensor,
    *,
    lowest: float,
    hard: bool = False,
    gradient_scale: float = 1.0,
    temperature_backward_max: float = math.inf,
) -> Tensor:
    """Sum of sigmoids, one per threshold, that a growing temperature turns into steps::

        y = s * (lowest + sum over k of sigmoid(T (x/u - b_k)))           T at most 2000

    with the exact derivatives in x, s and u, or with those of wider sigmoids in x and u.

    Args:
        x: floating point, any shape.
        scale: s, of what comes out, broadcastable to ``x``; its magnitude is used.
        input_scale: u, of what goes in, shape of the scale; its magnitude is used.
        thresholds: b, ascending, shape ``(L-1,)``; infinite ones count for nothing.
        temperature: T, one element.
        lowest: level below all thresholds, in steps.
        hard: steps in the forward pass, the sigmoids' derivatives in the backward pass.
        gradient_scale: factor on the gradients of both scales.
        temperature_backward_max: cap on the temperature in the derivative alone, which is T/4 at thresholds and
            vanishes between them as T grows; positive.

    Returns:
        Shape of ``x``.

    Source: Yang et al., Quantization Networks, CVPR 2019, equations 4 to 8, for evenly spaced levels; the authors' code
        has a wider derivative, too.

    >>> one = torch.ones(1)
    >>> sigmoid_sum(torch.tensor([-3.0, 0.5, 3.0]), one, one, torch.tensor([-0.5, 0.5]), 99 * one, lowest=-1)
    tensor([-1.0000,  0.5000,  1.0000])
    """
    return _SigmoidSum.apply(  # type: ignore[no-any-return]
        x, scale, input_scale, thresholds, temperature, lowest, hard, gradient_scale, temperature_backward_max
    )


def reached(x: Tensor, input_scale: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds each value has reached: what the sum becomes as the temperature grows.

    Args:
        x: any shape.
        input_scale: u, broadcastable to ``x``; its magnitude is used.
        thresholds: b, ascending, shape ``(L-1,)``.

    Returns:
        Whole numbers from 0 to L-1, int64, shape of ``x``.

    >>> reached(torch.tensor([-3.0, 0.5, 3.0]), torch.ones(1), torch.tensor([-0.5, 0.5])).tolist()
    [0, 2, 2]
    """
    return count_reached(x / positive(input_scale), thresholds)
