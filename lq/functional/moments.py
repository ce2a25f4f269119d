"""Sums of powers over any range of sorted rows, in constant time and without cancellation.

Prefix sums of ``x^4`` about the origin lose all digits where many narrow ranges are cut from many weights. Here a row
is sorted once and cut into segments; sums are kept at the borders of small blocks, about the centre of their segment,
and what lies between a border and a cut is summed directly.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SortedRows", "sort_rows", "sorted_moments"]

_EVERY_ELEMENT = 1 << 14  # shorter rows keep a sum at every element, longer ones at every block
_BLOCK = 64
_AT_ONCE = 1 << 18  # elements whose powers stay in the cache
_RADIX_ROWS = 16  # up to so many rows are sorted one by one: torch's radix sort knows one dimension only


class SortedRows(NamedTuple):
    """Rows sorted ascending, with the sums that `range_moments` needs; made by `sorted_moments`.

    Args:
        values: shape ``(C, G * S * B)``: G segments of S blocks of B elements, the last value repeated as padding.
        weights: importance in the same order, or None for 1.
        centres: of the segments, shape ``(C, G)``.
        prefix: sums of ``h (x - centre)^k`` over the blocks before, shape ``(C, G, S + 1, p + 1)``.
        count: N, elements per row without padding.
        block: B.
    """

    values: Tensor
    weights: Tensor | None
    centres: Tensor
    prefix: Tensor
    count: int
    block: int

    @property
    def segment(self) -> int:
        """Elements per segment."""
        return self.values.shape[1] // self.centres.shape[1]

    @property
    def power(self) -> int:
        """Highest power summed."""
        return self.prefix.shape[-1] - 1


def sort_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row ascending by the bits of its numbers, which is many times faster than comparing floats on a CPU.

    Args:
        x: float32 or float64, shape ``(C, N)``, finite.

    Returns:
        Sorted rows and the indices that sort them.

    >>> sort_rows(torch.tensor([[0.5, -1.0, 0.25]]))[0]
    tensor([[-1.0000,  0.2500,  0.5000]])
    """
    if x.device.type != "cpu":
        sorted_ = x.sort(dim=1)
        return sorted_.values, sorted_.indices
    kind, rest = (torch.int32, (1 << 31) - 1) if x.dtype == torch.float32 else (torch.int64, (1 << 63) - 1)
    sign = 31 if x.dtype == torch.float32 else 63
    bits = x.contiguous().view(kind)
    keys = bits ^ ((bits >> sign) & rest)
    if x.shape[0] <= _RADIX_ROWS:
        parts = [row.sort() for row in keys]
        keys, order = torch.stack([p.values for p in parts]), torch.stack([p.indices for p in parts])
    else:
        keys, order = keys.sort(dim=1)
    return (keys ^ ((keys >> sign) & rest)).view(x.dtype), order


