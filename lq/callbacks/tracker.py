"""Log how a quantized network does, through any Lightning logger."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lq.checks import require_integer
from lq.functional import LevelStatistics
from lq.nn import named_quantized_layers
from lq.surgery import SwapReport
from lq.tracking import log_rows, log_text, metric, network_metrics

__all__ = ["QuantizationTracker", "log_report"]

_MONITORED = ("alignment", "quantization_loss", "slope", "regularizer", "loss_total")


class QuantizationTracker(Callback):
    """Logs alignment, quantization loss and the like of the network and of every layer.

    `LearnedQuantization` brings its own; add this one to follow a model that was quantized by hand.

    Everything goes out in one ``log_metrics`` call per logger every N optimizer steps; a few figures are also given to
    the trainer, so that ``ModelCheckpoint(monitor="lq/alignment")`` and its like can use them.

    Args:
        every_n_steps: optimizer steps between logs; None takes ``Trainer(log_every_n_steps)``, of which 0 logs nothing.
        layers: whether to log every layer, too.

    Raises:
        ValueError: for an interval below 1.
    """

    def __init__(self, every_n_steps: int | None = None, layers: bool = True) -> None:
        """Remember the settings."""
        super().__init__()
        if every_n_steps is not None:
            require_integer("every_n_steps", every_n_steps, 1, fix="try 50, or None")
        self.every_n_steps = every_n_steps
        self.layers = layers
        self._logged_at = -1

    def restart(self) -> None:
        """Forget what an earlier fit has logged."""
        self._logged_at = -1

    def due(self, trainer: Trainer, step: int) -> bool:
        """Whether figures are to be found after an optimizer step, at the latest at the end of an epoch.

        Args:
            trainer: the trainer.
            step: optimizer steps taken.

        Returns:
            True where they are.
        """
        every = self._every(trainer)
        return step != self._logged_at and ((every > 0 and step % every == 0) or trainer.is_last_batch)

    def _every(self, trainer: Trainer) -> int:
        every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return int(every if self.every_n_steps is None else self.every_n_steps)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log when due."""
        if named_quantized_layers(pl_module) and self.due(trainer, trainer.global_step):
            self.record(trainer, pl_module, trainer.global_step)

    def record(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        extra: dict[str, float] | None = None,
        statistics: dict[str, LevelStatistics] | None = None,
    ) -> dict[str, float]:
        """Log the figures of the network now (Lightning gives every callback a ``log`` of its own).

        Args:
            trainer: the trainer.
            pl_module: its module.
            step: optimizer steps taken.
            extra: further metrics, with full names.
            statistics: of the layers, where they are known already.

        Returns:
            Everything logged.
        """
        self._logged_at = step
        values = network_metrics(pl_module, layers=self.layers, statistics=statistics) | (extra or {})
        for logger in trainer.loggers if self._every(trainer) else ():
            logger.log_metrics(values, step=step)
        for name in map(metric, _MONITORED):
            if name in values:
                pl_module.log(name, values[name], logger=False, on_step=True, on_epoch=False, batch_size=1)
        return values


@rank_zero_only
def log_report(trainer: Trainer, report: SwapReport) -> None:
    """Print what became of every layer, and keep it with the run.

    Args:
        trainer: the trainer.
        report: of the swap.
    """
    print(f"\n{report}\n")
    log_text(trainer.loggers, "lq/swap_report.txt", str(report))
    log_rows(trainer.loggers, "lq/swap_report.json", report.to_dicts())
