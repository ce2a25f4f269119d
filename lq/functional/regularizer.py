"""The scale regularizer: a loss that falls as weights approach their levels."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.layout import pass_inside, positive, reduce_to_scale

__all__ = ["REGULARIZERS", "chosen_regularizer", "level_regularizer"]

REGULARIZERS = ("nearest", "l1", "sine")


def _penalty(d: Tensor, s: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Penalty of signed distances in steps, summed over what shares a scale, and half its derivative."""
    if kind == "nearest":
        return reduce_to_scale(d, d, s), d
    if kind == "l1":
        sign = d.sign()
        return reduce_to_scale(d, sign, s), sign.div_(2)
    sine = (math.pi * d).sin_().div_(math.pi)
    return reduce_to_scale(sine, sine, s), (2 * math.pi * d).sin_().div_(2 * math.pi)


class _Regularizer(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, offset: float, kind: str, scale_gradient: bool
    ) -> Tensor:
        s = positive(scale)
        t = x / s
        if offset:
            t = t.sub_(offset)
        u = t.clamp(lo, hi)
        penalty, half = _penalty(u - u.round(), s, kind)
        pull = pass_inside(half, t, lo, hi)  # dR/dx = s * pull: s^2 from R, 1/s from u = x/s
        ctx.scale_gradient = scale_gradient
        saved = (-reduce_to_scale(pull, x, s) * torch.sign(scale),) if scale_gradient else ()
        ctx.save_for_backward(pull.mul_(s), *saved)
        return torch.dot(penalty.reshape(-1), s.square().reshape(-1)) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x, *grad_scale = ctx.saved_tensors
        return grad_x * grad, grad_scale[0] * grad if ctx.scale_gradient else None, *[None] * 5


def level_regularizer(
    x: Tensor,
    scale: Tensor,
    *,
    lo: int,
    hi: int,
    offset: float = 0.0,
    kind: str = "nearest",
    scale_gradient: bool = False,
) -> Tensor:
    """Pull of a tensor towards its levels::

        R = 1/2 sum sg(s)^2 f(d),     u = clip(x/s - offset, lo, hi),     d = u - round(u)
        nearest  f = d^2              dR/dx = x - Q(x) inside the range: residuals decay like weights under weight decay
        l1       f = |d|              dR/dx = s sign(d) / 2
        sine     f = sin^2(pi d) / pi^2

    ``sg`` stops the gradient. With ``scale_gradient`` the scale, too, receives a gradient, through ``d`` alone.

    Args:
        x: weights, any shape.
        scale: step, shape broadcastable to ``x``; its magnitude is used.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps.
        kind: ``"nearest"``, ``"l1"`` or ``"sine"``.
        scale_gradient: whether ``scale`` learns from this term.

    Returns:
        The sum, a scalar.

    Raises:
        ValueError: for an unknown ``kind``.

    Source: nearest after SYMOG (Enderich et al. 2020), sine after SinReQ (Elthakeb et al. 2019).

    >>> level_regularizer(torch.tensor([0.6]), torch.tensor([0.5]), lo=-3, hi=3)
    tensor(0.0050)
    """
    if kind not in REGULARIZERS:
        raise ValueError(f"regularizer must be one of {REGULARIZERS}, got {kind!r}: choose one of those")
    return _Regularizer.apply(x, scale, lo, hi, offset, kind, scale_gradient)  # type: ignore[no-any-return]


def chosen_regularizer(x: Tensor, target: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Pull of a tensor towards what was chosen for each of its values, be it the nearest level or not::

        R = 1/2 sum (clip(x, low, high) - target)^2        dR/dx = x - target inside the range, 0 outside

    Args:
        x: weights, any shape.
        target: without a gradient, shape of ``x``.
        low: smallest target that there may be, broadcastable to ``x``.
        high: largest.

    Returns:
        The sum, a scalar.

    >>> chosen_regularizer(torch.tensor([0.6, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor(-1.0), torch.tensor(1.0))
    tensor(0.1800)
    """
    return (torch.minimum(torch.maximum(x, low), high) - target).square().sum() / 2
