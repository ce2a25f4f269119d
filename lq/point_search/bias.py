"""Correct the mean that weight quantization adds to the outputs of a layer."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lq.nn import QuantLayer, SubstituteWeight
from lq.point_search.graph import Chain
from lq.point_search.inputs import Batches, Forward, run, watching

__all__ = ["correct_biases", "mean_inputs"]


def mean_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, forward: Forward | None = None
) -> dict[str, Tensor]:
    """Mean input of each layer over the batches, position by position.

    Args:
        model: in evaluation mode.
        layers: path to layer.
        batches: on the model's device, all inputs of one size.
        forward: runs the model on a batch.

    Returns:
        Path to a batch of one.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(path: str, layer: nn.Module, x: Tensor) -> None:
        total = x.detach().double().sum(0, keepdim=True)
        if path in sums and sums[path].shape != total.shape:
            raise ValueError(
                f"batches must hold inputs of one size for bias_correction, {path} got {tuple(total.shape[1:])} and "
                f"{tuple(sums[path].shape[1:])}: resize them, or turn bias_correction off"
            )
        sums[path] = sums.get(path, torch.zeros_like(total)) + total
        counts[path] = counts.get(path, 0) + len(x)

    with watching(layers, see):
        run(model, batches, forward)
    return {path: (total / counts[path]).to(_dtype(layers[path])) for path, total in sums.items()}


def _dtype(layer: nn.Module) -> torch.dtype:
    return cast(Tensor, layer.weight).dtype


@torch.no_grad()
def correct_biases(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    weights: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    chains: Mapping[str, Chain],
) -> list[str]:
    """Take ``E[Q(W) x] - E[W x] = (Q(W) - W) E[x]`` from the bias of each layer, in place.

    It goes into the running mean of the batch norm that follows, else into the bias, which is made where there is none.

    Args:
        model: with quantized layers, their weights rounded in whatever way.
        layers: path to layer.
        weights: path to float weight, as it arrived at the operator.
        means: mean inputs of the float network.
        chains: from `lq.point_search.graph.trace_chains`.

    Returns:
        Paths of the layers that were corrected.

    Source: Nagel et al., Data-Free Quantization, ICCV 2019, section 4.2, with measured means in place of analytic ones.
    """
    done = []
    for path, layer in layers.items():
        if path not in means:
            continue
        error = layer.quantized_weight() - weights[path]
        shift = _output(layer, means[path], error)
        shift = shift - _output(layer, means[path], torch.zeros_like(error))  # the bias, which every output holds
        axis = -1 if isinstance(layer, nn.Linear) else 1
        shift = shift.movedim(axis, 0).flatten(1).mean(1)
        norm: Any = model.get_submodule(cast(str, chains[path].norm)) if path in chains and chains[path].norm else None
        bias = cast(Any, layer).bias
        if norm is not None and norm.running_mean is not None:
            norm.running_mean.add_(shift)
        elif bias is not None:
            bias.sub_(shift)
        else:
            layer.bias = nn.Parameter(-shift)
        done.append(path)
    return done


def _output(layer: QuantLayer, x: Tensor, weight: Tensor) -> Tensor:
    with SubstituteWeight(weight.shape, lambda _: weight):
        return layer.float_class.forward(layer, x)
