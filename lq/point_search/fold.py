"""Move scale between layers without changing what the network computes: batch-norm folding and equalization."""

from collections import Counter
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lq.nn import is_transposed, operator_weight, uses_own_weight
from lq.nn.capped import CappedReLU
from lq.point_search.graph import Chain

__all__ = ["equalize", "fold_batch_norms"]

_ROUNDS = 20


@torch.no_grad()
def fold_batch_norms(model: nn.Module, chains: Mapping[str, Chain]) -> dict[str, str]:
    """Move the factor ``|gamma| / sqrt(var + eps)`` of each batch norm into the layer before it, in place.

    The batch norm keeps its shift; its statistics become those of the new output, so that it still is the same network
    in training mode and after its statistics are estimated anew.

    Args:
        model: in evaluation mode.
        chains: from `lq.point_search.graph.trace_chains`.

    Returns:
        Path of each layer before a batch norm to "" where it was folded, else to the reason why not.

    Source: Jacob et al., Quantization and Training for Integer-Arithmetic-Only Inference, CVPR 2018, section 3.2.
    """
    done, uses = {}, _uses(model)
    for path, chain in chains.items():
        if chain.norm is None:
            continue
        layer, norm = model.get_submodule(path), model.get_submodule(chain.norm)
        done[path] = _fold(layer, norm, uses)
    return done


def _fold(layer: nn.Module, norm: nn.Module, uses: Counter[int]) -> str:
    bn = cast(nn.BatchNorm2d, norm)
    if bn.running_mean is None or bn.running_var is None:
        return "its batch norm keeps no statistics"
    if not _plain(layer, uses) or any(uses[id(p)] != 1 for p in bn.parameters()):
        return "it is transposed, computes its weight, or shares parameters"
    gamma = bn.weight if bn.weight is not None else torch.ones_like(bn.running_mean)
    target = gamma.double().square() - bn.eps  # variance after folding: the batch norm then multiplies by the sign
    alive = target > 0  # a channel that is as good as switched off stays as it is
    factor = gamma.double().abs() / (bn.running_var.double() + bn.eps).sqrt()
    factor = torch.where(alive, factor, torch.ones_like(factor))
    _multiply(layer, factor)
    bn.running_mean.mul_(factor)
    bn.running_var.copy_(torch.where(alive, target, bn.running_var.double()))
    return ""


