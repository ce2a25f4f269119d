"""Widths that fall in the course of one fit."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn

from lq.callbacks.batches import Forward
from lq.callbacks.first_batches import recalibrate_on_training_batches
from lq.callbacks.forget import forget_best
from lq.callbacks.guards import averages_weights
from lq.callbacks.learned_quantization import LearnedQuantization
from lq.callbacks.steps import StepCounter
from lq.checks import require_integer, require_number
from lq.network import quantizers, scale_parameters, set_slope
from lq.nn import named_quantized_layers
from lq.quantizers import ActivationQuantizer, SoftQuantizer, find_method
from lq.spec import LayerSpec
from lq.surgery import layer_specs, set_widths

__all__ = ["ProgressiveBits"]

_say = rank_zero_only(print)


class ProgressiveBits(StepCounter):
    """Trains with more bits first: 8, then 4, then those of `LearnedQuantization`, in one fit.

    At each change levels are set anew, of weights from the weights and of inputs from training batches. Layers that end
    with more bits than a stage has keep theirs; all stages have the last one's ``grid``; accumulators whose bound the
    weights keep are wider by as much as the codes; where a subset has fewer candidates than a stage has points, that
    stage has evenly spaced ones. What keeps the best of a metric (`ModelCheckpoint`, whose files stay, `EarlyStopping`,
    `ReduceLROnPlateau`, `lq.HoldOnPlateau`) forgets it at each change: those networks had other widths. A resumed fit
    that is longer than the one before never goes back to more bits.

    Args:
        bits: widths of the stages before the last, falling.
        until: fraction of the fit that they share in equal parts.
        calibration_batches: training batches that set the levels of inputs at each change.
        calibration_forward: runs the module on a batch, where `LearnedQuantization` needs it, too.

    Raises:
        ValueError: for widths that do not fall, or a fraction out of range.

    Source: in steps from one width to the next, Li et al., Additive Powers-of-Two Quantization, ICLR 2020, section 4.

    >>> ProgressiveBits([8, 4, 3], until=0.6).bits
    (8, 4, 3)
    """

    def __init__(
        self,
        bits: Sequence[int] = (8, 4),
        until: float = 0.5,
        *,
        calibration_batches: int = 4,
        calibration_forward: Forward | None = None,
    ) -> None:
        """Validate; nothing is touched before the first batch."""
        super().__init__()
        if isinstance(bits, str) or not isinstance(bits, Sequence):
            raise ValueError(f"bits must be a list of widths, got {bits!r}: try [8, 4]")
        for width in bits:
            LayerSpec(bits=width)  # complains
        if not bits or list(bits) != sorted(set(bits), reverse=True):
            raise ValueError(f"bits must fall from stage to stage, got {list(bits)}: try [8, 4]")
        fix = "0.5 leaves half of it to the last width"
        require_number("until", until, lambda v: 0 < v < 1, "lie between 0 and 1", fix)
        require_integer("calibration_batches", calibration_batches, 1, fix="try 4")
        self.bits, self.until = tuple(bits), until
        self.calibration_batches, self.calibration_forward = calibration_batches, calibration_forward

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew, and see that no weight is rounded onto the last stage's levels first."""
        super().setup(trainer, pl_module, stage)
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        if any(isinstance(c, LearnedQuantization) and c.anneal.start_rounding for c in callbacks):
            raise ValueError(
                "start_rounding must be None beside ProgressiveBits, which begins with more levels than those of the "
                "last stage, onto which it would round: leave one of the two out"
            )

    def restart(self) -> None:
        """Begin with the first stage."""
        super().restart()
        self.stage, self.last = -1, dict[str, LayerSpec]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is an end, and no second network whose widths would stay behind."""
        super().on_train_start(trainer, pl_module)
        if averages_weights(trainer.callbacks):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("ProgressiveBits cannot change the widths of averaged weights: leave one of the two out")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change the widths when a stage begins."""
        self.last = self.last or layer_specs(pl_module)
        reached = self.part / self.until * len(self.bits) + 1e-9  # a third of the fit, thrice, may be less than all
        stage = len(self.bits) if self.ends else min(int(reached), len(self.bits))
        if stage > self.stage:
            self.stage = stage
            self._change(trainer, pl_module)

    def _change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        final = self.stage == len(self.bits)
        specs = self.last if final else {p: _widened(s, self.bits[self.stage]) for p, s in self.last.items()}
        before, learned = layer_specs(pl_module), {id(p) for p in scale_parameters(pl_module)}
        slopes = [float(q.slope) for q in quantizers(pl_module) if isinstance(q, SoftQuantizer)]
        set_widths(pl_module, specs)
        if {id(p) for p in scale_parameters(pl_module)} != learned:
            raise ValueError(
                "ProgressiveBits needs a quantizer whose parameters do not depend on the width, got one that learns "
                "every step: choose another quantizer, or train width after width"
            )
        if slopes:
            set_slope(pl_module, slopes[0])
        changed = [path for path, spec in specs.items() if _inputs(spec) != _inputs(before[path])]
        changed += [path for path in specs if path not in changed and _forgot(pl_module.get_submodule(path))]
        count, forward = self.calibration_batches, self.calibration_forward
        recalibrate_on_training_batches(trainer, pl_module, count, forward, changed)
        widths = sorted({layer.weight_quantizer.codes.bits for layer in named_quantized_layers(pl_module).values()})
        _say(f"Step {self.step}: weights of {', '.join(map(str, widths))} bits")
        if self.step:
            forget_best(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a fit that ended before its last stage."""
        if self.stage < len(self.bits):
            rank_zero_warn(
                f"the fit ended after {self.step} steps, before its last stage: weights have {self.bits[self.stage]} "
                "bits, or their own where those are more. Train longer, or give ProgressiveBits a smaller until"
            )

    def state_dict(self) -> dict[str, Any]:
        """Step, stage, and the specs of the last stage.

        Returns:
            Plain Python values.
        """
        last = {path: spec.to_dict() for path, spec in self.last.items()}
        return super().state_dict() | {"stage": self.stage, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written.

        Args:
            state_dict: from `state_dict`.
        """
        super().load_state_dict(state_dict)
        self.stage = state_dict["stage"]
        self.last = {path: LayerSpec(**spec) for path, spec in state_dict["last"].items()}


def _forgot(layer: nn.Module) -> bool:
    """Whether the levels of a layer's input were made anew with those of its weight, as points are."""
    inputs = layer.input_quantizer
    return isinstance(inputs, ActivationQuantizer) and not inputs.is_calibrated


def _inputs(spec: LayerSpec) -> tuple[int, int] | None:
    return None if spec.activation is None else spec.activation_codes(signed=True)[:2]


def _widened(spec: LayerSpec, bits: int) -> LayerSpec:
    """The spec with at least so many bits, of inputs and, where sums of codes are bounded, of accumulators, too."""
    own = spec.activation_bits if spec.activation_bits != "same" else spec.weight_codes.bits
    changes: dict[str, Any] = {"activation_bits": max(bits, int(own))}
    if bits > spec.weight_codes.bits:
        changes |= {"bits": bits, "levels": None}
    try:
        return _with_room(replace(spec, **changes), spec)
    except ValueError:
        if spec.quantizer != "subset":
            raise
    # candidates for few points are too few for so many: even ones, until the width is theirs
    even = {"candidates": "uniform", "activation_candidates": "uniform", "words": None, "zero": None}
    return replace(spec, **changes, **even)


def _with_room(wide: LayerSpec, spec: LayerSpec) -> LayerSpec:
    """The wider spec with accumulators that hold as large weights and inputs, whose codes are larger there."""
    if not find_method(spec.quantizer).heeds("accumulator_bits"):
        return wide
    larger = wide.weight_codes.largest / spec.weight_codes.largest
    if spec.activation is not None:
        larger *= wide.activation_codes(signed=False).largest / spec.activation_codes(signed=False).largest
    return replace(wide, accumulator_bits=min(32, spec.accumulator_bits + math.ceil(math.log2(larger))))
