"""Levels that are powers of a base, and rounding in the logarithmic domain."""

import torch
from torch import Tensor

from lq.functional.lookup import count_reached, take

__all__ = ["log_points", "log_round", "power_of_two_scale"]

_OCTAVES = 7
_SMALLEST = 2.0**-39


def log_points(count: int, span: float) -> Tensor:
    """Magnitudes ``2^e`` with exponents evenly spaced from ``-span`` to 0.

    Args:
        count: K, how many.
        span: octaves from the smallest to the largest; ``count - 1`` gives powers of two.

    Returns:
        Ascending points, float32, shape ``(K,)``, the largest 1.

    Source: Miyashita et al., Convolutional Neural Networks using Logarithmic Data Representation, 2016 (whole
        exponents); Cai et al., Deep Neural Network Compression by Logarithmic Quantization, 2018 (fractional ones).

    >>> log_points(4, 3)
    tensor([0.1250, 0.2500, 0.5000, 1.0000])
    """
    return torch.exp2(torch.linspace(-span, 0, count, dtype=torch.float64)).float()


def log_round(u: Tensor, points: Tensor) -> Tensor:
    """The point with the nearest logarithm: thresholds lie at geometric means.

    Args:
        u: any shape; signs are kept, a zero becomes the smallest point.
        points: ascending magnitudes, shape ``(K,)``.

    Returns:
        Signed points, shape of ``u``.

    >>> log_round(torch.tensor([-0.72, 0.7, 0.1]), torch.tensor([0.5, 1.0]))
    tensor([-1.0000,  0.5000,  0.5000])
    """
    points = points.to(u.dtype)
    between = points[:-1] * (points[1:] / points[:-1]).sqrt()
    return torch.copysign(take(points, count_reached(u.abs(), between)), u)


def power_of_two_scale(
    rows: Tensor, points: Tensor | None = None, importance: Tensor | None = None, power: int = 2
) -> Tensor:
    """The power of two that loses least, at most 7 octaves below the one nearest to the largest magnitude::

        argmin over s of sum h |w - log_round(w/s) s|^p

    Few points spread over few octaves: at the largest magnitude they would lie above most of the values.

    Args:
        rows: shape ``(C, N)``, one row per scale.
        points: ascending magnitudes, shape ``(K,)``; without them the power of two nearest, in its logarithm, to
            the largest magnitude.
        importance: h, broadcastable to the rows; None for 1.
        power: p.

    Returns:
        Scales, shape ``(C,)``; 2^-39 for rows of zeros, for which no level is exact.

    >>> rows = torch.tensor([[0.9, -0.2, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    >>> power_of_two_scale(rows)
    tensor([1.0000e+00, 1.8190e-12])
    >>> power_of_two_scale(rows[:1], torch.tensor([0.5, 1.0]))
    tensor([0.5000])
    """
    largest = torch.exp2(rows.abs().amax(1).clamp_min(_SMALLEST).log2().round())
    if points is None:
        return largest
    best, least = largest, torch.full_like(largest, torch.inf)
    for octave in range(_OCTAVES + 1):
        scale = (largest / 2**octave).clamp_min(_SMALLEST)
        error = (rows - log_round(rows / scale[:, None], points) * scale[:, None]).abs().pow(power)
        loss = (error if importance is None else error * importance).sum(1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best
