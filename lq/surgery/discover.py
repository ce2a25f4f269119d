"""Find every convolution and linear layer of a model, and say of each whether it can be quantized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchmetrics import Metric

from lq.nn import LAYER_TYPES, FixedWeight, QuantLayer, operator_weight, uses_own_weight

__all__ = ["Found", "execution_order", "find_layers"]

_NO_MATRIX = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)  # lookups and factors, not products


@dataclass(frozen=True)
class Found:
    """A layer that holds a weight matrix or kernel.

    Args:
        path: its first path.
        module: the layer.
        obstacle: why it cannot be quantized; empty where it can.
    """

    path: str
    module: nn.Module
    obstacle: str = ""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its float class and the bases of that, for ``type:`` globs."""
        float_class = self.module.float_class if isinstance(self.module, QuantLayer) else type(self.module)
        return tuple(c.__name__ for c in float_class.__mro__ if c not in (nn.Module, object))


def find_layers(model: nn.Module) -> list[Found]:
    """Every layer of a model that holds a weight matrix or kernel, each once, in registration order.

    Args:
        model: any module.

    Returns:
        The layers, with obstacles named.

    >>> [(f.path, f.obstacle) for f in find_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Bilinear(2, 2, 2)))]
    [('0', ''), ('2', 'Bilinear is no convolution or linear layer')]
    """
    found = []
    bypassed = _bypassed_children(model)
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):
            found.append(Found(path, module, bypassed.get(id(module)) or _obstacle(module)))
        elif isinstance(module, nn.MultiheadAttention):
            found.append(
                Found(path, module, "MultiheadAttention multiplies by its weights without calling its children")
            )
        elif _holds_matrix(module):
            found.append(Found(path, module, f"{type(module).__name__} is no convolution or linear layer"))
    return found


def _bypassed_children(model: nn.Module) -> dict[int, str]:
    """Layers that are not called as layers of the network: parents that read weights, networks inside metrics."""
    reason = "its parent MultiheadAttention reads this weight without calling the layer"
    found = {id(m.out_proj): reason for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    metrics = [m for m in model.modules() if isinstance(m, Metric)]
    return found | {id(layer): "it belongs to a metric" for metric in metrics for layer in metric.modules()}


def _holds_matrix(module: nn.Module) -> bool:
    if isinstance(module, _NO_MATRIX):
        return False
    own = module.named_parameters(recurse=False)
    return any(name.startswith("weight") and p.dim() >= 2 for name, p in own if not nn.parameter.is_lazy(p))


def _obstacle(module: nn.Module) -> str:
    if isinstance(module, QuantLayer):
        return "already quantized"
    if isinstance(module, FixedWeight):
        return "its weight was quantized and fixed by dequantize_model"
    weight = cast(Tensor, module.weight)
    if nn.parameter.is_lazy(weight):
        return "its shape is not known yet: run one batch through the model first"
    if weight.is_meta:
        return "its weight is on the meta device: materialize the model first"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if not isinstance(weight, nn.Parameter) and not parametrize.is_parametrized(module, "weight"):
        return "its weight is no parameter: use torch.nn.utils.parametrizations in place of hooks that set it"
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight of {type(module).__name__} holds NaN or infinite values: load a finite model")
    if not uses_own_weight(type(module)):
        try:
            operator_weight(module)
        except Exception as error:  # a forward of unknown code: whatever it raises is the reason
            return f"cannot run its own forward on a probe input: {error}"
    return ""


def execution_order(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Paths of the layers in the order in which they are first called.

    Args:
        model: any module.
        run: runs the model on an example.

    Returns:
        Paths of the layers that were called.
    """
    order: dict[str, None] = {}
    handles = [
        f.module.register_forward_pre_hook(lambda *_, path=f.path: order.setdefault(path)) for f in find_layers(model)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def run_example(model: nn.Module, example: Any) -> None:
    """Run a model on an example in evaluation mode, leaving its mode as it was.

    Args:
        model: any module.
        example: one argument, a tuple of arguments or a mapping of keyword arguments.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*example if isinstance(example, tuple) else (example,))
    finally:
        for module, mode in modes:
            module.training = mode
