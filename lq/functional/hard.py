"""Hard uniform quantization: codes, values, and the straight-through quantizer with a learned step (LSQ)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.layout import pass_inside, positive, reduce_to_scale

__all__ = ["dequantize", "hard_quantize", "lsq_gradient_scale", "lsq_quantize", "quantize"]


def quantize(x: Tensor, scale: Tensor, *, lo: int, hi: int, offset: float = 0.0, toward_zero: bool = False) -> Tensor:
    """Codes of the levels nearest to ``x``: ``round(clip(x / s - offset, lo, hi))``, ties to even.

    Args:
        x: any shape.
        scale: positive step, broadcastable to ``x``.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps (1/2 for mid-rise).
        toward_zero: take the next code toward 0 instead of the nearest.

    Returns:
        Integer-valued tensor of the dtype of ``x / scale``, codes in ``lo..hi``.

    >>> quantize(torch.tensor([-9.0, 0.2, 0.6]), torch.tensor([0.5]), lo=-1, hi=1)
    tensor([-1.,  0.,  1.])
    """
    u = x / scale
    if offset:
        u = u - offset
    u = u.clamp(lo, hi)
    return u.trunc() if toward_zero else u.round()


def dequantize(codes: Tensor, scale: Tensor, *, offset: float = 0.0) -> Tensor:
    """Values of codes, ``s * (code + offset)``: one rounding, so stored codes give back the very same value.

    Args:
        codes: integer-valued tensor.
        scale: positive step, broadcastable to ``codes``.
        offset: level of code 0, in steps.

    Returns:
        Values in the dtype of ``scale``.

    >>> dequantize(torch.tensor([-1, 0, 1], dtype=torch.int8), torch.tensor([0.25]), offset=0.5)
    tensor([-0.1250,  0.1250,  0.3750])
    """
    codes = codes.to(scale.dtype)
    return (codes + offset if offset else codes) * scale


def hard_quantize(
    x: Tensor, scale: Tensor, *, lo: int, hi: int, offset: float = 0.0, toward_zero: bool = False
) -> Tensor:
    """Nearest level to ``x``: `dequantize` of `quantize`.

    Args:
        x: any shape.
        scale: positive step, broadcastable to ``x``.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps.
        toward_zero: see `quantize`.

    Returns:
        Levels, shape of ``x``.

    >>> hard_quantize(torch.tensor([0.2, 0.9]), torch.tensor([0.5]), lo=-1, hi=1)
    tensor([0.0000, 0.5000])
    """
    codes = quantize(x, scale, lo=lo, hi=hi, offset=offset, toward_zero=toward_zero)
    return dequantize(codes, scale, offset=offset)


def lsq_gradient_scale(count: int, largest: float) -> float:
    """Factor ``1 / sqrt(N * Q)`` on the gradient of a learned step.

    Args:
        count: ``N``, values that share the step: weights of the tensor or channel, activation features of one sample.
        largest: ``Q``, largest level in steps.

    Returns:
        The factor.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.2.

    >>> lsq_gradient_scale(100, 1.0)
    0.1
    """
    return (max(count, 1) * largest) ** -0.5


class _LSQ(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, lo: int, hi: int, offset: float, gradient_scale: float, toward_zero: bool
    ) -> Tensor:
        s = positive(scale)
        ctx.levels, ctx.gradient_scale = (lo, hi, offset, toward_zero), gradient_scale
        y = _snap_(_in_steps(x, s), *ctx.levels).mul_(s)
        # the next layer keeps this very y; of half precision it keeps another, and y is found again going back
        ctx.save_for_backward(x, scale, *((y,) if y.dtype == x.dtype else ()))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, *y = ctx.saved_tensors
        lo, hi, offset, _ = ctx.levels
        s = positive(scale)
        u = _in_steps(x, s)
        grad = grad.to(u.dtype)
        grad_x = pass_inside(grad, u, lo + offset, hi + offset)
        # dy/ds is y/s - u inside the range and y/s outside; grad_x being 0 there, one formula serves both
        inside = reduce_to_scale(grad_x, u, s)
        outside = reduce_to_scale(grad, y[0], s) / s if y else reduce_to_scale(grad, _snap_(u, *ctx.levels), s)
        grad_scale = outside - inside
        return grad_x.to(x.dtype), grad_scale * torch.sign(scale) * ctx.gradient_scale, None, None, None, None, None


def _in_steps(x: Tensor, s: Tensor) -> Tensor:
    """``x / s`` in the wider of their dtypes; a pass of its own to get there is faster than a mixed division."""
    wide = x.to(torch.promote_types(x.dtype, s.dtype))
    return wide / s if wide is x else wide.div_(s)


def _snap_(u: Tensor, lo: int, hi: int, offset: float, toward_zero: bool) -> Tensor:
    """Levels nearest to values in steps, in steps, in place."""
    if offset:
        u = u.sub_(offset)
    u = (u.trunc_() if toward_zero else u.round_()).clamp_(lo, hi)
    return u.add_(offset) if offset else u


def lsq_quantize(
    x: Tensor,
    scale: Tensor,
    *,
    lo: int,
    hi: int,
    offset: float = 0.0,
    gradient_scale: float = 1.0,
    toward_zero: bool = False,
) -> Tensor:
    """Hard quantizer with straight-through gradient and a learned step::

        y     = s * (round(clip(x/s - offset, lo, hi)) + offset)
        dy/dx = 1 inside the range, 0 outside
        dy/ds = y/s - x/s inside, lo + offset or hi + offset outside       (times ``gradient_scale``)

    Args:
        x: floating point, any shape; half precision is computed in the dtype of ``scale``, and kept as it is.
        scale: learned step, shape broadcastable to ``x``; its magnitude is used, so it can never turn negative.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps.
        gradient_scale: factor on the gradient of ``scale``, see `lsq_gradient_scale`.
        toward_zero: see `quantize`.

    Returns:
        Levels, shape and dtype of ``x``.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, equations 1 to 3.

    >>> x = torch.tensor([0.2, 0.9], requires_grad=True)
    >>> lsq_quantize(x, torch.tensor([0.5]), lo=-1, hi=1).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    return _LSQ.apply(x, scale, lo, hi, offset, gradient_scale, toward_zero)  # type: ignore[no-any-return]
