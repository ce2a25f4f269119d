"""What callbacks share whose schedule counts optimizer steps."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lq.nn import named_quantized_layers

__all__ = ["StepCounter", "forget_best", "steps_of_fit"]


def steps_of_fit(trainer: Trainer) -> float:
    """Optimizer steps of a whole fit.

    Args:
        trainer: of the fit.

    Returns:
        Their number, infinite where it is unknown: without an end, or over data without a length.
    """
    total = trainer.estimated_stepping_batches
    return math.inf if total < 0 else total


class StepCounter(Callback):
    """Counts the optimizer steps of a fit: batches that were accumulated or skipped are none.

    Attributes:
        step: optimizer steps so far; a subclass keeps it in its checkpoint.
        total: optimizer steps that the fit has.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        super().__init__()
        self.step, self.total = 0, 1
        self._stepped = False

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
            raise ValueError(f"{type(self).__name__} needs a fit with an end, got none: set Trainer(max_epochs=...)")
        self.total = max(1, int(total))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Weights are about to move."""
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        if self._stepped:
            self._stepped = False
            self.step += 1
            self.after_step(pl_module)

    def after_step(self, pl_module: LightningModule) -> None:
        """Called once behind each optimizer step; a subclass may act here.

        Args:
            pl_module: the module that is trained.
        """


def forget_best(trainer: Trainer) -> None:
    """Have every `ModelCheckpoint` that keeps the best forget what it saw: what comes now is another network.

    Args:
        trainer: of a running fit.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.best_k_models, callback.best_model_path, callback.best_model_score = {}, "", None
            worst = float("-inf") if callback.mode == "max" else float("inf")
            callback.kth_best_model_path, callback.kth_value = "", torch.tensor(worst)
