"""Levels at learned distances from each other."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lq.functional.layout import in_memory_order, positive
from lq.functional.lookup import count_reached, take
from lq.functional.points import midpoints

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
    return _LearnedSteps.apply(x, steps, below)


class _LearnedSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, below: int) -> Tensor:  # type: ignore[override]
        levels = learned_step_points(steps, below)
        index = count_reached(x, midpoints(levels))
        y = torch.where(x == x, take(levels, index), x)  # NaN stays, so that it is found
        ctx.save_for_backward(x, y, index.to(torch.uint8), steps, levels)
        ctx.below = below
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, index, steps, levels = ctx.saved_tensors
        below = ctx.below
        outside = (x < levels[0]) | (x > levels[-1])
        # the interval of each value, 0 below all of them: that above its level, or else that under it
        interval = index.int() + (x > y)
        share = torch.where(outside, grad, grad * (y - x))
        if interval.stride() != share.stride():  # the gradient may lie otherwise than the values
            interval, share = interval.contiguous(), share.contiguous()
        interval, share = in_memory_order(interval).reshape(-1), in_memory_order(share).reshape(-1)
        sums = share.new_zeros(len(levels) + 1).index_add_(0, interval, share)
        ends = torch.cat([-sums[:1].expand(below), sums[-1:].expand(len(steps) - below)])
        return grad.masked_fill(outside, 0), (sums[1:-1] / positive(steps) + ends) * torch.sign(steps), None