def sorted_moments(x: Tensor, importance: Tensor | None, power: int) -> SortedRows:
    """Sort rows and sum the powers of their elements block by block.

    Args:
        x: float32 or float64, shape ``(C, N)``, finite.
        importance: not negative, shape of ``x``, or None for 1.
        power: highest power, 2 or 4.

    Returns:
        The rows.
    """
    values, order = sort_rows(x)
    weights = None if importance is None else importance.double().gather(1, order)
    count = x.shape[1]
    block = 1 if count <= _EVERY_ELEMENT else _BLOCK
    most = min(16, count >> 13) if power == 2 else min(64, max(8, count >> 13))
    segments = max(1, min(most, count // (16 * block)))
    blocks = -(-count // (segments * block))
    padding = segments * blocks * block - count
    if padding:
        values = torch.cat([values, values[:, -1:].expand(-1, padding)], dim=1)
        weights = None if weights is None else torch.nn.functional.pad(weights, (0, padding))
    cut = values.view(-1, segments, blocks * block)
    centres = (cut[:, :, 0].double() + cut[:, :, -1].double()) / 2
    rows = SortedRows(values, weights, centres, centres.new_empty(0, 1, 1, power + 1), count, block)
    sums = _block_sums(rows, blocks, power)
    prefix = sums.new_zeros(*sums.shape[:2], blocks + 1, power + 1)
    torch.cumsum(sums, dim=2, out=prefix[:, :, 1:])
    return rows._replace(prefix=prefix)


def _block_sums(rows: SortedRows, blocks: int, power: int) -> Tensor:
    """Sums of powers of every block, shape ``(C, G, S, p + 1)``."""
    (channels, segments), block = rows.centres.shape, rows.block
    shape = (channels, segments, blocks, block)
    values = rows.values.view(shape)
    weights = None if rows.weights is None else rows.weights.view(shape)
    starts = torch.arange(0, segments * blocks * block, block, device=values.device)
    sums = rows.centres.new_empty(channels, segments, blocks, power + 1)
    sums[..., 0] = (rows.count - starts).clamp(0, block).view(segments, blocks)
    height = max(1, _AT_ONCE // (channels * blocks * block))
    for g in range(0, segments, height):
        part = slice(g, g + height)
        distance = values[:, part].double() - rows.centres[:, part, None, None]
        first = max(0, rows.count - g * blocks * block)  # what is padding counts nothing
        distance.view(channels, -1)[:, first:] = 0
        term = distance if weights is None else weights[:, part]
        if weights is not None:
            sums[:, part, :, 0] = term.sum(-1)
            term = term * distance
        for k in range(1, power + 1):
            sums[:, part, :, k] = term.sum(-1)
            if k < power:
                term = term * distance
    return sums


def cut_moments(rows: SortedRows, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the ranges between neighbouring cuts, about the centre of the segment that a range lies in.

    Args:
        rows: from `sorted_moments`.
        cuts: ascending element numbers, shape ``(C, A, Q + 1)``, all borders of segments among them.

    Returns:
        Sums, shape ``(C, A, Q, p + 1)``, and the segment of each range, shape ``(C, A, Q)``.
    """
    channels, last = rows.centres.shape[0], rows.centres.shape[1] - 1
    flat = cuts.reshape(channels, -1)
    segment = (flat // rows.segment).clamp_(max=last)
    offset = flat - segment * rows.segment
    below = offset // rows.block
    index = segment * rows.prefix.shape[2] + below
    sums = _pick(rows.prefix.flatten(1, 2), index)
    if rows.block > 1:
        sums += _partial_blocks(rows, flat, offset - below * rows.block, segment)
    shape = (*cuts.shape, rows.power + 1)
    sums, segment = sums.view(shape), segment.view(cuts.shape)
    here = segment[..., :-1]
    end = sums[..., 1:, :]
    if last:
        totals = _pick(rows.prefix[:, :, -1], here.reshape(channels, -1)).view(end.shape)
        end = torch.where((segment[..., 1:] == here)[..., None], end, totals)
    return end - sums[..., :-1, :], here


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """Rows of ``table`` ``(C, T, K)`` at ``index`` ``(C, Q)``."""
    offsets = torch.arange(table.shape[0], device=index.device)[:, None] * table.shape[1]
    return table.reshape(-1, table.shape[-1]).index_select(0, (index + offsets).view(-1)).view(*index.shape, -1)


def _partial_blocks(rows: SortedRows, cuts: Tensor, inside: Tensor, segment: Tensor) -> Tensor:
    """Sums over the last ``inside`` elements before each cut, shape ``(C, Q, p + 1)``."""
    steps = torch.arange(rows.block, device=cuts.device)
    where = ((cuts - inside)[..., None] + steps).clamp_(max=rows.values.shape[1] - 1)
    flat = where.view(cuts.shape[0], -1)
    weight = (steps < inside[..., None]).double()
    if rows.weights is not None:
        weight *= rows.weights.gather(1, flat).view(where.shape)
    distance = rows.values.gather(1, flat).view(where.shape).double() - rows.centres.gather(1, segment)[..., None]
    sums = [weight.sum(-1)]
    for _ in range(rows.power):
        weight = weight * distance
        sums.append(weight.sum(-1))
    return torch.stack(sums, dim=-1)


def shifted(sums: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
    """Sums of powers of ``(x - c)/a`` from those about another centre: the binomial theorem.

    Args:
        sums: sums of ``(x - c0)^j``, shape ``(..., p + 1)``.
        shift: ``(c0 - c)/a``, broadcastable to one power of ``sums``.
        scale: ``a``, broadcastable likewise.

    Returns:
        One tensor per power.
    """
    powers = sums.shape[-1]
    scaled = [sums[..., j] / scale**j if j else sums[..., 0] for j in range(powers)]
    out = []
    for k in range(powers):
        total = scaled[0]
        for j in range(1, k + 1):  # Horner in the shift
            total = total * shift + math.comb(k, j) * scaled[j]
        out.append(total)
    return out
