"""What a bias and a batch norm do to the output of a layer, as one gain and one shift per channel."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lq.nn import QuantLayer, is_transposed, uses_own_weight
from lq.point_search.graph import trace_chains

__all__ = ["affine", "fold_away"]


def affine(layer: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Gain and shift of bias and batch norm together: ``y = gain * (W x) + shift``.

    Args:
        layer: a convolution or linear layer.
        norm: the batch norm that follows it, or None.

    Returns:
        float64, shape ``(O,)`` or ``(1,)``.
    """
    bias = cast(Tensor | None, layer.bias)
    shift = torch.zeros(1, dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    if norm is None:
        return torch.ones(1, dtype=torch.float64), shift
    bn = cast(nn.BatchNorm2d, norm)
    mean, variance = (cast(Tensor, t).double().cpu() for t in (bn.running_mean, bn.running_var))
    gain = 1 / (variance + bn.eps).sqrt()
    if bn.weight is not None:
        gain = gain * bn.weight.detach().double().cpu()
    added = 0.0 if bn.bias is None else bn.bias.detach().double().cpu()
    return gain, (shift - mean) * gain + added


def _plain(layer: QuantLayer) -> bool:
    """Whether a class only pads its input or computes its weight around the operator, output channels first."""
    kind = layer.float_class
    return not is_transposed(layer) and (uses_own_weight(kind) or kind.__module__.startswith("timm.layers"))


@torch.no_grad()
def _rows(model: nn.Module, linear: list[str], x: Tensor) -> set[str]:
    """Those of the linear layers that act on more than one vector of each input."""
    found: set[str] = set()

    def look(path: str) -> Any:
        return lambda _, given, result: found.add(path) if result.dim() > 2 else None  # what is returned would replace

    handles = [model.get_submodule(path).register_forward_hook(look(path)) for path in linear]
    try:
        if linear:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def fold_away(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Remove the batch norms that follow quantized layers, in place.

    Their shift becomes the layer's bias.

    Args:
        model: in evaluation mode.
        x: what it takes, to see where channels are.

    Returns:
        Path of each layer to the gain that its weight has yet to be multiplied by, float64 ``(O,)``.
    """
    chains = trace_chains(model)[0]
    normed = [p for p, chain in chains.items() if chain.norm and isinstance(model.get_submodule(p), nn.Linear)]
    gains, rows = {}, _rows(model, normed, x)
    for path, chain in chains.items():
        layer = model.get_submodule(path)
        if path in rows:  # a norm behind such a layer has its channels on another axis
            continue
        if chain.norm is None or not isinstance(layer, QuantLayer) or not _plain(layer):
            continue
        norm = model.get_submodule(chain.norm)
        if getattr(norm, "running_mean", None) is None:
            continue
        gains[path], shift = affine(layer, norm)
        layer.bias = nn.Parameter(shift.to(cast(Tensor, layer.weight)).expand(len(gains[path])).clone())
        parent, _, name = chain.norm.rpartition(".")
        setattr(model.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
    return gains
