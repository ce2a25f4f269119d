"""What callbacks share whose schedule counts optimizer steps."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lq.nn import named_quantized_layers

__all__ = ["KNOWN_LENGTH", "StepCounter", "moves_weights", "part_of_fit", "steps_of_fit"]

KNOWN_LENGTH = "set Trainer(max_epochs=...), for data without a length max_steps or an integer limit_train_batches, too"


def steps_of_fit(trainer: Trainer) -> float:
    """Optimizer steps of a whole fit.

    Args:
        trainer: of the fit.

    Returns:
        Their number, infinite where it is unknown: without an end, or over data without a length.
    """
    if (scheduler := _accumulation_scheduler(trainer)) is None:
        total = trainer.estimated_stepping_batches
        return math.inf if total < 0 else total
    # Lightning's estimate knows what it accumulates over now, and that is set when an epoch begins
    at_most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if batches == math.inf or epochs is None or epochs < 0:
        return at_most
    over = map(scheduler.get_accumulate_grad_batches, range(epochs))
    return min(at_most, sum(math.ceil(batches / each) for each in over))


def _accumulation_scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)


def part_of_fit(trainer: Trainer, batches: int) -> float:
    """Part of a fit that is over, from 0 to 1, by whichever of its limits ends it first.

    It needs no number of optimizer steps, which nobody knows beforehand where a module steps its optimizers itself.

    Args:
        trainer: of the fit.
        batches: of the present epoch that it has seen.

    Returns:
        The part; 0 for a fit without an end.
    """
    epochs, whole = trainer.max_epochs or 0, trainer.num_training_batches
    known = epochs > 0 and 0 < whole < math.inf
    by_epochs = (trainer.current_epoch * whole + batches) / (epochs * whole) if known else 0.0
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    return min(1.0, max(by_epochs, by_steps))


def moves_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step that an optimizer is about to make moves any weight.

    Args:
        optimizer: about to step.

    Returns:
        False where no parameter has a gradient, as behind a training_step that skipped the batch.
    """
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


class StepCounter(Callback):
    """Counts the optimizer steps of a fit: batches that were accumulated or skipped are none.

    Attributes:
        step: optimizer steps so far.
        part: of the fit that was over when the last of them had been made. It never falls: where a resumed fit is
            longer than the one before, what has happened by then is not undone.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self.restart()

    def restart(self) -> None:
        """Begin with nothing, or forget an earlier fit; a subclass does so with what it has of its own, too."""
        self.step, self.part, self._before, self._length = 0, 0.0, 0.0, 1.0
        self._stepped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew; a checkpoint's state is loaded after this."""
        if stage == "fit":
            self.restart()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the fit has an end, and the network quantized layers.

        Raises:
            ValueError: where it has none.
        """
        if not named_quantized_layers(pl_module):
            raise ValueError(
                f"{type(self).__name__} needs quantized layers, got a network without: add lq.LearnedQuantization to "
                "the callbacks"
            )
        total = steps_of_fit(trainer)
        if math.isinf(total):
            raise ValueError(f"{type(self).__name__} needs a fit of known length, got none: {KNOWN_LENGTH}")
        if self.step == 0:  # a trainer that has trained before begins anew with what is left
            self._before = part_of_fit(trainer, 0)
        self._length = 1 / max(1.0, total * (1 - self._before))
        self._advance(trainer, 0)

    @property
    def ends(self) -> bool:
        """Whether the next optimizer step is the last one, as far as can be told from the one before."""
        return self.part + self._length > 1 - 1e-9

    def _advance(self, trainer: Trainer, batches: int) -> None:
        left = 1 - self._before
        self.part = max(self.part, (part_of_fit(trainer, batches) - self._before) / left if left > 0 else 1.0)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Weights are about to move."""
        self._stepped = self._stepped or moves_weights(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        if self._stepped:
            self._stepped = False
            self.step, before = self.step + 1, self.part
            self._advance(trainer, batch_idx + 1)
            if not pl_module.automatic_optimization or _accumulation_scheduler(trainer):  # shows only now
                self._length = self.part - before
            self.after_step(pl_module)

    def after_step(self, pl_module: LightningModule) -> None:
        """Called once behind each optimizer step; a subclass may act here.

        Args:
            pl_module: the module that is trained.
        """

    def state_dict(self) -> dict[str, Any]:
        """Steps so far, and the part of the fit; a subclass adds its own.

        Returns:
            Plain Python values.
        """
        return {"step": self.step, "part": self.part, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written.

        Args:
            state_dict: from `state_dict`.
        """
        self.step, self.part = state_dict["step"], state_dict.get("part", 0.0)  # once there was no part
        self._before = state_dict.get("before", 0.0)
