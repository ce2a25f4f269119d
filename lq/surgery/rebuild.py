"""Make a float model what a stored one was, but for the values that the file will bring."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lq.nn import CappedReLU, fix_weight, is_transposed
from lq.spec import LayerSpec
from lq.surgery.discover import Found
from lq.surgery.plan import REGISTRATION, Plan, PlannedLayer
from lq.surgery.swap import apply_plan, layer_specs

__all__ = ["caps_and_biases", "rebuild", "restore_parts"]


def rebuild(
    model: nn.Module,
    layers: Mapping[str, LayerSpec],
    *,
    caps: Mapping[str, int] | None = None,
    biases: Sequence[str] = (),
    fixed: Sequence[str] = (),
) -> None:
    """Quantize the layers of a float model as their specs say, in place and without looking at any value.

    Args:
        model: float, on any device, the meta device included.
        layers: path to spec of every quantized layer.
        caps: path to number of channels of every `lq.nn.CappedReLU`.
        biases: paths of the layers that have a bias.
        fixed: paths of the layers whose class computes its weight and that shall hold the computed one.

    Raises:
        ValueError: where the model has no such layers.
    """
    modules = dict(model.named_modules())
    missing = sorted({*layers, *fixed} - modules.keys())
    if missing:
        raise ValueError(f"the model must have the layers that were stored, got one without {missing}: build the same")
    for path in fixed:
        fix_weight(modules[path])
    planned = tuple(PlannedLayer(Found(path, modules[path]), spec, "") for path, spec in layers.items())
    apply_plan(model, Plan(planned, REGISTRATION), lambda *_: None)
    restore_parts(model, caps or {}, biases)


def restore_parts(model: nn.Module, caps: Mapping[str, int], biases: Sequence[str]) -> None:
    """Add what a search adds to a network: caps of rescaled ReLU6, biases.

    Args:
        model: a quantized model.
        caps: path to number of channels.
        biases: paths of the layers that have a bias.
    """
    for path, channels in caps.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, CappedReLU(torch.ones(channels)))
    for path in biases:
        layer = model.get_submodule(path)
        if layer.bias is None:
            weight = cast(Tensor, layer.weight)
            channels = weight.shape[1] * cast(int, layer.groups) if is_transposed(layer) else weight.shape[0]
            layer.bias = nn.Parameter(weight.new_zeros(channels))


def caps_and_biases(model: nn.Module) -> tuple[dict[str, int], list[str]]:
    """What `restore_parts` needs to know of a quantized model.

    Args:
        model: a quantized model.

    Returns:
        Its caps and its layers with biases.
    """
    caps = {path: module.cap.numel() for path, module in model.named_modules() if isinstance(module, CappedReLU)}
    return caps, [path for path in layer_specs(model) if model.get_submodule(path).bias is not None]
