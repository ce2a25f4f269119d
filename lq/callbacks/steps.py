"""What callbacks share whose schedule counts optimizer steps."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["StepCounter"]


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
        """See that the fit has an end.

        Raises:
            ValueError: where it has none.
        """
        total = trainer.estimated_stepping_batches
        if not total < float("inf"):
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
