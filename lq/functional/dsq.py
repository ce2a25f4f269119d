"""Differentiable soft quantization: hard levels, the derivative of a soft staircase with a learned shape."""

import torch
from torch import Tensor

from lq.functional.hard import hard_quantize
from lq.functional.layout import damped, positive

__all__ = ["DSQ_ALPHA_MAX", "dsq_quantize", "dsq_soft"]

DSQ_ALPHA_MAX = 0.5
_ALPHA_MIN = 1e-3


def dsq_soft(x: Tensor, scale: Tensor, alpha: Tensor, *, lo: int, hi: int, offset: float = 0.0) -> Tensor:
    """The soft staircase, differentiable in all three::

        i = floor(u),  u = clip(x/s - offset, lo, hi)        r = u - i - 1/2
        y = s * (i + 1/2 + tanh(k r) / (2 tanh(k/2)) + offset)          k = ln(2/alpha - 1)

    ``alpha = 1 - tanh(k/2)`` is how far the middle of a step stays from the hard staircase: 0 is rounding.

    Args:
        x: floating point, any shape.
        scale: learned step, broadcastable to ``x``; its magnitude is used. It stands for the learned clip values.
        alpha: one element; kept within 0.001 and 0.5.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps.

    Returns:
        Softly quantized values, shape of ``x``.

    Source: Gong et al., Differentiable Soft Quantization, ICCV 2019, equations 3 to 8.

    >>> dsq_soft(torch.tensor([0.5, 0.75, 1.0]), torch.ones(1), torch.tensor([0.5]), lo=-1, hi=1)
    tensor([0.5000, 0.7679, 1.0000])
    """
    s = positive(scale)
    near = alpha + (alpha.clamp(_ALPHA_MIN, DSQ_ALPHA_MAX) - alpha).detach()  # from outside it can still come back
    k = torch.log(2 / near - 1)
    u = (x / s - offset).clamp(lo, hi)
    i = u.detach().floor().clamp(lo, hi - 1)
    return s * (i + 0.5 + torch.tanh(k * (u - i - 0.5)) / (2 * torch.tanh(k / 2)) + offset)


def dsq_quantize(
    x: Tensor, scale: Tensor, alpha: Tensor, *, lo: int, hi: int, offset: float = 0.0, gradient_scale: float = 1.0
) -> Tensor:
    """Nearest levels in the forward pass, the derivatives of `dsq_soft` in the backward pass.

    Args:
        x: as there.
        scale: as there.
        alpha: as there.
        lo: as there.
        hi: as there.
        offset: as there.
        gradient_scale: factor on the gradients of ``scale`` and ``alpha``; by its plain gradient alpha wanders, and
            ResNet-20 at 2 bits ended 2.6 points lower (benchmarks/accuracy.py, one run).

    Returns:
        Levels, shape of ``x``.

    Source: as there, equation 6: the sign function behind the soft staircase has a straight-through gradient.

    >>> x = torch.tensor([0.2, 0.9], requires_grad=True)
    >>> dsq_quantize(x, torch.ones(1), torch.tensor([0.4]), lo=-1, hi=1).tolist()
    [0.0, 1.0]
    """
    learned = damped(scale, gradient_scale), damped(alpha, gradient_scale)
    soft = dsq_soft(x, *learned, lo=lo, hi=hi, offset=offset)
    return soft + (hard_quantize(x, positive(scale), lo=lo, hi=hi, offset=offset) - soft).detach()
