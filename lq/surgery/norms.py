"""Which batch norm stands behind which layer, for quantizers whose levels follow what it will be folded into."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lq.nn import BATCH_NORMS, named_quantized_layers
from lq.quantizers import MinMaxQuantizer

__all__ = ["any_folded", "find_norms", "follow_norms", "follow_norms_of_run", "refold"]


def find_norms(model: nn.Module, run: Callable[[], Any]) -> dict[str, str]:
    """Batch norms that take the very output of a quantized layer.

    Args:
        model: a quantized model.
        run: runs the model on an example.

    Returns:
        Path of each such layer to the path of its batch norm; without layers that several batch norms follow.
    """
    outputs: dict[int, tuple[str, Tensor, Tensor]] = {}  # kept: no later tensor may take the number of an earlier one
    found: dict[str, set[str]] = {}

    def leaves(path: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[id(output)] = (path, output, output.detach().clone())

        return look

    def arrives(path: str) -> Any:
        def look(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            layer, _, values = outputs.get(id(inputs[0]), ("", None, None)) if inputs else ("", None, None)
            if values is not None and torch.equal(values, inputs[0]):  # nothing has changed it in place
                found.setdefault(layer, set()).add(path)

        return look

    norms = {path: m for path, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
    handles = [m.register_forward_hook(leaves(path)) for path, m in named_quantized_layers(model).items()]
    handles += [m.register_forward_pre_hook(arrives(path)) for path, m in norms.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {layer: next(iter(own)) for layer, own in found.items() if len(own) == 1}


def follow_norms(model: nn.Module, pairs: Mapping[str, str], *, calibrate: bool = True) -> None:
    """Let the scales of layers whose spec says ``fold_norms`` follow their batch norms, in place.

    Args:
        model: a quantized model.
        pairs: from `find_norms`.
        calibrate: whether to set the scales anew from the weights; False where a checkpoint brought them.
    """
    layers = named_quantized_layers(model)
    users = Counter(id(layer.weight_quantizer) for layer in layers.values())
    for path, layer in layers.items():
        quantizer = layer.weight_quantizer
        if path not in pairs or not isinstance(quantizer, MinMaxQuantizer) or not quantizer.folded:
            continue
        if users[id(quantizer)] > 1:  # tied weights have one scale, and each its own batch norm
            continue
        quantizer.follow(model.get_submodule(pairs[path]))
    if calibrate:
        refold(model)


def follow_norms_of_run(model: nn.Module, run: Callable[[], Any]) -> None:
    """Find the batch norms that levels follow where a spec says ``fold_norms``, and let them follow, in place.

    Args:
        model: a quantized model.
        run: runs the model on an example; not called where no levels follow.
    """
    if any_folded(model):
        follow_norms(model, find_norms(model, run))


def any_folded(model: nn.Module) -> bool:
    """Whether the spec of some layer says ``fold_norms``."""
    own = (layer.weight_quantizer for layer in named_quantized_layers(model).values())
    return any(isinstance(quantizer, MinMaxQuantizer) and quantizer.folded for quantizer in own)


def refold(model: nn.Module) -> None:
    """Set scales that follow a batch norm anew, in place, where its statistics have changed since.

    Args:
        model: a quantized model; others than those of `follow_norms` are left alone.
    """
    for layer in named_quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, MinMaxQuantizer) and quantizer.follows:
            quantizer.calibrate_(layer.float_weight(bounded=False))
