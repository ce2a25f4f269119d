"""Run a LightningModule on training batches without leaving a trace on it, its loader or the random state."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from lq.calibration import default_forward

__all__ = ["Forward", "loss_scale", "overrides", "shadow", "training_batches"]

Forward = Callable[[Any, Any], Any]
_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def overrides(module: Any, name: str) -> bool:
    """Whether the user's class (or an instance attribute) defines a hook that Lightning's base class leaves empty.

    Args:
        module: a LightningModule, of the package lightning or pytorch_lightning.
        name: of the hook.

    Returns:
        True where it is the user's.
    """
    if module is None:
        return False
    if name in vars(module):
        return True
    owner = next((c for c in type(module).__mro__ if name in vars(c)), None)
    return owner is not None and not owner.__module__.startswith(("lightning.", "pytorch_lightning.", "torch."))


class UncopyableError(Exception):
    """A loader can be read only once."""


@contextmanager
def training_batches(trainer: Any, count: int, *, disturb: bool = True) -> Iterator[Iterator[Any]]:
    """First batches of the training loader, on the device, as if they had never been drawn.

    Loaders are read in this process, through a copy that shares the dataset and the sampler; random states, global
    and those of samplers, are restored.

    Args:
        trainer: of a fit whose loaders are set up.
        count: number of batches, at most.
        disturb: whether to read, with a warning, a loader that cannot be copied, such as a generator: training will
            not see what is read of it.

    Yields:
        Iterator over the batches.

    Raises:
        UncopyableError: for such a loader, where it must not be disturbed.
    """
    kept: list[tuple[torch.Generator, torch.Tensor]] = []

    def twin(loader: Any) -> Any:
        if not isinstance(loader, DataLoader):
            return _copied(loader, loader, disturb)
        for owner in (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                kept.append((generator, generator.get_state()))
        common = {"collate_fn": loader.collate_fn, "generator": loader.generator}
        if isinstance(loader.dataset, IterableDataset):
            dataset = _copied(loader.dataset, loader.dataset, disturb)
            return DataLoader(dataset, **common, batch_size=loader.batch_size, drop_last=loader.drop_last)
        if loader.batch_sampler is None:
            return DataLoader(loader.dataset, **common, sampler=loader.sampler, batch_size=None)
        return DataLoader(
            loader.dataset, **common, batch_sampler=_copied(loader.batch_sampler, loader.dataset, disturb)
        )

    leaves = tree_map_only(object, twin, trainer.train_dataloader)
    combined = CombinedLoader(leaves, "max_size_cycle")
    with isolate_rng():
        try:
            yield (_on_device(trainer, item[0]) for item in islice(iter(combined), count))
        finally:
            for generator, state in kept:
                generator.set_state(state)


def _copied(source: Any, shared: Any, disturb: bool) -> Any:
    """A copy that advances alone: samplers and iterables may keep a position or random numbers of their own."""
    try:
        return copy.deepcopy(source, {} if source is shared else {id(shared): shared})
    except Exception as error:  # whatever a foreign class raises when copied
        name = type(source).__name__
        if not disturb:
            raise UncopyableError(f"{name} cannot be copied ({error})") from error
        rank_zero_warn(f"{name} cannot be copied ({error}): calibration reads it, which may change what training sees")
        return source


def _on_device(trainer: Any, batch: Any) -> Any:
    """What the training loop does to a batch before training_step."""
    data = trainer.datamodule
    owner = data if overrides(data, "on_before_batch_transfer") else trainer.lightning_module
    batch = owner.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def shadow(trainer: Any, pl_module: Any, forward: Forward | None) -> tuple[Any, Forward]:
    """A copy of a LightningModule and a function that runs it on a batch as training would, without logging.

    Args:
        trainer: the module's trainer.
        pl_module: the module; nothing of it changes.
        forward: the user's way to run it on a batch; None takes `training_step`, or under manual optimization (where
            that would step the optimizers) the module's own forward on the first element of the batch.

    Returns:
        The copy and the function.

    Raises:
        ValueError: under manual optimization without a forward.
    """
    if forward is None and not pl_module.automatic_optimization and not overrides(pl_module, "forward"):
        raise ValueError(
            f"calibration_forward must be given for {type(pl_module).__name__}, which optimizes manually and has no "
            "forward: pass LearnedQuantization(calibration_forward=lambda module, batch: module.net(batch[0]))"
        )
    try:
        twin = copy.deepcopy(pl_module)
    except Exception as error:  # whatever an attribute of the user's raises when copied
        raise ValueError(
            f"{type(pl_module).__name__} must be copyable, so that calibration leaves it untouched, got: {error}. "
            "Detach the tensors that it keeps between steps, or delete them in on_train_start and on_validation_start; "
            "reestimate_bn=0 copies it before training alone"
        ) from error
    twin.trainer = trainer
    for name in _COMPILED:  # torch.compile leaves instance attributes that are bound to the original
        vars(twin).pop(name, None)
    twin.log = twin.log_dict = lambda *_, **__: None

    count = itertools.count(1)

    def run(module: Any, batch: Any) -> Any:
        with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.train_step_context():
            if forward is not None:
                return forward(module, batch)
            if not module.automatic_optimization:
                return _forward(module, batch)
            step = type(module).training_step
            parameters = inspect.signature(step).parameters.values()
            takes_index = len(parameters) > 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
            # from 1 on: what a module does in its first batch, such as logging a picture, is left to that batch
            return step(module, batch, next(count)) if takes_index else step(module, batch)

    return twin, run


def _forward(module: Any, batch: Any) -> Any:
    try:
        return default_forward(module, batch)
    except TypeError as error:
        raise ValueError(
            f"calibration_forward must be given for {type(module).__name__}, whose forward does not take its batches: "
            f"{error}. Pass LearnedQuantization(calibration_forward=lambda module, batch: module(batch['image']))"
        ) from error


def loss_scale(trainer: Any, optimizer: torch.optim.Optimizer) -> float:
    """Factor that gradients carry before an optimizer step under a grad scaler.

    Args:
        trainer: the trainer.
        optimizer: about to step.

    Returns:
        1, but for fused optimizers, which unscale inside their step, the scaler's factor.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0
