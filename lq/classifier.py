"""The recipes' LightningModule: an image classifier around any timm model. It knows nothing of quantization."""

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lq.models import create_model

__all__ = ["Classifier"]


class Classifier(LightningModule):
    """Image classifier with cross-entropy, any timm optimizer, and a cosine schedule per step.

    Args:
        model: arguments of `lq.models.create_model`.
        opt: name of a timm optimizer, such as sgd or adamw.
        lr: peak learning rate.
        momentum: of the optimizer, where it has one.
        weight_decay: of everything but biases, norms and other vectors.
        warmup: fraction of the fit over which the learning rate rises.
        label_smoothing: from 0 to below 1.
        prefix: in front of all metric names.

    Batches are tuples of images ``(N, C, H, W)`` and classes ``(N,)``.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        opt: str = "sgd",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: float = 0.0,
        label_smoothing: float = 0.0,
        prefix: str = "",
    ) -> None:
        """Build the network; the arguments go into checkpoints."""
        super().__init__()
        model = dict(model)
        self.save_hyperparameters({**_arguments(locals()), "model": {**model, "checkpoint": None, "pretrained": False}})
        self.model = create_model(**model)
        classes = int(model.get("num_classes", 10))
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")
        self.prefix = prefix
        self.settings = {"opt": opt, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.warmup = warmup
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape ``(N, C, H, W)`` to ``(N, num_classes)``."""
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        images, classes = batch
        loss = F.cross_entropy(self(images), classes, label_smoothing=self.label_smoothing)
        self.log(f"{self.prefix}train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss on held-out images."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss on test images."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, classes = batch
        logits = self(images)
        accuracy = self.val_accuracy if stage == "val" else self.test_accuracy
        accuracy(logits, classes)
        self.log(f"{self.prefix}{stage}/acc", accuracy, prog_bar=True)
        self.log(f"{self.prefix}{stage}/loss", F.cross_entropy(logits, classes), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Optimizer and a cosine schedule that reaches zero with the last step of the fit."""
        optimizer = create_optimizer_v2(self.model, **self.settings)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warm = int(self.warmup * total)

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))) / 2

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def _arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in scope.items() if k not in ("self", "__class__")}
