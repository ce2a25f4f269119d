"""Weights that an accumulator of few bits cannot overflow with: a bound on the sum of their magnitudes."""

import torch
from torch import Tensor

__all__ = ["bound_l1", "l1_bound", "project_l1"]

_SLACK = 1 - 2.0**-14  # room for the rounding of floating point: the sum of codes is whole and stays below the bound


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


def bound_l1(rows: Tensor, norm: Tensor, limit: Tensor | None, *, centred: bool = False) -> Tensor:
    """Rows scaled to a given sum of magnitudes, or to a limit where that is less::

        v * min(g, limit) / sum |v|                    (v of mean 0 where ``centred``)

    Args:
        rows: v, shape ``(C, N)``.
        norm: g, shape ``(C,)``, positive.
        limit: shape ``(C,)``, for the result; None for no limit.
        centred: whether to take the mean from every row first.

    Returns:
        Shape of ``rows``.

    Source: Colbert et al., A2Q, ICCV 2023, where v is the parameter and g is learned; centred as in A2Q+, ICML 2024.

    >>> bound_l1(torch.tensor([[1.0, -3.0]]), torch.tensor([8.0]), torch.tensor([2.0]))
    tensor([[ 0.5000, -1.5000]])
    """
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    if limit is not None:
        norm = torch.minimum(norm, limit * _SLACK)
    tiny = torch.finfo(rows.dtype).tiny
    return rows * (norm / rows.abs().sum(1).clamp_min(tiny))[:, None]


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
