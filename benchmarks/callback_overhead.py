"""Cost of the callback itself: schedule, regularizer, checks and logging, against the training step of ResNet-20.

    python benchmarks/callback_overhead.py --threads 1 --blocks 8

One fit, W4A4, batch 32, SGD, logging every 50 steps to a fresh sqlite store of MLflow. The callback's hooks are timed
inside the steps they belong to; the overhead is their share, median over blocks of 50 steps. Seed 0, random images.
Writes benchmarks/results/callback_overhead.csv.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
import lq.models
from lq.tracking.mlflow import mlflow_logger

RESULTS = Path(__file__).parent / "results"
BLOCK = 50


class Module(LightningModule):
    """A plain classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("cifar_resnet20")

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Timed(lq.LearnedQuantization):
    """The callback with a clock on the hooks that run in every step."""

    inside = 0.0

    def _clocked(self, hook: str, *arguments) -> None:
        start = time.perf_counter()
        getattr(super(), hook)(*arguments)
        self.inside += time.perf_counter() - start

    def on_train_batch_start(self, *arguments) -> None:
        self._clocked("on_train_batch_start", *arguments)

    def on_before_optimizer_step(self, *arguments) -> None:
        self._clocked("on_before_optimizer_step", *arguments)

    def on_train_batch_end(self, *arguments) -> None:
        self._clocked("on_train_batch_end", *arguments)


class Blocks(Callback):
    """Wall time and time inside the hooks of every block of steps."""

    def __init__(self, timed: Timed) -> None:
        self.timed, self.shares, self.seconds = timed, [], []
        self.start = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx % BLOCK == 0:
            self.start, self.timed.inside = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx % BLOCK == BLOCK - 1:
            outside = time.perf_counter() - self.start - self.timed.inside
            self.shares.append(self.timed.inside / outside)
            self.seconds.append(outside / BLOCK)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    images = torch.randn(32 * BLOCK, 3, 32, 32)
    data = DataLoader(TensorDataset(images, torch.randint(10, (len(images),))), batch_size=32)
    timed = Timed(bits=4)
    blocks = Blocks(timed)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        logger = mlflow_logger(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        trainer = Trainer(
            max_epochs=options.blocks,
            accelerator="cpu",
            callbacks=[timed, blocks],
            logger=logger,
            log_every_n_steps=BLOCK,
            **quiet,
        )
        trainer.fit(Module(), data)
    low, middle, high = (100 * q for q in statistics.quantiles(blocks.shares, n=4))
    step = 1e3 * statistics.median(blocks.seconds)
    print(f"callback: {middle:.1f} % of a step of {step:.0f} ms (quartiles {low:.1f} to {high:.1f})")
    with (RESULTS / "callback_overhead.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["percent of a step", "lower quartile", "upper quartile", "step ms", "threads", "blocks"])
        writer.writerow([f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}", f"{step:.0f}", options.threads, options.blocks])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=8)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    main(parsed)
