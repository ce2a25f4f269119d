"""Quantizers that learn or compute where to clip: PACT for activations, SAWB for weights."""

import torch
from torch import Tensor

from lq.functional.hard import hard_quantize
from lq.functional.layout import damped, positive
from lq.functional.levels import CodeRange

__all__ = ["SAWB_COEFFICIENTS", "pact_quantize", "sawb_scale"]

# Number of levels to (c1, c2). Those of 7 levels are fitted here as the others were: a straight line through the best
# bounds of six densities, which gives 2.5/-1.6, 3.2/-2.2, 7.5/-6.9 and 11.9/-11.8 for 3, 4, 8 and 15 levels.
SAWB_COEFFICIENTS = {
    3: (2.6, -1.71),
    4: (3.12, -2.064),
    7: (7.017, -6.372),
    8: (7.509, -6.892),
    15: (12.035, -12.03),
    16: (12.68, -12.80),
}
_FLAT = 0.85  # bounds below so many root mean squares are those of weights that no such density describes


def pact_quantize(x: Tensor, scale: Tensor, *, lo: int, hi: int, offset: float = 0.0) -> Tensor:
    """Hard quantizer whose bound ``alpha = s * (hi + offset)`` learns from clipped values alone::

        y         = nearest level to clip(x, s * (lo + offset), alpha)
        dy/dx     = 1 inside the range, 0 outside
        dy/dalpha = 0 inside, 1 above and (where there are negative levels) -1 below

    The gradient of ``scale`` is divided by ``(hi + offset)^2``, so that a step of SGD moves alpha exactly as if alpha
    itself were the parameter.

    Args:
        x: floating point, any shape.
        scale: learned step, broadcastable to ``x``; its magnitude is used.
        lo: smallest code.
        hi: largest code.
        offset: level of code 0, in steps.

    Returns:
        Levels, shape of ``x``.

    Source: Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018, equations 1 to 3.

    >>> scale = torch.tensor([0.5], requires_grad=True)
    >>> y = pact_quantize(torch.tensor([0.2, 0.9, 4.0]), scale, lo=0, hi=3)
    >>> y.sum().backward()
    >>> y.tolist(), scale.grad.item()  # one value above alpha: 3 for the scale, over 9
    ([0.0, 1.0, 1.5], 0.3333333432674408)
    """
    largest = hi + offset
    s = positive(damped(scale, 1 / largest**2))
    low, high = s * (lo + offset), s * largest
    clipped = torch.where(x >= high, high, torch.where(x < low, low, x))
    return clipped + (hard_quantize(x, s, lo=lo, hi=hi, offset=offset) - clipped).detach()


def sawb_scale(rows: Tensor, codes: CodeRange) -> Tensor:
    """Scale from two moments of the weights: the bound ``alpha = c1 sqrt(E[w^2]) + c2 E|w|`` over the largest level.

    The coefficients are a fit of the bound with the least squared error over densities of several shapes. Weights that
    are flatter than those, such as a few of one magnitude, and more than 16 levels take the largest weight for bound.

    Args:
        rows: weights, shape ``(C, N)``, one row per scale.
        codes: code range; up to 16 levels their number is a key of `SAWB_COEFFICIENTS`.

    Returns:
        Positive scales, shape ``(C,)``.

    Raises:
        ValueError: for a number of levels that has no coefficients.

    Source: Choi et al., Accurate and Efficient 2-bit Quantized Neural Networks, MLSys 2019, section 3; coefficients of
        other widths as published with IBM's FMS Model Optimizer.

    >>> sawb_scale(torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), CodeRange(-1, 1, 0.0))
    tensor([0.8900])
    """
    if codes.lo + codes.offset != -codes.largest:
        raise ValueError("grid must be 'mid_tread' or 'mid_rise' for quantizer='pact', got 'full_range': choose one")
    largest = rows.abs().amax(1)
    if codes.levels > max(SAWB_COEFFICIENTS):
        return positive(largest / codes.largest)
    if codes.levels not in SAWB_COEFFICIENTS:
        raise ValueError(
            f"levels must be one of {tuple(SAWB_COEFFICIENTS)} or more for quantizer='pact', got {codes.levels}: "
            "choose bits and grid that have so many"
        )
    first, second = SAWB_COEFFICIENTS[codes.levels]
    rms = rows.square().mean(1).sqrt()
    bound = torch.minimum(first * rms + second * rows.abs().mean(1), largest)
    return positive(torch.where(bound < _FLAT * rms, largest, bound) / codes.largest)
