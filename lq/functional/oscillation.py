"""Weights that jump back and forth between two levels: how often they do, and where they are on average."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Oscillation", "start_oscillation", "track_oscillation"]


class Oscillation(NamedTuple):
    """What is known about the oscillation of each weight, all of one shape.

    Args:
        position: rank of the weight's level among all of them.
        direction: sign of its last change, 0 before the first.
        frequency: moving average of whether it turned back, from 0 to 1.
        average: moving average of its position.
        frozen: whether it stays where it is.
    """

    position: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor


def start_oscillation(position: Tensor) -> Oscillation:
    """Nothing has moved yet.

    Args:
        position: rank of each weight's level, whole numbers in floating point, any shape.

    Returns:
        The state.
    """
    zeros = torch.zeros_like(position)
    return Oscillation(position, zeros.to(torch.int8), zeros, position.clone(), zeros.bool())


def track_oscillation(state: Oscillation, position: Tensor, momentum: float) -> Oscillation:
    """Take note of one optimizer step::

        o = 1 where the level changed against the direction of the change before it, else 0
        frequency <- (1 - m) frequency + m o            average <- (1 - m) average + m position

    Args:
        state: before the step.
        position: rank of each weight's level after it.
        momentum: m, from 0 to 1.

    Returns:
        The state after the step.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, equations 4 and 5.

    >>> state = start_oscillation(torch.tensor([1.0, 1.0]))
    >>> for position in ([2.0, 2.0], [1.0, 3.0], [2.0, 3.0]):
    ...     state = track_oscillation(state, torch.tensor(position), 0.5)
    >>> state.frequency.tolist()  # turned back twice; never
    [0.75, 0.0]
    """
    change = (position - state.position).sign().to(torch.int8)
    turned = (change != 0) & (change == -state.direction)
    return Oscillation(
        position,
        torch.where(change != 0, change, state.direction),
        torch.lerp(state.frequency, turned.to(state.frequency), momentum),
        torch.lerp(state.average, position, momentum),
        state.frozen,
    )
