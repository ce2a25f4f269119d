"""What a step of a traced network is, told by its module, its target and its arguments."""

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lq.nn import sizes

__all__ = [
    "in_place",
    "is_drop_path",
    "is_global_mean",
    "pads_channels",
    "passes_on",
    "slice_strides",
    "window",
]


def passes_on(seen: tuple[Any, ...], result: Tensor) -> bool:
    """Whether a layer passes on what its operator gave, as it is."""
    again = F.linear(*seen) if len(seen) == 3 else F.conv2d(*seen) if seen[1].dim() == 4 else None
    return again is None or (again.shape == result.shape and torch.equal(again, result))


def in_place(n: fx.Node, module: nn.Module | None) -> bool:
    """Whether a step changes what it takes."""
    named = n.target in ("relu_", "add_", operator.iadd)
    return named or bool(getattr(module, "inplace", False)) or bool(n.kwargs.get("inplace", False))


def is_drop_path(module: nn.Module | None) -> bool:
    """Whether a module drops whole samples in training, and does nothing else."""
    return type(module).__name__ == "DropPath"


def is_global_mean(n: fx.Node, module: nn.Module | None) -> bool:
    """Whether a step averages over all rows and columns."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    if n.target not in ("mean", torch.mean):
        return False
    dims = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None)
    return isinstance(dims, tuple | list) and sorted(cast(int, d) % 4 for d in dims) == [2, 3]


def slice_strides(index: Any) -> tuple[int, int] | None:
    """Strides of ``x[:, :, ::s, ::t]``, None for any other index."""
    if not isinstance(index, tuple) or len(index) != 4 or not all(isinstance(i, slice) for i in index):
        return None
    if any(i.start is not None or i.stop is not None for i in index) or any(i.step not in (None, 1) for i in index[:2]):
        return None
    return index[2].step or 1, index[3].step or 1


def pads_channels(n: fx.Node) -> bool:
    """Whether a padding adds zero channels and nothing else."""
    sides: Any = n.args[1] if len(n.args) > 1 else None
    if not isinstance(sides, tuple | list) or len(sides) != 6 or any(sides[:4]) or min(sides) < 0:
        return False
    how = n.kwargs.get("mode", "constant"), n.kwargs.get("value")
    return how in (("constant", None), ("constant", 0))


def window(module: nn.Module) -> dict[str, Any]:
    """Kernel, stride and padding of a pooling module."""
    layer = cast(Any, module)
    return {"kernel": sizes(layer.kernel_size), "stride": sizes(layer.stride), "padding": sizes(layer.padding)}
