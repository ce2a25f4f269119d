"""Schedules: functions that return a function of the step."""

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "ramp"]

SCHEDULES = ("constant", "linear", "cosine")


def ramp(start: float, end: float, steps: int, kind: str = "linear") -> Callable[[float], float]:
    """Ramp from ``start`` to ``end`` over ``steps`` optimizer steps, then held::

        constant  end
        linear    start + (end - start) t              t = min(step / steps, 1)
        cosine    start + (end - start) (1 - cos(pi t)) / 2

    Args:
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: length in optimizer steps, at least 1.
        kind: ``"constant"``, ``"linear"`` or ``"cosine"``.

    Returns:
        Function from a step (0, 1, ...) to the value.

    Raises:
        ValueError: for ``steps`` below 1, an unknown kind or, in the returned function, a negative step.

    >>> slope = ramp(1.0, 9.0, 4)
    >>> [slope(step) for step in (0, 1, 3, 4, 5)]
    [1.0, 3.0, 7.0, 9.0, 9.0]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}: give the length of the ramp in optimizer steps")
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {kind!r}: choose one of those")

    def value(step: float) -> float:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}: count optimizer steps from 0")
        t = 1.0 if kind == "constant" else min(step / steps, 1.0)
        if kind == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return start + (end - start) * t

    return value
