"""Better than rounding to nearest: error feedback and reconstruction over a whole network."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lq.functional.feedback import error_feedback
from lq.functional.lookup import take
from lq.functional.points import nearest_point
from lq.nn import QuantLayer
from lq.point_search.blocks import BlockData, find_blocks
from lq.point_search.inputs import Batches, Forward
from lq.point_search.reconstruct import reconstruct_block
from lq.point_search.report import BlockResult
from lq.point_search.store import Store
from lq.search_spec import SearchSpec

__all__ = ["feed_back", "obstacles", "reconstruct"]


def obstacles(model: nn.Module, layers: Mapping[str, QuantLayer]) -> dict[str, str]:
    """Why the weights of layers cannot be replaced by levels.

    Args:
        model: that holds the layers, and whatever else may hold their weights.
        layers: path to layer.

    Returns:
        Path to the reason, "" where there is none.
    """
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {path: _obstacle(layer, uses) for path, layer in layers.items()}


def _obstacle(layer: QuantLayer, uses: Counter[int]) -> str:
    if layer.transforms_weight or layer.weight_normalizer is not None or not isinstance(layer.weight, nn.Parameter):
        return "it computes its weight from its parameter"
    if uses[id(layer.weight)] > 1:
        return "its weight is tied to another layer"
    return ""


@torch.no_grad()
def feed_back(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    products: Mapping[str, Tensor],
    *,
    progress: bool = True,
) -> dict[str, str]:
    """Round the weights of each layer with error feedback, in place: they become levels of their quantizers, or stay.

    Args:
        model: with quantized layers.
        layers: path to layer.
        products: from `lq.point_search.inputs.hessians`, of the float network: of one whose weights are all rounded to
            nearest they would be those of a network that may no longer work.
        progress: whether to show a progress bar.

    Returns:
        Path to "" where it was done, else to the reason why not.
    """
    done = obstacles(model, layers)
    for path, layer in tqdm(layers.items(), desc="error feedback", unit="layer", disable=not progress):
        if not done[path] and path not in products:
            done[path] = "it is transposed or three-dimensional, or the batches did not reach it"
        if done[path]:
            continue
        weight = cast(Tensor, layer.weight)
        groups = len(products[path])
        rows = weight.reshape(groups, weight.shape[0] // groups, -1)
        rounded = error_feedback(rows, products[path], _nearest(layer)).reshape(weight.shape)
        tolerance = 2 * torch.finfo(rounded.dtype).eps
        if torch.allclose(layer.weight_quantizer.hard(rounded), rounded, rtol=max(1e-4, tolerance)):
            weight.copy_(rounded)
        else:
            done[path] = "its quantizer does not leave a level where it is"
    return done


def _nearest(layer: QuantLayer) -> Callable[[Tensor], Tensor]:
    """Nearest level of one weight of each output channel, shape ``(groups, channels)`` to the same."""
    levels = layer.weight_quantizer.level_values()
    per_channel = levels.dim() == 2

    def quantize(column: Tensor) -> Tensor:
        flat = column.reshape(-1, 1) if per_channel else column.reshape(1, -1)
        index = nearest_point(flat, levels)
        return take(levels, index).reshape(column.shape)

    return quantize


def reconstruct(
    model: nn.Module,
    float_model: nn.Module,
    order: Sequence[str],
    batches: Batches,
    spec: SearchSpec,
    kept: tuple[Store, str],
    *,
    forward: Forward | None = None,
    progress: bool = True,
) -> list[BlockResult]:
    """Reconstruct a network block by block in order of execution, each on the outputs of those before it, in place.

    Args:
        model: with quantized layers, in evaluation mode.
        float_model: the same before quantization.
        order: paths of the quantized layers, in execution order.
        batches: on the model's device.
        spec: of the search.
        kept: where finished blocks are kept, and the hash of what they follow from.
        forward: runs the model on a batch.
        progress: whether to show a progress bar.

    Returns:
        One result per block.
    """
    layers = {path: cast(QuantLayer, model.get_submodule(path)) for path in order}
    blocks, refused = find_blocks(model, order), obstacles(model, layers)
    data = BlockData(model, float_model, list(blocks), batches, forward)
    store, digest = kept
    results = []
    bar = tqdm(total=len(blocks) * spec.reconstruct, desc="reconstructing", unit="step", disable=not progress)
    for path, inside in blocks.items():
        bar.set_postfix_str(path)
        block = model.get_submodule(path)
        stored = store.load(f"block-{path}", digest)
        if stored is not None:
            block.load_state_dict(stored[0])
            results.append(BlockResult(**{**stored[1], "layers": tuple(stored[1]["layers"])}))
            bar.update(spec.reconstruct)
            continue
        usable = {name: layers[name] for name in inside if not refused[name]}
        result = BlockResult(path, tuple(usable), skipped="no layer whose rounding can be learned")
        if usable:
            x, target = data.of(path)
            if x is None or target is None:
                result = BlockResult(path, tuple(usable), skipped="it does not turn one tensor into one, once")
            else:
                floats = {name: cast(Tensor, float_model.get_submodule(name).weight) for name in usable}
                before, after = reconstruct_block(block, usable, floats, x, target, spec, bar.update)
                result = BlockResult(path, tuple(usable), before, after)
        results.append(result)
        store.save(f"block-{path}", digest, block.state_dict(), result)
    bar.close()
    return results
