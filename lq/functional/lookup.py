"""Counting thresholds and looking values up in small tables, in the ways that vectorise."""

import torch
from torch import Tensor

__all__ = ["count_reached", "take"]

_FEW = 32  # up to so many thresholds are counted one by one, which takes a fraction of a search's time


def count_reached(u: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds each value has reached.

    Args:
        u: any shape; ``(C, N)`` for thresholds of each row.
        thresholds: ascending, shape ``(K,)`` or ``(C, K)``; infinite ones are never reached.

    Returns:
        Counts from 0 to K, int64, shape of ``u``.

    >>> count_reached(torch.tensor([-3.0, 0.5, 9.0]), torch.tensor([0.5, 2.0]))
    tensor([0, 1, 2])
    """
    thresholds = thresholds.to(u.dtype)
    if thresholds.shape[-1] <= _FEW:
        count = torch.zeros(u.shape, dtype=torch.uint8, device=u.device)
        for threshold in thresholds.unbind(-1):
            column = threshold.reshape(-1, 1) if threshold.dim() else threshold
            count += u >= column
        return count.long()
    if thresholds.dim() == 1:
        return torch.bucketize(u, thresholds, right=True)
    return torch.searchsorted(thresholds.contiguous(), u.contiguous(), right=True)


def take(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table.

    Args:
        table: shape ``(K,)``, or ``(C, K)`` for an index of shape ``(C, N)``.
        index: whole numbers, int64.

    Returns:
        Shape of the index.

    >>> take(torch.tensor([0.5, 1.0]), torch.tensor([[1, 0], [1, 1]]))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    if table.dim() == 1:
        return table.index_select(0, index.reshape(-1)).reshape(index.shape)  # many times as fast as table[index]
    return table.gather(1, index)
