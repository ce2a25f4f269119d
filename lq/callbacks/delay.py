"""Activations that stay in float at first."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lq.calibration import uncalibrated_layers
from lq.callbacks.batches import Forward
from lq.callbacks.first_batches import recalibrate_on_training_batches
from lq.callbacks.forget import forget_best
from lq.callbacks.guards import averages_weights
from lq.callbacks.progressive import ProgressiveBits
from lq.callbacks.steps import StepCounter
from lq.checks import require_integer, require_number
from lq.nn import named_quantized_layers

__all__ = ["DelayedActivations"]

_say = rank_zero_only(print)


class DelayedActivations(StepCounter):
    """Quantizes weights alone at first, inputs of layers only after a part of the fit.

    When the time has come the levels of all inputs are set from training batches, for good, and what keeps the best of
    a metric (`ModelCheckpoint`, whose files stay, `EarlyStopping`, `ReduceLROnPlateau`, `lq.HoldOnPlateau`) forgets it:
    those networks had float activations.

    Args:
        until: fraction of the fit without quantized activations.
        calibration_batches: training batches that set the levels of inputs then.
        calibration_forward: runs the module on a batch, where `LearnedQuantization` needs it, too.

    Raises:
        ValueError: for a fraction out of range, or no batches.

    Note:
        Until then scales of activations have no gradient: in several processes methods that learn them need
        ``Trainer(strategy="ddp_find_unused_parameters_true")``; "minmax" and "oaq" do not.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        CVPR 2018, section 3.1, whose first 50 000 to 2 million steps are without.

    >>> DelayedActivations(until=0.2).until
    0.2
    """

    def __init__(
        self, until: float = 0.3, *, calibration_batches: int = 4, calibration_forward: Forward | None = None
    ) -> None:
        """Validate; nothing is touched before the first batch."""
        super().__init__()
        fix = "0.3 leaves most of the fit to activations"
        require_number("until", until, lambda v: 0 < v < 1, "lie between 0 and 1", fix)
        require_integer("calibration_batches", calibration_batches, 1, fix="try 4")
        self.until = until
        self.calibration_batches, self.calibration_forward = calibration_batches, calibration_forward

    def restart(self) -> None:
        """Begin with float activations."""
        super().restart()
        self.switched = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that there is an end, and no second network whose inputs would stay in float."""
        super().on_train_start(trainer, pl_module)
        callbacks = list(trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        if any(isinstance(c, ProgressiveBits) for c in callbacks[callbacks.index(self) :]):
            raise ValueError(
                "DelayedActivations must come after ProgressiveBits, which sets levels of inputs: swap them"
            )
        if averages_weights(callbacks):
            raise ValueError("DelayedActivations cannot change averaged networks: leave one of the two out")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep inputs in float, or set their levels when the time has come."""
        if self.switched:
            return
        if self.part < self.until and not self.ends:
            for layer in named_quantized_layers(pl_module).values():
                if layer.input_quantizer is not None and layer.input_quantizer.is_calibrated:
                    layer.input_quantizer.forget_()
            return
        self.switched, missing = True, uncalibrated_layers(pl_module)
        count, forward = self.calibration_batches, self.calibration_forward
        recalibrate_on_training_batches(trainer, pl_module, count, forward, missing)
        _say(f"Step {self.step}: activations are quantized from now on")
        forget_best(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a fit that ended before its time."""
        if not self.switched:
            rank_zero_warn(
                f"the fit ended after {self.step} steps, before activations were quantized: their inputs are in float"
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps so far; what is quantized is in the network's own state.

        Returns:
            Plain Python values.
        """
        return super().state_dict() | {"switched": self.switched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written.

        Args:
            state_dict: from `state_dict`.
        """
        super().load_state_dict(state_dict)
        self.switched = state_dict["switched"]
