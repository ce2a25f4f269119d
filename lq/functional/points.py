"""Quantization onto freely spaced points: nearest point, codes and values.

Codes of sign-magnitude points hold the sign in their top bit, with sign(0) = +1; those of signed points count them
upwards. A tie goes to the point of larger magnitude (signed: the larger point).
"""

import torch
from torch import Tensor

from lq.functional.lookup import count_reached, take

__all__ = ["code_table", "decode_points", "encode_points", "midpoints", "nearest_point", "signed_levels"]


def nearest_point(u: Tensor, points: Tensor) -> Tensor:
    """Index of the point nearest to each value; ties go up.

    Args:
        u: shape ``(C, N)``; any for points of shape ``(K,)``.
        points: ascending, shape ``(K,)`` or ``(C, K)``.

    Returns:
        Indices, int64, shape of ``u``.

    >>> nearest_point(torch.tensor([[-3.0, 0.5, 9.0]]), torch.tensor([0.0, 1.0, 4.0]))
    tensor([[0, 1, 2]])
    """
    return count_reached(u, midpoints(points))


def midpoints(points: Tensor) -> Tensor:
    """Values halfway between neighbours, from which on the upper one is nearer.

    Args:
        points: ascending, shape ``(..., K)``.

    Returns:
        Shape ``(..., K - 1)``.

    >>> midpoints(torch.tensor([0.0, 1.0, 4.0]))
    tensor([0.5000, 2.5000])
    """
    return (points[..., 1:] + points[..., :-1]) / 2


def encode_points(x: Tensor, points: Tensor, scale: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Codes of the points nearest to ``x / scale``.

    Args:
        x: shape ``(C, N)``; any of two axes or more for one scale.
        points: ascending, in units of the scale, shape ``(K,)`` or ``(C, K)``; magnitudes unless ``signed``.
        scale: positive, or 0 for a row of zeros; shape ``(C,)`` or ``(1,)``.
        bits: width b of a code.
        signed: whether the points carry their sign.

    Returns:
        Codes, uint8, shape of ``x``: index of the point; for magnitudes plus 2^(b-1) where the value is negative.

    >>> encode_points(torch.tensor([[-0.9, 0.2]]), torch.tensor([0.5, 1.0]), torch.ones(1), bits=2, signed=False)
    tensor([[3, 0]], dtype=torch.uint8)
    """
    u = x / torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, 1)
    if signed:
        return nearest_point(u, points).to(torch.uint8)
    index = nearest_point(u.abs(), points)
    zero = points[..., :1] == 0
    negative = (u < 0) & ~(zero & (index == 0))  # zero has one code
    return (index + negative.long() * 2 ** (bits - 1)).to(torch.uint8)


def decode_points(codes: Tensor, points: Tensor, scale: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Values of codes, ``scale * point``.

    Args:
        codes: from `encode_points`, shape ``(C, N)``.
        points: as there.
        scale: as there.
        bits: as there.
        signed: as there.

    Returns:
        Values in the dtype of ``scale``.

    >>> decode_points(torch.tensor([[3, 0]]), torch.tensor([0.5, 1.0]), torch.ones(1), bits=2, signed=False)
    tensor([[-1.0000,  0.5000]])
    """
    codes, table = codes.long(), code_table(points.to(scale.dtype), bits=bits, signed=signed)
    return take(table, codes) * scale.reshape(-1, 1)


def code_table(points: Tensor, *, bits: int, signed: bool) -> Tensor:
    """Level of each code, in units of the scale.

    Args:
        points: ascending, shape ``(K,)`` or ``(C, K)``; magnitudes unless ``signed``.
        bits: width b of a code.
        signed: whether the points carry their sign.

    Returns:
        Shape ``(K,)``, or ``(2^b,)`` for magnitudes, unused ones 0; a row for each row of points.

    >>> code_table(torch.tensor([0.5, 1.0, 2.0]), bits=3, signed=False)
    tensor([ 0.5000,  1.0000,  2.0000,  0.0000, -0.5000, -1.0000, -2.0000, -0.0000])
    """
    if signed:
        return points
    table = torch.nn.functional.pad(points, (0, 2 ** (bits - 1) - points.shape[-1]))
    return torch.cat([table, -table], dim=-1)


def signed_levels(points: Tensor, *, signed: bool) -> Tensor:
    """All levels of a point set, ascending, in units of the scale.

    Args:
        points: ascending, shape ``(..., K)``; magnitudes unless ``signed``.
        signed: whether the points carry their sign.

    Returns:
        Shape ``(..., L)``: the points, or their mirror images and them; a zero appears twice.

    >>> signed_levels(torch.tensor([0.5, 1.0]), signed=False)
    tensor([-1.0000, -0.5000,  0.5000,  1.0000])
    """
    return points if signed else torch.cat([-points.flip(-1), points], dim=-1)
