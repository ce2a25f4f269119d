"""What is decided from training batches before the first step, and batch norms re-estimated from them later."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lq.calibration import calibrate, named_batch_norms, reestimate_batch_norm, uncalibrated_layers
from lq.callbacks.batches import Forward, UncopyableError, shadow, training_batches
from lq.callbacks.guards import check_called
from lq.distributed import first_, mean_, minimum
from lq.nn import QuantLayer, named_quantized_layers
from lq.point_search.inputs import hessians, with_patches
from lq.point_search.rounding import feed_back, obstacles
from lq.spec import QuantSpec
from lq.surgery import (
    any_folded,
    dequantize_model,
    execution_order,
    find_norms,
    fit_weights,
    follow_norms,
    layer_specs,
    reassign_ends,
    refold,
    set_widths,
)

__all__ = [
    "calibrate_on_training_batches",
    "follow_norms_on_training_batch",
    "recalibrate_on_training_batches",
    "reestimate_on_training_batches",
    "round_on_training_batches",
    "training_norms",
]


def calibrate_on_training_batches(
    trainer: Any,
    pl_module: Any,
    spec: QuantSpec,
    count: int,
    forward: Forward | None,
    order: Sequence[str] | None,
    fresh: Sequence[QuantLayer],
) -> Sequence[str]:
    """Find the first and the last block, then set the input scales of layers that have none, all on a copy.

    Args:
        trainer: of a fit that is about to take its first step.
        pl_module: the quantized module; only widths, weight scales of blocks whose width changes, and missing input
            scales change, and weights of fresh layers.
        spec: it was quantized with.
        count: batches to look at.
        forward: the user's way to run the module on a batch, or None.
        order: execution order that an example input has decided; None finds it now.
        fresh: layers that still have the float network's weights, where their quantizer begins with others.

    Returns:
        Paths of the layers in execution order.

    Raises:
        ValueError: for a loader without batches, or a layer that no batch reaches.
    """
    fit_weights(fresh)
    twin, run = shadow(trainer, pl_module, forward)
    missing = uncalibrated_layers(pl_module)
    with training_batches(trainer, count) as batches, torch.no_grad():
        seen = list(batches)
        if order is None:
            first = execution_order(twin, lambda: [run(twin, batch) for batch in seen[:1]])
            order = [path for path in first if path in named_quantized_layers(pl_module)]
            before = {id(p) for p in pl_module.parameters()}
            reassign_ends(pl_module, spec, order)
            if {id(p) for p in pl_module.parameters()} != before:
                raise ValueError(
                    f"example_input_array must be set for quantizer={spec.quantizer!r}: the first and last block in "
                    f"execution order are {order[0]!r} and {order[-1]!r}, others than those registered first and last, "
                    "and the optimizer holds what these learned"
                )
            set_widths(twin, layer_specs(pl_module))  # before the scales are set, which depend on the widths
        whole = (lambda: calibrate(twin, seen, run)) if missing else (lambda: [run(twin, batch) for batch in seen])
        called = execution_order(twin, whole)
    check_called(called, list(named_quantized_layers(pl_module)))
    _take_input_levels(pl_module, twin, missing)
    return order


def recalibrate_on_training_batches(
    trainer: Any, pl_module: Any, count: int, forward: Forward | None, paths: Sequence[str]
) -> None:
    """Set the input levels of some layers anew, from a copy.

    Args:
        trainer: of a running fit.
        pl_module: the quantized module; only the inputs of these layers change.
        count: batches to look at.
        forward: the user's way to run the module on a batch, or None.
        paths: of the layers.
    """
    if not paths:
        return
    twin, run = shadow(trainer, pl_module, forward)
    with training_batches(trainer, count) as batches, torch.no_grad():
        calibrate(twin, batches, run)
    _take_input_levels(pl_module, twin, paths)


def round_on_training_batches(trainer: Any, pl_module: Any, count: int, forward: Forward | None) -> None:
    """Put weights onto their levels with error feedback, for the inputs that they have in the float network, in place.

    All layers' products of inputs, d x d in float64 for d weights of an output channel, are held at once.

    Args:
        trainer: of a fit that is about to take its first step.
        pl_module: the quantized module, its scales set; only its weights change.
        count: batches to look at.
        forward: the user's way to run the module on a batch, or None.

    Raises:
        ValueError: for a loader without batches, or a module that does not run on them.

    Warns:
        UserWarning: for layers that are left as they are, with the reason.
    """
    layers = named_quantized_layers(pl_module)
    left = obstacles(pl_module, layers)
    twin, run = shadow(trainer, pl_module, forward)
    dequantize_model(twin.eval(), keep_latent=True)
    floats = with_patches({path: twin.get_submodule(path) for path in layers if not left[path]})
    with training_batches(trainer, count) as batches:
        products = hessians(twin, floats, list(batches), run)
    everywhere = minimum(torch.tensor([float(path in products) for path in floats], device=pl_module.device))
    products = {path: mean_(products[path]) for path, found in zip(floats, everywhere, strict=True) if found}
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    left = feed_back(pl_module, layers, products, progress=shown)
    for layer in layers.values():
        if isinstance(layer.weight, nn.Parameter):
            first_(layer.weight.detach())  # another processor may round a tie otherwise
    for reason in sorted(set(left.values()) - {""}):
        paths = [path for path, why in left.items() if why == reason]
        rank_zero_warn(f"start_rounding leaves {', '.join(paths)} as they are: {reason}")


def follow_norms_on_training_batch(trainer: Any, pl_module: Any, forward: Forward | None, *, calibrate: bool) -> None:
    """Find the batch norms that levels follow, where a spec says ``fold_norms``.

    Args:
        trainer: of a fit that is about to begin, or to go on.
        pl_module: the quantized module; only scales of weights change.
        forward: the user's way to run the module on a batch, or None.
        calibrate: whether to set those scales anew.
    """
    if not any_folded(pl_module):
        return
    twin, run = shadow(trainer, pl_module, forward)
    with training_batches(trainer, 1) as batches, torch.no_grad():
        pairs = find_norms(twin, lambda: [run(twin, batch) for batch in batches])
    follow_norms(pl_module, pairs, calibrate=calibrate)


def _take_input_levels(pl_module: Any, twin: nn.Module, paths: Sequence[str]) -> None:
    copies = dict(twin.named_modules())
    for path in paths:
        source, target = (cast(nn.Module, m.input_quantizer) for m in (copies[path], pl_module.get_submodule(path)))
        target.load_state_dict(source.state_dict())


def training_norms(pl_module: nn.Module) -> list[str]:
    """Paths of the batch norms that gather statistics in training: frozen ones, and a teacher's, do not.

    Args:
        pl_module: as a training step leaves it.

    Returns:
        Their paths.
    """
    return [path for path, norm in named_batch_norms(pl_module).items() if norm.training]


def reestimate_on_training_batches(
    trainer: Any, pl_module: Any, count: int, forward: Forward | None, paths: Sequence[str]
) -> None:
    """Batch-norm statistics of the hard network, from a copy; left as they are, with a warning, without data for it.

    Scales that follow a batch norm do so once more: in training they are a step behind.

    Args:
        trainer: of a running fit.
        pl_module: the module; only its batch norms change, and scales that follow them.
        count: batches to look at.
        forward: the user's way to run the module on a batch, or None.
        paths: of the batch norms, `training_norms`; without any this costs nothing.
    """
    if paths and count:
        _reestimate(trainer, pl_module, count, forward, paths)
    refold(pl_module)


def _reestimate(trainer: Any, pl_module: Any, count: int, forward: Forward | None, paths: Sequence[str]) -> None:
    twin, run = shadow(trainer, pl_module, forward)
    try:
        with training_batches(trainer, count, disturb=False) as batches:
            reestimate_batch_norm(twin, batches, run, paths=paths)
    except UncopyableError as error:
        rank_zero_warn(f"batch norms keep the statistics of training: {error}. Give a DataLoader or reestimate_bn=0")
        return
    for path in paths:
        pl_module.get_submodule(path).load_state_dict(twin.get_submodule(path).state_dict())
