"""Levels at learned distances from each other."""

import torch
from torch import Tensor

from lq.functional.layout import positive
from lq.functional.lookup import count_reached, take

__all__ = ["learned_step_points", "learned_step_quantize"]


def learned_step_points(steps: Tensor, below: int) -> Tensor:
    """Levels that neighbouring steps lead to, starting from 0 in both directions.

    Args:
        steps: from the lowest level to the highest, shape ``(K - 1,)``; their magnitudes are used.
        below: how many of them lie below 0.

    Returns:
        Ascending levels, shape ``(K,)``, 0 among them; differentiable in the steps.

    >>> learned_step_points(torch.tensor([2.0, 1.0, 0.5]), 2)
    tensor([-3.0000, -1.0000,  0.0000,  0.5000])
    """
    gaps = positive(steps)
    low = -gaps[:below].flip(0).cumsum(0).flip(0)
    return torch.cat([low, gaps.new_zeros(1), gaps[below:].cumsum(0)])


def learned_step_quantize(x: Tensor, steps: Tensor, below: int) -> Tensor:
    """Nearest of levels whose distances are learned::

        y       = the nearest level                     f = (x - L_k) / s_k  in the interval of the step s_k
        dy/dx   = 1 inside the range, 0 outside
        dy/ds_k = round(f) - f in the interval of s_k, 0 in others; beyond the range 1 above (below zero: -1) for
                  every step on that side

    Args:
        x: any shape, floating point.
        steps: see `learned_step_points`.
        below: see there.

    Returns:
        Levels, shape of ``x``.

    Source: Gongyo et al., Learning Non-uniform Step Sizes for Neural Network Quantization (nuLSQ), ACCV 2024.

    >>> steps = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = learned_step_quantize(torch.tensor([0.25, 2.0, 9.0]), steps, 0)
    >>> y.sum().backward()
    >>> y.tolist(), steps.grad.tolist()  # 1 each from the 9, -1/4 from 0.25, 1/2 from the tie at 2
    ([0.0, 3.0, 3.0], [0.75, 1.5])
    """
    levels = learned_step_points(steps, below)
    fixed, value = levels.detach(), x.detach()
    interval = count_reached(value, fixed[1:-1])
    gap, low = take(positive(steps), interval), take(fixed, interval)
    f = (value - low) / gap.detach()
    up = (f >= 0.5).to(value.dtype)
    near = torch.where(up > 0, take(fixed, interval + 1), low)
    inside = x + (near - value) + (up - f) * (gap - gap.detach())
    return torch.where(value > fixed[-1], levels[-1], torch.where(value < fixed[0], levels[0], inside))
