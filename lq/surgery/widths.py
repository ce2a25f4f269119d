"""Other widths for layers that are quantized already: ends found late, stages of a fit."""

from collections.abc import Mapping, Sequence

from torch import nn

from lq.nn import QuantLayer, named_quantized_layers
from lq.quantizers import (
    PointQuantizer,
    Quantizer,
    WeightNormalizer,
    build_activation_quantizer,
    build_weight_quantizer,
)
from lq.spec import POINT_QUANTIZERS, LayerSpec, QuantSpec
from lq.surgery.plan import make_plan
from lq.surgery.report import SwapReport
from lq.surgery.swap import swap_report

__all__ = ["reassign_ends", "set_widths"]


def reassign_ends(model: nn.Module, spec: QuantSpec, order: Sequence[str]) -> SwapReport:
    """Give the first and last block by execution order the width that registration order gave to others.

    Changes code ranges and resets the weight scales of the layers concerned, in place: no parameter is replaced, so an
    optimizer that exists stays valid.

    Args:
        model: a quantized model.
        spec: the spec it was quantized with.
        order: paths in execution order.

    Returns:
        The new report.
    """
    plan = make_plan(model, spec, order)
    set_widths(model, plan.specs)
    return swap_report(plan)


def set_widths(model: nn.Module, specs: Mapping[str, LayerSpec], *, calibrate: bool = True) -> None:
    """Change the code ranges of quantized layers to those of other specs, in place, resetting scales that change.

    Args:
        model: a quantized model.
        specs: path to spec; they must agree with the present ones in all but the widths and what follows from them.
        calibrate: whether to set the new levels from the weights; False where a file will bring them.
    """
    rebuilt: dict[Quantizer, Quantizer] = {}
    normalizers: dict[Quantizer, WeightNormalizer | None] = {}
    for path, layer in named_quantized_layers(model).items():
        new, old = specs[path], layer.layer_spec
        if new == old:
            continue
        assert isinstance(old, LayerSpec)
        layer.layer_spec = new  # type: ignore[assignment]
        points = new.quantizer != old.quantizer or old.quantizer in POINT_QUANTIZERS or _has_points(layer)
        codes = layer.weight_quantizer.codes
        if not points:
            layer.weight_quantizer.adopt_(new)
        if new.normalized != old.normalized:
            layer.normalize_(new.normalized)
            if new.normalized:  # of layers that share their weight one
                shared = normalizers.setdefault(layer.weight_quantizer, layer.weight_normalizer)
                layer.weight_normalizer = shared
        if points:
            _rebuild(layer, new, rebuilt, calibrate)
            continue
        if calibrate and codes != new.weight_codes:
            layer.weight_quantizer.calibrate_(layer.float_weight(bounded=False), new.scale_init)
        if layer.input_quantizer is not None:
            layer.input_quantizer.set_ranges_(new.activation_codes)


def _has_points(layer: QuantLayer) -> bool:
    """Whether buffers of its quantizers, of another package's, too, are as large as a width makes them."""
    inputs = layer.input_quantizer
    each = [layer.weight_quantizer, *([] if inputs is None else [inputs.quantizer])]
    return any(isinstance(quantizer, PointQuantizer) for quantizer in each)


def _rebuild(layer: QuantLayer, spec: LayerSpec, rebuilt: dict[Quantizer, Quantizer], calibrate: bool) -> None:
    """New quantizers around the old scales, which an optimizer may hold: other points need other buffers."""
    old, weight = layer.weight_quantizer, layer.float_weight(bounded=False)
    if old not in rebuilt:
        new = build_weight_quantizer(spec, old.layout, weight.numel())
        _keep_scale(new, old)
        rebuilt[old] = new.to(weight.device).train(old.training)
        if calibrate:
            new.calibrate_(weight, spec.scale_init)
    layer.weight_quantizer = rebuilt[old]
    inputs = build_activation_quantizer(spec)
    if inputs is not None and layer.input_quantizer is not None:
        _keep_scale(inputs.quantizer, layer.input_quantizer.quantizer)
        layer.input_quantizer = inputs.to(weight.device).train(old.training)


def _keep_scale(new: Quantizer, old: Quantizer) -> None:
    """What is learned and has the same name and shape stays the same parameter."""
    kept = dict(old.named_parameters())
    for name, parameter in list(new.named_parameters()):
        if name in kept and kept[name].shape == parameter.shape:
            if type(new) is not type(old):
                kept[name].requires_grad_(parameter.requires_grad)
            setattr(new, name, kept[name])
