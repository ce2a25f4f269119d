"""What remembers the best of a metric, when the network becomes another one in the course of a fit."""

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lq.callbacks.learned_quantization import LearnedQuantization

__all__ = ["forget_best"]


def forget_best(trainer: Trainer) -> None:
    """Have all that compares a metric with its best forget what it saw: what comes now is another network.

    That is every `ModelCheckpoint` that keeps the best (its files stay), every `EarlyStopping` with the stop that it
    may have asked for, every `ReduceLROnPlateau`, and `lq.HoldOnPlateau`.

    Args:
        trainer: of a running fit.
    """
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, ModelCheckpoint):
            callback.best_k_models, callback.best_model_path, callback.best_model_score = {}, "", None
            callback.kth_best_model_path, callback.kth_value = "", _worst(callback.mode)
        elif isinstance(callback, EarlyStopping):
            callback.best_score, callback.wait_count = _worst(callback.mode), 0
            if callback.stopped_epoch:
                callback.stopped_epoch, trainer.should_stop = 0, False
        elif isinstance(callback, LearnedQuantization):
            callback.annealing.forget_best()
    for config in trainer.lr_scheduler_configs:
        if isinstance(scheduler := config.scheduler, ReduceLROnPlateau):
            scheduler.best, scheduler.num_bad_epochs = scheduler.mode_worse, 0


def _worst(mode: str) -> torch.Tensor:
    return torch.tensor(-math.inf if mode == "max" else math.inf)
