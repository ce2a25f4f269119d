"""Counting thresholds and looking values up in small tables, in the ways that vectorise."""

import math

import torch
from torch import Tensor

from lq.functional.layout import in_memory_order

__all__ = ["count_reached", "look_up", "take"]

_FEW = 32  # up to so many thresholds are counted one by one, which takes a fraction of a search's time
_CELLS = 4096  # a table of so many entries stays in a core's nearest cache


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
    if (places := _grid(u, thresholds)) is not None:
        cell, counts = places
        return take(counts, cell)
    return _compared(u, thresholds)


def look_up(u: Tensor, thresholds: Tensor, table: Tensor) -> Tensor:
    """``take(table, count_reached(u, thresholds))``, in one step where thresholds lie on a grid.

    Args:
        u: any shape.
        thresholds: ascending, shape ``(K,)``.
        table: shape ``(K + 1,)``.

    Returns:
        Entries, shape of ``u``.

    >>> look_up(torch.tensor([-3.0, 0.5, 9.0]), torch.tensor([0.5, 2.0]), torch.tensor([0.25, 1.0, 4.0]))
    tensor([0.2500, 1.0000, 4.0000])
    """
    if (places := _grid(u, thresholds)) is not None:
        cell, counts = places
        return take(table.index_select(0, counts), cell)
    return take(table, _compared(u, thresholds))


def _compared(u: Tensor, thresholds: Tensor) -> Tensor:
    thresholds = thresholds.to(u.dtype)
    if thresholds.shape[-1] <= _FEW:
        count = torch.zeros_like(u, dtype=torch.uint8)
        for threshold in thresholds.unbind(-1):
            column = threshold.reshape(-1, 1) if threshold.dim() else threshold
            count += u >= column
        return count.long()
    if thresholds.dim() == 1:
        lying = in_memory_order(u)  # what is found lies as it was searched
        found = torch.bucketize(lying, thresholds, right=True)
        return found if lying is u else found.permute(0, 3, 1, 2)
    return torch.searchsorted(thresholds.contiguous(), u.contiguous(), right=True)


def _grid(u: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cell of each value on a grid that thresholds are whole multiples of, and how many of them each cell has reached.

    One multiplication by a power of two, which is exact, takes the place of a comparison per threshold. Midpoints of
    points that are deployed as shifts lie on such a grid. On other devices, and compiled, comparisons are cheap, and
    looking at thresholds would wait.
    """
    here = u.device.type == "cpu" and not torch.compiler.is_compiling()
    exact = u.dtype in (torch.float32, torch.float64)  # half precision does not count to _CELLS
    if not here or not exact or thresholds.dim() != 1 or u.numel() < _CELLS:
        return None
    values = thresholds.to(u.dtype).tolist()
    if not values or not all(map(math.isfinite, values)):
        return None
    fine = max(value.as_integer_ratio()[1] for value in values)
    whole = [int(value * fine) for value in values]
    first, last = min(whole[0] - 1, 0), max(whole[-1], 0)
    if last - first >= _CELLS:
        return None
    place = (u * fine).clamp_(first, last)
    cell = (place.floor_().sub_(first) if first < 0 else place).to(torch.int32)
    counts = torch.bucketize(torch.arange(first, last + 1), torch.tensor(whole), right=True)
    return cell.clamp_(0, last - first), counts  # NaN is no cell


def take(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table.

    Args:
        table: shape ``(K,)``, or ``(C, K)`` for an index of shape ``(C, N)``.
        index: whole numbers, int64; int32, too, for a table of shape ``(K,)``.

    Returns:
        Shape and order in memory of the index.

    >>> take(torch.tensor([0.5, 1.0]), torch.tensor([[1, 0], [1, 1]]))
    tensor([[1.0000, 0.5000],
            [1.0000, 1.0000]])
    """
    if table.dim() == 1:
        lying = in_memory_order(index)
        found = table.index_select(0, lying.reshape(-1)).reshape(lying.shape)  # many times as fast as table[index]
        return found if lying is index else found.permute(0, 3, 1, 2)
    return table.gather(1, index)
