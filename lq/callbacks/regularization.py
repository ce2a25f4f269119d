"""The scale regularizer in training: its gradient beside the task's, whatever optimizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lq.callbacks.schedule import AnnealSpec
from lq.network import scale_regularizer
from lq.nn import named_quantized_layers

__all__ = ["add_regularizer", "check_regularizer"]


def check_regularizer(model: nn.Module, spec: AnnealSpec) -> None:
    """Refuse to pull what is on its level already.

    Args:
        model: a quantized model.
        spec: settings of the regularizer.

    Raises:
        ValueError: for ``regularizer_on="quantized"`` where no weight quantizer has a soft staircase.
    """
    if spec.regularizer is None or not spec.strength or spec.regularizer_on == "latent":
        return
    kinds = {type(layer.weight_quantizer) for layer in named_quantized_layers(model).values()}
    if not any(kind.softens for kind in kinds):
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(
            f"regularizer_on must be 'latent' for weight quantizers without a soft staircase, got "
            f"{spec.regularizer_on!r} with {', '.join(names)}: what they make of a weight is on a level already. Use "
            "'latent', or quantizer='soft'"
        )


def add_regularizer(
    model: nn.Module, groups: Sequence[dict[str, Any]], spec: AnnealSpec, factor: float
) -> Tensor | None:
    """Add the gradient of the scale regularizer to those of an optimizer's parameters, in place.

    Args:
        model: a quantized model.
        groups: the optimizer's parameter groups.
        spec: kind of the regularizer, and whether scales learn from it.
        factor: strength, times whatever scales the loss.

    Returns:
        The regularizer without the factor, or None where nothing of it learns here.
    """
    layers = named_quantized_layers(model).values()
    candidates = {id(p) for layer in layers for p in layer.parameters()}
    if not spec.regularizer_scale_gradient:
        candidates -= {id(p) for layer in layers for p in layer.weight_quantizer.parameters()}
    params = [p for group in groups for p in group["params"] if id(p) in candidates and p.requires_grad]
    if not params:
        return None
    kind, on = spec.regularizer or "nearest", spec.regularizer_on
    with torch.enable_grad():
        value = scale_regularizer(model, kind=kind, on=on, scale_gradient=spec.regularizer_scale_gradient)
        if not value.requires_grad:
            return None  # every quantized weight is frozen
        gradients = torch.autograd.grad(value, params, allow_unused=True)
    for parameter, gradient in zip(params, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(gradient.to(parameter.grad.dtype), alpha=factor)
    return value.detach()
