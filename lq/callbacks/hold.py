"""Criteria that end the rise of the slope early."""

from dataclasses import dataclass

from lq.checks import require_integer, require_number, require_one_of

__all__ = ["Hold", "HoldAtAlignment", "HoldAtStep", "HoldOnPlateau"]


@dataclass(frozen=True)
class HoldAtStep:
    """Hold the slope from an optimizer step on.

    Args:
        step: optimizer steps from the start, at least 0.
    """

    step: int

    def __post_init__(self) -> None:
        """Validate."""
        require_integer("step", self.step, 0, fix="count optimizer steps from 0")


@dataclass(frozen=True)
class HoldAtAlignment:
    """Hold the slope once the mean alignment of the weights reaches a threshold.

    Args:
        threshold: alignment from -1 to 1; checked whenever metrics are logged.
    """

    threshold: float

    def __post_init__(self) -> None:
        """Validate."""
        inside = "be an alignment from -1 to 1"
        require_number("threshold", self.threshold, lambda v: -1 <= v <= 1, inside, "try 0.9")


@dataclass(frozen=True)
class HoldOnPlateau:
    """Hold the slope once a monitored metric stops getting better.

    Args:
        monitor: name of a logged metric; checked after every validation.
        patience: validations without improvement that are tolerated, at least 0.
        min_delta: smallest change that counts as improvement.
        mode: "max" or "min".
    """

    monitor: str
    patience: int = 2
    min_delta: float = 0.0
    mode: str = "max"

    def __post_init__(self) -> None:
        """Validate."""
        require_one_of("mode", self.mode, ("min", "max"), "use 'max' for accuracy, 'min' for loss")
        require_integer("patience", self.patience, 0, fix="count validations from 0")


Hold = HoldAtStep | HoldAtAlignment | HoldOnPlateau
