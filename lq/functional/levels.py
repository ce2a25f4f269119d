"""Which integers a quantizer stores and which real values they stand for.

Counting conventions are the classic silent bug of quantizers, so here is the whole table (``n`` is the largest code)::

    grid       signed  bits  lo        hi         offset  number of levels  zero level
    mid_tread  yes     b     -n        n          0       2**b - 1          yes   (n = 2**(b-1) - 1)
    mid_tread  no      b     0         2**b - 1   0       2**b              yes
    mid_rise   yes     b     -2**(b-1) 2**(b-1)-1 1/2     2**b              no
    full_range yes     b     -2**(b-1) 2**(b-1)-1 0       2**b              yes

The value of code ``i`` is ``scale * (i + offset)``; the levels of the first and third are symmetric about zero.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lq.checks import require_integer

__all__ = [
    "GRIDS",
    "MAX_BITS",
    "MIN_BITS",
    "CodeRange",
    "bits_for_levels",
    "code_range",
    "level_values",
    "require_bits",
]

GRIDS = ("mid_tread", "mid_rise", "full_range")
MIN_BITS, MAX_BITS = 2, 8


class CodeRange(NamedTuple):
    """The codes ``lo..hi`` and the offset (in steps) that turns a code into a multiple of the scale."""

    lo: int
    hi: int
    offset: float

    @property
    def levels(self) -> int:
        """Number of levels, ``hi - lo + 1``."""
        return self.hi - self.lo + 1

    @property
    def bits(self) -> int:
        """Width in bits of a stored code."""
        return bits_for_levels(self.levels)

    @property
    def largest(self) -> float:
        """Largest level in steps, ``hi + offset``."""
        return self.hi + self.offset


def require_bits(name: str, value: object) -> None:
    """See that a value is the width of a code.

    Args:
        name: of the setting.
        value: what was given.

    Raises:
        ValueError: for anything but an integer from 2 to 8.
    """
    require_integer(name, value, MIN_BITS, MAX_BITS)


def bits_for_levels(levels: int) -> int:
    """Width of the code that tells ``levels`` levels apart, ``ceil(log2(levels))``.

    Args:
        levels: number of levels, at least 2.

    Returns:
        The width in bits.

    >>> bits_for_levels(15), bits_for_levels(16), bits_for_levels(17)
    (4, 4, 5)
    """
    return math.ceil(math.log2(levels))


def code_range(bits: int, *, levels: int | None = None, grid: str = "mid_tread", signed: bool = True) -> CodeRange:
    """Codes of a uniform quantizer; see the table at the top of this file.

    Args:
        bits: width of a code, 2 to 8. Ignored where ``levels`` is given.
        levels: explicit number of levels instead of the most that ``bits`` allows: odd for signed mid-tread (a zero
            level and pairs around it), even for the others, 3 to 256.
        grid: ``"mid_tread"`` (with a zero level), ``"mid_rise"`` (without), or ``"full_range"`` (with a zero level and
            one more below it than above).
        signed: whether negative values have levels; unsigned ranges are always mid-tread.

    Returns:
        The `CodeRange`.

    Raises:
        ValueError: for a width, count or grid outside the values above.

    Source: Jacob et al. 2018 (symmetric signed mid-tread); mid-rise after Widrow and Kollar 2008; full range as the
        weights of Esser et al. 2020.

    >>> code_range(4), code_range(2, grid="mid_rise"), code_range(4, signed=False)
    (CodeRange(lo=-7, hi=7, offset=0.0), CodeRange(lo=-2, hi=1, offset=0.5), CodeRange(lo=0, hi=15, offset=0.0))
    """
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {GRIDS}, got {grid!r}: choose 'mid_tread' for levels that include zero")
    require_bits("bits", bits)
    if not signed:
        return CodeRange(0, 2**bits - 1, 0.0)
    count = (2**bits - 1 if grid == "mid_tread" else 2**bits) if levels is None else levels
    _check_levels(count, grid)
    half = count // 2
    if grid == "mid_tread":
        return CodeRange(-half, half, 0.0)
    return CodeRange(-half, half - 1, 0.5 if grid == "mid_rise" else 0.0)


def _check_levels(levels: int, grid: str) -> None:
    require_integer("levels", levels, 3, 2**MAX_BITS)
    odd = levels % 2 == 1
    if odd != (grid == "mid_tread"):
        parity = f"even for grid={grid!r}" if odd else "odd for grid='mid_tread' (zero and pairs around it)"
        raise ValueError(f"levels must be {parity}, got {levels}: use levels={levels - 1} or change grid")


def level_values(codes: CodeRange, scale: Tensor) -> Tensor:
    """Real values of all levels, ``scale * (i + offset)`` for ``i = lo..hi``.

    Args:
        codes: the code range.
        scale: positive step, shape ``(1,)`` or ``(C,)``.

    Returns:
        Ascending levels, shape ``(L,)`` for one scale and ``(C, L)`` for C of them.

    >>> level_values(code_range(2), torch.tensor([0.5]))
    tensor([-0.5000,  0.0000,  0.5000])
    """
    steps = torch.arange(codes.lo, codes.hi + 1, dtype=scale.dtype, device=scale.device) + codes.offset
    values = scale.reshape(-1, 1) * steps
    return values[0] if scale.numel() == 1 else values
