"""Levels that are powers of a base, and rounding in the logarithmic domain."""

import torch
from torch import Tensor

__all__ = ["log_points", "log_round", "power_of_two_scale"]


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
    return torch.copysign(points[torch.bucketize(u.abs(), between, right=True)], u)


def power_of_two_scale(rows: Tensor) -> Tensor:
    """The power of two nearest, in its logarithm, to the largest magnitude.

    Args:
        rows: shape ``(C, N)``, one row per scale.

    Returns:
        Scales, shape ``(C,)``; 2^-39 for rows of zeros, for which no level is exact.

    >>> power_of_two_scale(torch.tensor([[0.3, -0.2], [0.0, 0.0]]))
    tensor([2.5000e-01, 1.8190e-12])
    """
    return torch.exp2(rows.abs().amax(1).clamp_min(2.0**-39).log2().round())
