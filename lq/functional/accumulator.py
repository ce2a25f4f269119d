"""Weights that an accumulator of few bits cannot overflow with: a bound on the sum of their magnitudes."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["bound_l1", "l1_bound", "project_l1", "range_factor_step"]

_NOTHING = 2.0**-20  # weights this small against their norm have no direction worth scaling up


def l1_bound(accumulator_bits: int, largest: int, *, centred: bool = False) -> float:
    """Largest sum of magnitudes of the codes of one output channel::

        (2^(P-1) - 1) / X              for any weights                (X = largest magnitude of an input code)
        (2^P - 2) / X                  for weights of mean 0, whose positive ones are half of the sum

    The second needs inputs without negative codes, or no more of them than half of the range.

    Args:
        accumulator_bits: P, width of a signed accumulator.
        largest: X; where inputs may be unsigned that of unsigned codes, ``2^N - 1``.
        centred: whether the weights have mean 0 before they are rounded toward zero.

    Returns:
        The bound.

    Source: Colbert et al., A2Q, ICCV 2023; for centred ones Colbert et al., A2Q+, ICML 2024.

    >>> l1_bound(16, 15), l1_bound(16, 15, centred=True)
    (2184.4666666666667, 4368.933333333333)
    """
    return (2**accumulator_bits - 2 if centred else 2 ** (accumulator_bits - 1) - 1) / largest


def bound_l1(rows: Tensor, log_norm: Tensor, limit: Tensor | None, *, centred: bool = False) -> Tensor:
    """Rows scaled to a given sum of magnitudes, or to a limit where that is less::

        v * min(2^t, limit) / sum |v|

    Where ``centred``, v has mean 0, and the sum is twice the larger one of those of its positive and of its negative
    values: the same, but that no rounding can unbalance it.

    Gradients of t that would carry it further beyond the limit are dropped; the limit, where it is the smaller, has its
    own. Rows of zeros stay, and can leave zero.

    Args:
        rows: v, shape ``(C, N)``, at least float32.
        log_norm: t, shape ``(C,)``.
        limit: shape ``(C,)``, positive, for the result; None for no limit.
        centred: whether to take the mean from every row first.

    Returns:
        Shape of ``rows``.

    Source: Colbert et al., A2Q, ICCV 2023, where v is the parameter and t is learned, with a penalty beyond the limit;
        centred as in A2Q+, ICML 2024.

    >>> bound_l1(torch.tensor([[1.0, -3.0]]), torch.tensor([3.0]), torch.tensor([2.0]))
    tensor([[ 0.5000, -1.5000]])
    """
    norm = (log_norm if limit is None else _Inside.apply(log_norm, limit.log2())).exp2()  # type: ignore[attr-defined]
    if limit is not None:
        norm = norm * (limit / norm).clamp_max(1).detach()  # exp2 of log2 may be a little more
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
        total = 2 * torch.maximum(rows.relu().sum(1), (-rows).relu().sum(1))
    else:
        total = rows.abs().sum(1)
    least = torch.finfo(rows.dtype).tiny  # below it the gradient of the quotient overflows
    usable = (total > norm.detach() * _NOTHING) & (total >= least)
    factor = torch.where(usable, norm / torch.where(usable, total, 1), 1)
    return rows * factor[:, None]


class _Inside(torch.autograd.Function):
    """The smaller of two, which has the gradient; beyond the limit ``x`` has those that lead back to it, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x > limit)
        return torch.minimum(x, limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (beyond,) = ctx.saved_tensors
        return grad.masked_fill(beyond & (grad < 0), 0), grad.masked_fill(~beyond, 0)


def project_l1(rows: Tensor, limit: Tensor) -> Tensor:
    """Nearest rows, in the sum of squares, whose magnitudes sum to a limit at most: all shrink by one amount.

    Args:
        rows: shape ``(C, N)``.
        limit: shape ``(C,)``, positive.

    Returns:
        Shape of ``rows``; rows within the limit are left as they are.

    Source: Duchi et al., Efficient Projections onto the l1-Ball, ICML 2008; A2Q+ begins with it.

    >>> project_l1(torch.tensor([[3.0, -1.0, 0.5]]), torch.tensor([3.0]))
    tensor([[ 2.5000, -0.5000,  0.0000]])
    """
    magnitudes = rows.abs()
    falling = magnitudes.sort(1, descending=True).values
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)
    shrink = (falling.cumsum(1) - limit[:, None]) / count
    kept = (falling > shrink).sum(1, keepdim=True).clamp_min(1)
    by = shrink.gather(1, kept - 1).clamp_min(0)
    return torch.where(magnitudes.sum(1, keepdim=True) > limit[:, None], rows.sign() * (magnitudes - by).relu(), rows)


def range_factor_step(overflows: Tensor, *, rate: float = 0.01, most: float = 0.1, decay: float = 1e-4) -> Tensor:
    """By how much ranges grow that are widened until sums fit::

        min(rate log(1 + N), most)       where N > 0 sums overflowed
        -decay                           where none did

    Args:
        overflows: N, zero or more.
        rate: of growth.
        most: largest growth of one step.
        decay: how fast ranges that fit shrink.

    Returns:
        Shape of ``overflows``.

    Source: Xie et al., Overflow Aware Quantization, IJCAI 2020; the logarithm of 1 + N, so that one overflow counts.

    >>> [round(y, 4) for y in range_factor_step(torch.tensor([0.0, 1.0, 1e6])).tolist()]
    [-0.0001, 0.0069, 0.1]
    """
    return torch.where(overflows > 0, (rate * overflows.log1p()).clamp_max(most), -decay)
