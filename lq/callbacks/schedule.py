"""When the slope rises and stops, and how strong the regularizer is: settings and the state that survives a resume."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lq.callbacks.hold import Hold, HoldAtAlignment, HoldAtStep, HoldOnPlateau
from lq.callbacks.steps import KNOWN_LENGTH
from lq.checks import require_bool, require_integer, require_number, require_one_of
from lq.functional.regularizer import REGULARIZERS
from lq.functional.schedule import SCHEDULES, ramp

__all__ = ["AnnealSpec", "Annealing"]

LATE = 0.9  # of the fit: earlier the regularizer freezes weights that still have to move


@dataclass(frozen=True, kw_only=True)
class AnnealSpec:
    """How training anneals the staircase and pulls weights onto their levels.

    Args:
        slope_start: slope at the first optimizer step.
        slope_end: slope after ``anneal_steps``. Weights feel it with ``forward="soft"``, and in their gradient up to
            ``slope_backward_max``.
        anneal_steps: length of the rise, in optimizer steps, or as a fraction of the fit (0.8 is 80 %; under manual
            optimization of its batches, so give steps where you accumulate).
        hold: criterion that ends the rise early: HoldAtStep, HoldAtAlignment or HoldOnPlateau; null for none.
        regularizer: "nearest", "l1" or "sine"; null for none.
        regularizer_on: distance of the "latent" weight, or of what the soft staircase makes of it, "quantized", where a
            quantizer has one.
        regularizer_scale_gradient: whether scales learn from the regularizer, by a gradient summed over all weights of
            a layer: at a strength of 1 it leads them astray.
        strength: factor on the regularizer at the end of its ramp.
        strength_schedule: ramp over ``anneal_steps``, "linear" or "cosine" from 0, or "constant".
        strength_start: optimizer steps, or fraction of the fit, before which there is no regularizer; its ramp begins
            there and ends with ``anneal_steps``, or is a jump where those are over. None for the last tenth of the fit,
            or after ``anneal_steps`` of one without an end.
        scale_lr_factor: learning rate of scales relative to that of their parameter group.
        weight_decay_by_bits: whether weights of 3 bits get half, of 2 bits a quarter of their group's weight decay.
        calibration_batches: training batches that set the activation scales before the first step, and start_rounding.
        start_rounding: "error_feedback" puts the weights of a float network onto their levels before the first step, so
            that those not yet rounded make up for the error of those that are: a lower loss at first, though no more
            accuracy in the end where it was measured. None leaves the weights as they are.
        reestimate_bn: training batches that re-estimate batch-norm statistics before each validation, and at the end of
            an epoch whose last batches none follows, 0 for none; networks without batch norms pay nothing. Averaged
            weights have them only from a validation.

    Raises:
        ValueError: naming the field, the value got, the values allowed and the fix.
    """

    slope_start: float = 1.0
    slope_end: float = 16.0
    anneal_steps: int | float = 0.8
    hold: Hold | None = None
    regularizer: str | None = "nearest"
    regularizer_on: str = "latent"
    regularizer_scale_gradient: bool = False
    strength: float = 1.0
    strength_schedule: str = "linear"
    strength_start: int | float | None = None
    scale_lr_factor: float = 1.0
    weight_decay_by_bits: bool = False
    calibration_batches: int = 8
    start_rounding: str | None = None
    reestimate_bn: int = 20

    def __post_init__(self) -> None:
        """Validate every field."""
        require_number("slope_end", self.slope_end, lambda v: v >= 0, "be a number of at least 0", "16 is usual")
        rises = f"lie from 0 to slope_end, {self.slope_end}"
        require_number("slope_start", self.slope_start, lambda v: 0 <= v <= self.slope_end, rises, "1 is usual")
        fraction = isinstance(self.anneal_steps, float)
        require_number(
            "anneal_steps",
            self.anneal_steps,
            lambda v: 0 < v <= 1 if fraction else v >= 1,
            "be an integer of at least 1 or a fraction in (0, 1]",
            "use 0.8 for 80 % of the fit",
        )
        start = 0 if self.strength_start is None else self.strength_start
        require_number(
            "strength_start",
            start,
            lambda v: 0 <= v < (1 if isinstance(start, float) else math.inf),
            "be an integer of at least 0, a fraction in [0, 1) or None",
            "use 0.9 for the last tenth of the fit",
        )
        if self.hold is not None and not isinstance(self.hold, Hold):
            raise ValueError(
                f"hold must be HoldAtStep, HoldAtAlignment, HoldOnPlateau or None, got {self.hold!r}: write "
                "lq.HoldAtStep(1000)"
            )
        for name, allowed in (
            ("regularizer", (*REGULARIZERS, None)),
            ("regularizer_on", ("latent", "quantized")),
            ("strength_schedule", SCHEDULES),
            ("start_rounding", ("error_feedback", None)),
        ):
            require_one_of(name, getattr(self, name), allowed)
        for name in ("strength", "scale_lr_factor"):
            value, off = getattr(self, name), "use 0 to switch it off"
            require_number(name, value, lambda v: 0 <= v < math.inf, "not be negative", off)
        require_integer("reestimate_bn", self.reestimate_bn, 0, fix="use 0 to switch it off")
        require_integer("calibration_batches", self.calibration_batches, 1, fix="try 8")
        for name in ("regularizer_scale_gradient", "weight_decay_by_bits"):
            require_bool(name, getattr(self, name))


class Annealing:
    """Slope and strength at the present step, and whether the slope is held.

    Args:
        spec: the settings.

    >>> annealing = Annealing(AnnealSpec(slope_end=9.0, anneal_steps=4, hold=HoldAtStep(3)))
    >>> annealing.resolve(total_steps=10)
    >>> slopes = []
    >>> for _ in range(5):
    ...     slopes.append(annealing.slope)
    ...     annealing.advance()
    >>> slopes
    [1.0, 3.0, 5.0, 7.0, 7.0]
    """

    def __init__(self, spec: AnnealSpec) -> None:
        """Start at step 0, not held."""
        self.spec = spec
        self.step = 0
        self.held_at: int | None = None
        self.steps: int | None = None
        self.start: int | None = None
        self.best: float | None = None
        self.waited = 0

    def resolve(self, total_steps: float) -> None:
        """Turn fractions of the fit into optimizer steps, once.

        Args:
            total_steps: optimizer steps of the whole fit, infinite where unknown.

        Raises:
            ValueError: for a fraction of an endless fit.
        """
        if self.steps is None:
            self.steps = max(1, self._resolved("anneal_steps", total_steps))
        if self.start is None:
            self.start = self._resolved("strength_start", total_steps)

    def _resolved(self, name: str, total_steps: float) -> int:
        value = getattr(self.spec, name)
        if value is None:
            return self.steps or 1 if math.isinf(total_steps) else int(LATE * total_steps)
        if not isinstance(value, float):
            return int(value)
        if math.isinf(total_steps):
            raise ValueError(
                f"{name} must be an integer for a fit of unknown length, got the fraction {value}: {KNOWN_LENGTH}, or "
                f"give {name} in optimizer steps"
            )
        return round(value * total_steps)

    @property
    def slope(self) -> float:
        """Slope at the present step."""
        at = self.step if self.held_at is None else min(self.step, self.held_at)
        return ramp(self.spec.slope_start, self.spec.slope_end, self.steps or 1)(at)

    @property
    def unreached(self) -> dict[str, int]:
        """Settings that are fractions of the fit and whose optimizer step has not come, and that step."""
        found, spec = {}, self.spec
        if isinstance(spec.anneal_steps, float) and self.held_at is None and self.step < (self.steps or 1):
            found["anneal_steps"] = self.steps or 1
        late = spec.strength_start is None or isinstance(spec.strength_start, float)
        if late and spec.regularizer and spec.strength and self.step <= (self.start or 0):
            found["strength_start"] = self.start or 0
        return found

    @property
    def strength(self) -> float:
        """Strength of the regularizer at the present step; 0 without one."""
        start = self.start or 0
        if self.spec.regularizer is None or self.step < start:
            return 0.0
        steps = (self.steps or 1) - start
        if steps <= 0:
            return self.spec.strength
        return ramp(0.0, self.spec.strength, steps, self.spec.strength_schedule)(self.step - start)

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        if isinstance(self.spec.hold, HoldAtStep) and self.step >= self.spec.hold.step:
            self._hold(self.spec.hold.step)

    def see_alignment(self, alignment: float) -> None:
        """Check the alignment criterion.

        Args:
            alignment: mean alignment of the weights now.
        """
        if isinstance(self.spec.hold, HoldAtAlignment) and alignment >= self.spec.hold.threshold:
            self._hold(self.step)

    def see_metrics(self, metrics: dict[str, Any], agree: Callable[..., bool] = lambda held, **_: held) -> None:
        """Check the plateau criterion.

        Args:
            metrics: what the trainer has logged.
            agree: makes one decision of those of all processes, whose metrics may differ.

        Raises:
            ValueError: where the monitored metric is missing.
        """
        hold = self.spec.hold
        if not isinstance(hold, HoldOnPlateau):
            return
        if hold.monitor not in metrics:
            raise ValueError(
                f"hold.monitor must be a logged metric, got {hold.monitor!r}; logged are {sorted(metrics)}: "
                "log it in validation_step or monitor one of those"
            )
        value = float(metrics[hold.monitor]) * (1 if hold.mode == "max" else -1)
        if self.best is None or value > self.best + hold.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if agree(self.waited > hold.patience, all=False):
            self._hold(self.step)

    def forget_best(self) -> None:
        """Begin the plateau criterion anew: the network has become another one."""
        self.best, self.waited = None, 0

    def _hold(self, step: int) -> None:
        if self.held_at is None:
            self.held_at = step

    def state_dict(self) -> dict[str, Any]:
        """State as plain Python values.

        Returns:
            Everything that a resume needs.
        """
        return {k: getattr(self, k) for k in ("step", "held_at", "steps", "start", "best", "waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore.

        Args:
            state: from `state_dict`.
        """
        for name, value in {"start": 0, **state}.items():  # once there was no other start
            setattr(self, name, value)


def choose(name: str, given: Any, kind: type, settings: dict[str, Any]) -> Any:
    """Settings given whole, or made from their fields.

    Args:
        name: of the argument.
        given: an instance, or None.
        kind: its class.
        settings: fields, where they were given apart.

    Returns:
        An instance of ``kind``.

    Raises:
        TypeError: for something else, or for both.
    """
    if given is None:
        return kind(**settings)
    if not isinstance(given, kind):
        raise TypeError(
            f"{name} must be a {kind.__name__}, got {given!r}: write {kind.__name__}(...) or give its fields"
        )
    if settings:
        raise TypeError(f"{name} must be given whole or as fields, got both: move {sorted(settings)} into {name}")
    return given


def describe(spec: AnnealSpec) -> dict[str, Any]:
    """Settings as plain values, the hold criterion with its name.

    Args:
        spec: the settings.

    Returns:
        Field names and values.
    """
    values = asdict(spec)
    if spec.hold is not None:
        values["hold"] = {"criterion": type(spec.hold).__name__, **asdict(spec.hold)}
    return values
