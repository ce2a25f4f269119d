"""Accumulators of limited width: which layers could overflow, and scales that make sure that none can."""

import copy
from typing import Any

import torch
from torch import nn

from lq.exporting.graph import in_float32
from lq.exporting.integer import IntegerNetwork
from lq.exporting.lower import LayerPlan, accumulator_bounds, layer_weights
from lq.nn import QuantLayer

__all__ = ["check_accumulators", "repair_accumulators"]

_STEP = 1.02
_MOST = 600


def check_accumulators(network: IntegerNetwork, bits: int) -> None:
    """Refuse a network whose accumulators could overflow.

    Args:
        network: the integer network.
        bits: width of the accumulators.

    Raises:
        ValueError: naming every layer that could, and the width it needs.
    """
    over = {p.path: _worst(p) for p in network.layers if _worst(p) > _limit(bits)}
    if over:
        named = ", ".join(f"{path} ({worst.bit_length() + 1} bits)" for path, worst in over.items())
        raise ValueError(
            f"accumulators must fit in {bits} bits for every input, these could need more: {named}. Set "
            "overflow=repair to raise their scales, or accumulator_bits=32; lq.IntegerNetwork(model, shape, "
            f"accumulator_bits={bits}) shows what wrapping around would do"
        )


@torch.no_grad()
def repair_accumulators(model: nn.Module, shape: tuple[int, ...], bits: int) -> dict[str, float]:
    """Raise the weight scales of the layers that could overflow, channel by channel, until none can, in place.

    Larger scales mean smaller integers for the same weights. The weights are rounded anew onto the coarser levels.

    Args:
        model: a quantized model.
        shape: of one input, ``(C, H, W)``.
        bits: width of the accumulators.

    Returns:
        Path of each layer that was changed to the largest factor on its scales.

    Raises:
        ValueError: where a channel would lose all of its weights; all layers are as they were then.

    Source: after Xie et al., Overflow Aware Quantization, IJCAI 2020, whose range factor is learned.
    """
    changed, starts = dict[str, float](), list[tuple[nn.Module, dict[str, Any]]]()
    for plan in IntegerNetwork(model, shape).layers:
        layer = model.get_submodule(plan.path)
        assert isinstance(layer, QuantLayer)
        quantizer = layer.weight_quantizer
        start, scale = copy.deepcopy(quantizer.state_dict()), quantizer.scale
        starts.append((quantizer, start))
        worst = plan.bounds.abs().amax(0)
        alive, over = worst > 0, worst > _limit(bits)
        for _ in range(_MOST):
            codes, table, _unit = layer_weights(in_float32(layer), plan.path)  # as the integer network has them
            worst = accumulator_bounds(table.value[codes.long()], plan.takes.range).abs().amax(0)
            over = worst > _limit(bits)
            if not bool(over.any()) or bool((alive & (worst == 0)).any()):
                break
            factors = torch.where(over, _STEP, 1.0) if scale.numel() == len(over) else torch.tensor([_STEP])
            quantizer.coarsen_(factors.to(scale))
        if bool(over.any()) or bool((alive & (worst == 0)).any()):
            for one, state in reversed(starts):  # of a quantizer that layers share the first
                one.load_state_dict(state)
            raise ValueError(f"{plan.path}: no scale makes its accumulators fit in {bits} bits: allow more bits")
        if not torch.equal(scale, start["scale"]):
            changed[plan.path] = float((scale / start["scale"]).max())
    return changed


def _worst(plan: LayerPlan) -> int:
    return int(plan.bounds.abs().max())


def _limit(bits: int) -> int:
    return 2 ** (bits - 1) - 1
