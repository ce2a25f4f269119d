"""Checks that turn silent failures of quantization-aware training into errors that name the fix."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lq.callbacks.hold import Hold, HoldOnPlateau
from lq.checkpoints import differences
from lq.functional import LevelStatistics
from lq.network import scale_parameters
from lq.nn import QuantLayer, named_quantized_layers
from lq.spec import LayerSpec, QuantSpec
from lq.surgery import Found

__all__ = [
    "averages_weights",
    "check_averaging_order",
    "check_called",
    "check_collapse",
    "check_loss",
    "check_optimizers",
    "check_same_spec",
    "check_stepped",
    "warn_of_late_averaging",
    "warn_of_other_schedule",
    "warn_without_validation",
]

_AVERAGING = (WeightAveraging, StochasticWeightAveraging)
CLIPPED_LIMIT = 0.99
ZERO_LIMIT = 0.999
_WIDTHS = ("bits", "activation_bits", "levels", "grid", "normalize", "accumulator_bits")  # in which ends differ


def averages_weights(callbacks: Sequence[Any]) -> bool:
    """Whether a callback keeps a second network: an average of the weights, and of scales and ranges with them.

    Args:
        callbacks: of the trainer.

    Returns:
        True where one does.
    """
    return any(isinstance(c, _AVERAGING) for c in callbacks)


def check_averaging_order(callbacks: Sequence[Any], callback: Any) -> None:
    """Refuse a weight-averaging callback that copies the model before it is quantized.

    Args:
        callbacks: of the trainer, in order.
        callback: the one that swaps layers.

    Raises:
        ValueError: where an averaging callback stands before it.
    """
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, _AVERAGING):
            ours, theirs = type(callback).__name__, type(other).__name__
            raise ValueError(
                f"callbacks must list {ours} before {theirs}, got the reverse: {theirs} would copy the float model and "
                f"skip the learned scales. Write callbacks=[{ours}(...), {theirs}(...)]"
            )


def check_same_spec(found: Sequence[Found], spec: QuantSpec) -> None:
    """Refuse a model that was quantized before, by another spec.

    Args:
        found: layers of the model, `lq.surgery.find_layers`.
        spec: of the callback.

    Raises:
        ValueError: naming a layer and what differs.
    """
    layers = {f.path: f for f in found if isinstance(f.module, QuantLayer)}
    own = {cast(LayerSpec, f.module.layer_spec).quantizer for f in layers.values()}
    if spec.quantizer in ("subset", "codebook") and spec.quantizer in own:
        return  # `lq.search` chose the levels of each layer, and they stay as they are
    wanted = {
        path: [spec.layer(path, class_names=f.class_names, first_or_last=end).to_dict() for end in (False, True)]
        for path, f in layers.items()
    }
    # which layers have the width of an end, or of a tied twin, may have been decided by a run that is not at hand
    widths = {tuple(layer[k] for k in _WIDTHS) for options in wanted.values() for layer in options}
    for path, f in layers.items():
        assert isinstance(f.module.layer_spec, LayerSpec)
        have, want = f.module.layer_spec.to_dict(), wanted[path][0]
        if have == wanted[path][1]:
            continue
        same_width = tuple(have[k] for k in _WIDTHS) in widths
        changes = [k for k in have if have[k] != want[k] and not (k in _WIDTHS and same_width)]
        if changes:
            listed = "; ".join(f"{k}: module {have[k]!r}, callback {want[k]!r}" for k in changes)
            raise ValueError(
                f"the module must be float or quantized by the callback's QuantSpec, layer {path!r} differs in {listed}"
                ". Give the callback those values, or call lq.dequantize_model(module, keep_latent=True) first"
            )


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
    """See that the learned scales are trained.

    Args:
        optimizers: of the trainer.
        model: the quantized model.

    Raises:
        ValueError: where no scale is in any optimizer.

    Warns:
        UserWarning: where some are in none.
    """
    optimized = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [names[id(p)] for p in scale_parameters(model) if p.requires_grad and id(p) not in optimized]
    if not missing or not optimizers:
        return
    fix = "build it in configure_optimizers from self.parameters(), which holds them by then"
    if len(missing) == sum(p.requires_grad for p in scale_parameters(model)):
        raise ValueError(f"the optimizer must hold the learned scales, got none of them ({missing[0]}, ...): {fix}")
    rank_zero_warn(f"{len(missing)} learned scales are in no optimizer and stay fixed ({missing[0]}, ...): {fix}")


def warn_of_late_averaging(callbacks: Sequence[Any]) -> None:
    """Say that validation means nothing before an average has started: until then it is the start network.

    Args:
        callbacks: of the trainer.

    Warns:
        UserWarning: for an averaging callback with a late start.
    """
    for other in callbacks:
        late = [n for n in ("update_starting_at_step", "update_starting_at_epoch") if getattr(other, n, None)]
        if isinstance(other, WeightAveraging) and late:
            rank_zero_warn(
                f"{type(other).__name__}({late[0]}=...) validates the start network, not yet calibrated, until its "
                "average starts: do not monitor those validations, or leave the start at 0"
            )


def check_called(called: Sequence[str], quantized: Sequence[str]) -> None:
    """Refuse quantized layers that training does not call: they would run in float while the report says otherwise.

    Args:
        called: paths of the layers that training batches reached.
        quantized: paths of the quantized layers.

    Raises:
        ValueError: naming the layers and the glob that leaves them out.
    """
    missed = [path for path in quantized if path not in called]
    if missed:
        raise ValueError(
            f"every quantized layer must be called in training, got no call of {missed}: they are unused, or their "
            f"parent reads their weight. Leave them in float with exclude={missed}"
        )


def check_stepped(steps: int) -> None:
    """Refuse to anneal by optimizer steps that nobody reports.

    Args:
        steps: optimizer steps seen by the end of an epoch.

    Raises:
        ValueError: for none.
    """
    if steps == 0:
        raise ValueError(
            "an epoch must take at least one optimizer step through Lightning, got none: step self.optimizers(), "
            "not self.optimizers(use_pl_optimizer=False)"
        )


def check_loss(loss: torch.Tensor | None, step: int, scales: Sequence[nn.Parameter]) -> None:
    """Stop at a loss or a scale that is not finite, before a checkpoint of it is written.

    Args:
        loss: of this batch, None where unknown.
        step: optimizer steps taken.
        scales: learned scales to look at.

    Raises:
        ValueError: where one is NaN or infinite.
    """
    sums = [value.detach().sum().double() for value in (loss, *scales) if value is not None]
    total = float(torch.stack(sums).sum()) if sums else 0.0
    if not math.isfinite(total):
        raise ValueError(
            f"the training loss must be finite, got {total:g} at optimizer step {step}: lower the learning rate "
            "or scale_lr_factor, clip gradients, or resume from the last checkpoint, which is intact"
        )


def check_collapse(
    model: nn.Module, statistics: dict[str, LevelStatistics], allowed: frozenset[str] | None = None
) -> frozenset[str]:
    """Find layers whose scale has collapsed: to zero, which clips every weight, or so far up that all round to zero.

    Args:
        model: a quantized model.
        statistics: of its layers, `lq.network.layer_statistics`.
        allowed: layers that may look so because they did from the start (weights initialised to zero); None only
            finds.

    Returns:
        Paths of such layers.

    Raises:
        ValueError: for a layer that is not allowed to.
    """
    found = {}
    scales = {path: layer.weight_quantizer.scale for path, layer in named_quantized_layers(model).items()}
    figures = [
        (s.clipped_fraction, s.zero_fraction, scales[path].detach().sum().double()) for path, s in statistics.items()
    ]
    read = torch.stack([torch.stack(row) for row in figures]).tolist()  # from the device in one go
    for path, (clipped, zero, total) in zip(statistics, read, strict=True):
        if not math.isfinite(total) or clipped > CLIPPED_LIMIT or zero > ZERO_LIMIT:
            found[path] = f"{clipped:.1%} of its weights are clipped, {zero:.1%} are zero"
    for path, what in found.items():
        if allowed is not None and path not in allowed:
            scale = scales[path].detach().abs()
            raise ValueError(
                f"the scale of layer {path!r} has collapsed: {what}, scale {float(scale.min()):.3g} to "
                f"{float(scale.max()):.3g}. Lower scale_lr_factor or strength, or give it more bits with "
                f"overrides={{{path!r}: {{'bits': 8}}}}"
            )
    return frozenset(found)


def warn_without_validation(hold: Hold | None, validates: bool) -> None:
    """Say where a hold waits for a metric that nothing finds.

    Args:
        hold: the criterion.
        validates: whether the fit has a validation.

    Warns:
        UserWarning: for `lq.HoldOnPlateau` in a fit without one.
    """
    if isinstance(hold, HoldOnPlateau) and not validates:
        rank_zero_warn(
            f"HoldOnPlateau({hold.monitor!r}) looks at its metric behind each validation, and this fit has none: give "
            "it a validation set, or use HoldAtStep or HoldAtAlignment"
        )


def warn_of_other_schedule(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Say where a fit goes on under other settings than it began with: neither schedule is then what it trains by.

    Args:
        saved: settings of the schedule in the checkpoint; those that a later version has beside them are passed over.
        present: of the callback.
    """
    if changes := differences(saved, present):
        rank_zero_warn(
            f"the fit goes on under another schedule than it began with, {changes}: give the callback the "
            "checkpoint's values for the fit that was interrupted"
        )