def _multiply(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the outputs of a layer."""
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    weight.mul_(factor.to(weight).reshape(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.mul_(factor.to(bias))


@torch.no_grad()
def equalize(model: nn.Module, chains: Mapping[str, Chain]) -> dict[str, str]:
    """Even out the ranges of pairs of layers with a ReLU or ReLU6 between them, channel by channel, in place::

        s_i = sqrt(r1_i * r2_i) / r2_i      W1_i /= s_i,  b1_i /= s_i,  W2_i *= s_i      r = largest magnitude

    repeated over all pairs until nothing moves. A ReLU6 becomes a ReLU capped at ``6 / s_i``, so that the network
    computes what it did.

    Args:
        model: in evaluation mode, its batch norms folded.
        chains: from `lq.point_search.graph.trace_chains`.

    Returns:
        Path of each first layer to "" where it was equalized with the next, else to the reason why not.

    Source: Nagel et al., Data-Free Quantization, ICCV 2019, section 4.1.
    """
    done, pairs, uses = {}, [], _uses(model)
    for path, chain in chains.items():
        first = model.get_submodule(path)
        if chain.relu is None or chain.next_layer is None:
            done[path] = "no ReLU leads from it to one layer alone"
            continue
        second = model.get_submodule(chain.next_layer)
        norm = None if chain.norm is None else model.get_submodule(chain.norm)
        done[path] = _obstacle(first, second, norm, chain, uses)
        if not done[path]:
            pairs.append((first, second, chain, torch.ones(cast(Tensor, first.weight).shape[0], dtype=torch.float64)))
    for _ in range(_ROUNDS):
        moved = 0.0
        for first, second, chain, total in pairs:
            scale = _pair_scale(first, second)
            moved = max(moved, float((scale.log().abs()).max()))
            _multiply(first, 1 / scale)
            _multiply_inputs(second, scale)
            total.mul_(scale.cpu())
            if chain.norm is not None:
                _divide_norm(cast(nn.BatchNorm2d, model.get_submodule(chain.norm)), scale)
        if moved < 1e-3:
            break
    for first, _, chain, total in pairs:
        if chain.cap != float("inf"):
            _cap_at(model, cast(str, chain.relu), (chain.cap / total).to(cast(Tensor, first.weight)))
    return done


def _plain(layer: nn.Module, uses: Counter[int]) -> bool:
    """Whether the weight is the layer's alone and goes to the operator as it is, output channels first."""
    if not isinstance(layer.weight, nn.Parameter) or parametrize.is_parametrized(layer) or is_transposed(layer):
        return False
    own = uses_own_weight(type(layer)) or operator_weight(layer) is layer.weight
    return own and all(uses[id(p)] == 1 for p in layer.parameters(recurse=False))


def _uses(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def _obstacle(first: nn.Module, second: nn.Module, norm: nn.Module | None, chain: Chain, uses: Counter[int]) -> str:
    if not (_plain(first, uses) and _plain(second, uses)):
        return "a layer of the pair is transposed, computes its weight, or shares parameters"
    if norm is not None and (
        getattr(norm, "running_mean", None) is None or any(uses[id(p)] != 1 for p in norm.parameters())
    ):
        return "the batch norm between them keeps no statistics, or shares parameters"
    if chain.cap != float("inf") and isinstance(first, nn.Linear):
        return "its ReLU6 may have its channels on any axis"
    if _inputs(second).shape[0] != cast(Tensor, first.weight).shape[0]:
        return "the next layer takes another number of channels"
    if chain.cap != float("inf") and not chain.relu:
        return "its ReLU6 is a call of a function and cannot get a cap per channel"
    return ""


def _inputs(layer: nn.Module) -> Tensor:
    """The weight with one row per input channel."""
    weight, groups = cast(Tensor, layer.weight), getattr(layer, "groups", 1)
    view = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return view.permute(0, 2, 1, 3).reshape(groups * weight.shape[1], -1)


def _pair_scale(first: nn.Module, second: nn.Module) -> Tensor:
    weight = cast(Tensor, first.weight)
    out, into = weight.flatten(1).abs().amax(1).double(), _inputs(second).abs().amax(1).double()
    scale = (out * into).sqrt() / into
    usable = (out > 0) & (into > 0)
    return torch.where(usable, scale, torch.ones_like(scale))


def _multiply_inputs(layer: nn.Module, factor: Tensor) -> None:
    weight, groups = cast(Tensor, layer.weight), getattr(layer, "groups", 1)
    each = factor.to(weight).reshape(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    weight.copy_((weight.reshape(groups, -1, *weight.shape[1:]) * each).reshape(weight.shape))


def _divide_norm(bn: nn.BatchNorm2d, scale: Tensor) -> None:
    """A folded batch norm behind a layer whose outputs were divided: its shift is divided, too."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    bn.running_mean.div_(scale.to(bn.running_mean))
    if bn.bias is not None:
        bn.bias.div_(scale.to(bn.bias))
    # in evaluation nothing else changes; in training gamma must follow the output, and the variance gamma
    variance = (bn.running_var.double() + bn.eps) / scale.double().square() - bn.eps
    follows = (variance > 0) if bn.weight is not None else torch.zeros_like(variance, dtype=torch.bool)
    bn.running_var.copy_(torch.where(follows, variance, bn.running_var.double()))
    if bn.weight is not None:
        bn.weight.div_(torch.where(follows, scale, torch.ones_like(scale)).to(bn.weight))


def _cap_at(model: nn.Module, path: str, cap: Tensor) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, CappedReLU(cap))
