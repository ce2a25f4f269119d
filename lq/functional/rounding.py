"""Learned rounding: each weight moves between the two levels beside it."""

import torch
from torch import Tensor

__all__ = ["rounding_penalty", "rounding_start", "soft_rounding"]

_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid reaches 0 and 1 at finite arguments


def soft_rounding(v: Tensor) -> Tensor:
    """Position between two levels, ``h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)``.

    Args:
        v: learned, any shape.

    Returns:
        From 0 (the level below) to 1 (the level above).

    Source: Nagel et al., AdaRound, ICML 2020, equation 23.

    >>> soft_rounding(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def rounding_start(position: Tensor) -> Tensor:
    """The v for which `soft_rounding` is where the weight is.

    Args:
        position: of each weight between its levels; beyond 0 and 1 is taken as 0 and 1.

    Returns:
        v, shape of ``position``.

    >>> soft_rounding(rounding_start(torch.tensor([0.0, 0.25, 1.0])))
    tensor([0.0000, 0.2500, 1.0000])
    """
    return torch.logit((position.clamp(0, 1) - _LOW) / (_HIGH - _LOW))


def rounding_penalty(h: Tensor, sharpness: float) -> Tensor:
    """``sum 1 - |2 h - 1|^beta``: 0 where every weight has decided, largest midway.

    Args:
        h: from `soft_rounding`.
        sharpness: beta, falling from 20 to 2 as rounding must be decided.

    Returns:
        Scalar.

    Source: Nagel et al., AdaRound, ICML 2020, equation 24.

    >>> rounding_penalty(torch.tensor([0.0, 0.5, 1.0]), 2.0)
    tensor(1.)
    """
    return (1 - (2 * h - 1).abs().pow(sharpness)).sum()
