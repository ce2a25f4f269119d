"""Multiplication-free layers: a decoder, shifters and an accumulator.

A code selects its point from a table; the point is a sum of few powers of two, ``sign * (2^a + 2^b)``. For each product
a first and a second shifter move the input by a and by b places, and an accumulator adds or subtracts::

    acc = sum over inputs of  sign * ((x << a) + (x << b))

All points of a layer are brought to integers by one power of two, which belongs to the scale.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lq.functional.candidates import powers_of_two

__all__ = [
    "Decoder",
    "digits_of",
    "has_integer_points",
    "integer_conv",
    "integer_points",
    "make_decoder",
    "shift_add_conv",
]


class Decoder(NamedTuple):
    """The table of one layer: what the multiplexer selects by code.

    Args:
        value: integer of each code, int32, shape ``(L,)``.
        sign: -1, 0 or 1, shape ``(L,)``.
        shifts: places by which each shifter moves, shape ``(L, words)``; -1 where it is idle.
    """

    value: Tensor
    sign: Tensor
    shifts: Tensor

    @property
    def words(self) -> int:
        """Number of shifters."""
        return self.shifts.shape[1]


def integer_points(points: Tensor) -> tuple[Tensor, int]:
    """Points as integers over a common power of two.

    Args:
        points: sums of powers of two.

    Returns:
        Integers, int32, and k: ``points = integers * 2^-k``.

    Raises:
        ValueError: for points that no integers below 2^24 stand for.

    >>> integer_points(torch.tensor([0.0, 0.25, 1.5]))
    (tensor([0, 1, 6], dtype=torch.int32), 2)
    """
    exponents = [e for p in points.abs().flatten().tolist() if p for e in powers_of_two(p)]
    k = -min(exponents, default=0)
    scaled = points.double() * 2.0**k
    if not bool((scaled.abs() < 2**24).all()):
        raise ValueError(
            f"points must be sums of few powers of two within 24 bits of each other, got {points.tolist()}: choose "
            "candidates that are, 0.125 in place of 0.1"
        )
    return scaled.to(torch.int32), k


def has_integer_points(points: Tensor) -> bool:
    """Whether points have `integer_points`.

    Args:
        points: any.

    Returns:
        Whether they are.

    >>> has_integer_points(torch.tensor([0.125, 1.5])), has_integer_points(torch.tensor([0.1, 1.5]))
    (True, False)
    """
    try:
        integer_points(points)
    except ValueError:
        return False
    return True


def make_decoder(values: Tensor) -> Decoder:
    """Table of a layer whose codes stand for these integers.

    Args:
        values: integer of each code, shape ``(L,)``.

    Returns:
        The table.

    >>> make_decoder(torch.tensor([0, 3, -4])).shifts
    tensor([[-1, -1],
            [ 1,  0],
            [ 2, -1]])
    """
    powers = [sorted(powers_of_two(abs(v)), reverse=True) if v else [] for v in values.tolist()]
    words = max((len(p) for p in powers), default=1) or 1
    shifts = torch.tensor([p + [-1] * (words - len(p)) for p in powers]).reshape(-1, words)
    return Decoder(values.to(torch.int32), values.sign().to(torch.int32), shifts)


def digits_of(codes: Tensor, decoder: Decoder) -> dict[int, Tensor]:
    """Which products use which shift: for every number of places the sign of each weight there, else 0.

    Args:
        codes: of the weights, any shape.
        decoder: table of the layer.

    Returns:
        Places to int32 tensors of -1, 0 and 1, shape of ``codes``.
    """
    index, found = codes.long(), {}
    for places in sorted({int(e) for e in decoder.shifts.unique() if e >= 0}):
        uses = (decoder.shifts == places).sum(1).to(torch.int32) * decoder.sign
        digits = uses[index]
        if bool((digits != 0).any()):
            found[places] = digits
    return found


def integer_conv(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution of integers in integers.

    Args:
        x: int32, padded, ``(N, C, H, W)``.
        weight: int32, ``(O, C/g, kh, kw)``.
        stride: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        int32 ``(N, O, H', W')``.
    """
    if dilation != (1, 1):  # torch has no dilated convolution of integers: zeros between the taps make it a plain one
        rows, columns = ((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))
        spread = weight.new_zeros(*weight.shape[:2], rows, columns)
        spread[:, :, :: dilation[0], :: dilation[1]] = weight
        weight = spread
    return F.conv2d(x, weight, None, stride, 0, 1, groups)


def shift_add_conv(
    x: Tensor,
    codes: Tensor,
    decoder: Decoder,
    *,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Accumulators of a convolution without products: inputs are shifted, then added or subtracted.

    Args:
        x: integer inputs, padded, ``(N, C, H, W)``.
        codes: of the weights, ``(O, C/g, kh, kw)``.
        decoder: table of the layer.
        stride: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.

    Returns:
        int32 ``(N, O, H', W')``.

    >>> decoder = make_decoder(torch.tensor([3, -4]))
    >>> shift_add_conv(torch.tensor([[[[5]], [[7]]]]), torch.tensor([[[[0]], [[1]]]]), decoder).item()  # 3*5 - 4*7
    -13
    """
    digits = digits_of(codes, decoder)
    x = x.to(torch.int32)
    if not digits:
        return integer_conv(x, torch.zeros(codes.shape, dtype=torch.int32), stride, dilation, groups)
    total: Tensor | None = None
    for places, signs in digits.items():  # the convolution adds and subtracts: its weights are -1, 0 and 1
        part = integer_conv(x << places, signs, stride, dilation, groups)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
