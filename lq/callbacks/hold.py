"""Criteria that end the rise of the slope early."""

from dataclasses import dataclass

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
        if self.step < 0:
            raise ValueError(f"step must not be negative, got {self.step}: count optimizer steps from 0")


@dataclass(frozen=True)
class HoldAtAlignment:
    """Hold the slope once the mean alignment of the weights reaches a threshold.

    Args:
        threshold: alignment from -1 to 1; checked whenever metrics are logged.
    """

    threshold: float

    def __post_init__(self) -> None:
        """Validate."""
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be an alignment from -1 to 1, got {self.threshold}: try 0.9")


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
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}: use 'max' for accuracy, 'min' for loss")
        if self.patience < 0:
            raise ValueError(f"patience must not be negative, got {self.patience}: count validations from 0")


Hold = HoldAtStep | HoldAtAlignment | HoldOnPlateau
