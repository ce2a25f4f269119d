"""Integer arithmetic between layers: multipliers with rounding shifts in place of real factors.

A real tensor is kept as 32-bit integers ``w`` that stand for ``w * 2^-f``; f is chosen from a bound on the values, so
that nothing can ever overflow. A factor becomes an integer m below 2^31 and a shift n::

    y = (x * m + b + 2^(n-1)) >> n        m / 2^n = factor,  b / 2^n = what is added,  rounded half up

Source: Jacob et al., Quantization and Training for Integer-Arithmetic-Only Inference, CVPR 2018, section 2.2; the bias
is added at the precision of the product instead of at that of the accumulator, which leaves one rounding in place of
two.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WIDE_BITS", "Multiplier", "multiplier", "requantize", "rounding_shift", "wide_exponent", "wrap"]

WIDE_BITS = 31  # magnitude of a wide integer
_PRODUCT_BITS = 62
_MULTIPLIER_BITS = 30


class Multiplier(NamedTuple):
    """A factor and something to add, per channel, as integers.

    Args:
        m: factors, int64, shape ``(C,)`` or ``(1,)``, below 2^31 in magnitude.
        b: what is added before the shift, int64, same shape; half a unit of the result is not in it.
        n: right shifts, int64, same shape, 1 to 62.
    """

    m: Tensor
    b: Tensor
    n: Tensor

    @property
    def half(self) -> Tensor:
        """Half a unit of the result, ``2^(n-1)``, which makes the shift round."""
        return torch.bitwise_left_shift(torch.ones_like(self.n), self.n - 1)


def wide_exponent(bound: float) -> int:
    """Exponent f of the finest steps ``2^-f`` in which values up to a bound are 32-bit integers.

    Args:
        bound: largest magnitude.

    Returns:
        f, from -20 to 40.

    >>> wide_exponent(1.0), wide_exponent(100.0)
    (29, 23)
    """
    if not bound > 0:
        return 0
    return max(-20, min(40, WIDE_BITS - 1 - math.ceil(math.log2(bound) + 1e-9)))


def multiplier(factor: Tensor, added: Tensor, largest: Tensor, *, shift_only: bool = False) -> Multiplier:
    """Integers for ``x * factor + added``.

    Args:
        factor: float64, shape ``(C,)`` or ``(1,)``.
        added: float64, same shape, in units of the result.
        largest: bound on ``|x|``, same shape.
        shift_only: round the factors to powers of two, so that a shift does without a product.

    Returns:
        The integers: m has 31 bits and n is largest such that no product overflows 63 bits.

    >>> found = multiplier(torch.tensor([0.3]).double(), torch.zeros(1).double(), torch.tensor([100.0]).double())
    >>> requantize(torch.tensor([10, 20, 25]), found).tolist()  # 7.5 rounds up
    [3, 6, 8]
    """
    size, exponent = torch.frexp(factor.double())  # factor = size * 2^exponent, 0.5 <= |size| < 1
    if shift_only:
        exponent = exponent + torch.where(size.abs() > 0.75, 1, 0)
        size = torch.where(factor != 0, torch.sign(factor) * 0.5, torch.zeros_like(size))
    reach = torch.maximum(added.abs(), (largest.double() * factor.abs())).clamp_min(1e-300)
    room = _PRODUCT_BITS - 1 - torch.ceil(torch.log2(reach)).to(torch.int64)
    n = torch.minimum(_MULTIPLIER_BITS - exponent.to(torch.int64), room).clamp(1, _PRODUCT_BITS)
    m = torch.round(torch.ldexp(size, exponent.to(torch.int64) + n)).to(torch.int64)
    b = torch.round(torch.ldexp(added.double(), n)).to(torch.int64)
    return Multiplier(m, b, n)


def requantize(x: Tensor, by: Multiplier, axis: int = 1) -> Tensor:
    """``(x * m + b + 2^(n-1)) >> n``, exact in 64 bits.

    Args:
        x: integers.
        by: the integers of `multiplier`.
        axis: of ``x``, along which they differ.

    Returns:
        int64, shape of ``x``.
    """
    shape = [1] * x.dim()
    if by.m.numel() > 1:
        shape[axis] = -1
    m, b, n = (part.reshape(shape) for part in (by.m, by.b + by.half, by.n))
    return torch.bitwise_right_shift(x.long() * m + b, n)


def rounding_shift(x: Tensor, shift: int) -> Tensor:
    """``x * 2^-shift``, rounded half up.

    Args:
        x: integers.
        shift: to the right; to the left where negative.

    Returns:
        int64, shape of ``x``.

    >>> rounding_shift(torch.tensor([5, 6, -6]), 2).tolist(), rounding_shift(torch.tensor([5]), -1).tolist()
    ([1, 2, -1], [10])
    """
    if shift <= 0:
        return x.long() << -shift
    return (x.long() + (1 << (shift - 1))) >> shift


def wrap(x: Tensor, bits: int) -> Tensor:
    """What is left of integers in a register that is too narrow: two's complement modulo 2^bits.

    Args:
        x: integers.
        bits: of the register.

    Returns:
        Integers from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.

    >>> wrap(torch.tensor([127, 128, -129]), 8).tolist()
    [127, -128, 127]
    """
    half = 1 << (bits - 1)
    return ((x + half) & ((1 << bits) - 1)) - half
