"""A convolutional network as a list of operations that integers can do, with everything about them resolved."""

import copy
import operator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lq.exporting.recognize import (
    in_place,
    is_drop_path,
    is_global_mean,
    pads_channels,
    passes_on,
    slice_strides,
    window,
)
from lq.nn import BATCH_NORMS, LAYER_TYPES, ObserveOperator, QuantLayer, relu_cap, same_padding, sizes
from lq.point_search.graph import LayerTracer

__all__ = ["Node", "UnsupportedError", "in_float32", "trace"]

_Module = TypeVar("_Module", bound=nn.Module)
_HELP = (
    "Integer engine and C take convolutions and linear layers, batch norms behind them, ReLU, ReLU6, additions, "
    "strided slices, zero channels, average and maximum pooling. Export target=onnx takes any network"
)


class UnsupportedError(ValueError):
    """A part of a network that an export cannot express; the message names it and what to do instead."""


@dataclass(frozen=True)
class Node:
    """One operation.

    Args:
        name: of its result.
        kind: "input", "layer", "relu", "add", "slice", "pad_channels", "average", "max" or "flatten".
        inputs: names of what it takes.
        shape: of its result for one image, without the batch.
        path: of the module, or the name of the operation.
        norm: path of the batch norm folded into a layer.
        settings: of a layer: ``padding`` (left, right, top, bottom), ``stride``, ``dilation``, ``groups``; of "relu":
            ``cap``, None or a tensor; of "slice": ``stride``; of "pad_channels": ``before`` and ``after``; of pooling:
            ``kernel``, ``stride``, ``padding``.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    path: str
    norm: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def in_float32(model: _Module) -> _Module:
    """A network in the precision in which integers are derived and runtimes compute.

    Args:
        model: in any precision.

    Returns:
        The network itself, or a copy where it has parameters or buffers of another precision.
    """
    floating = (t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    return model if {*floating} <= {torch.float32} else copy.deepcopy(model).float()


@torch.no_grad()
def trace(model: nn.Module, shape: tuple[int, ...]) -> list[Node]:
    """Follow a network from its input to its output.

    Args:
        model: quantized, in evaluation mode.
        shape: of one input, ``(C, H, W)``.

    Returns:
        The operations in the order they run; the last one is the output.

    Raises:
        UnsupportedError: for an operation that integers do not do here, naming it.
    """
    try:
        graph = LayerTracer().trace(model)
    except Exception as error:  # whatever a network's own code raises on symbolic inputs is the reason
        raise UnsupportedError(
            f"the network cannot be traced ({type(error).__name__}: {error}). Export target=onnx instead"
        ) from error
    runner = _Runner(fx.GraphModule(model, graph))
    device = next(model.parameters()).device
    try:
        runner.run(torch.rand(2, *shape, device=device) * 2 - 1)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"the network does not run on inputs of shape {shape}: {error}") from error
    return _needed(_fold_norms(runner.nodes), runner.returned)


class _Runner(fx.Interpreter):
    """Runs the network once and writes down what every step is."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # of the graph: errors here name the layer
        self.nodes: list[Node] = []
        self.returned = ""
        self.same: dict[str, str] = {}  # steps that change nothing, and what they pass on

    def run_node(self, n: fx.Node) -> Any:
        seen: list[tuple[Any, ...]] = []
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), LAYER_TYPES):
            with ObserveOperator(lambda args: seen.append(args)):
                result = super().run_node(n)
        else:
            result = super().run_node(n)
        self._note(n, result, seen)
        return result

    def _note(self, n: fx.Node, result: Any, seen: list[tuple[Any, ...]]) -> None:
        if n.op == "output":
            if not isinstance(n.args[0], fx.Node):
                raise UnsupportedError(f"the network must return one tensor, got {type(n.args[0]).__name__}. {_HELP}")
            self.returned = self.same.get(n.args[0].name, n.args[0].name)
            return
        inputs = tuple(self.same.get(a.name, a.name) for a in n.all_input_nodes)
        path = str(n.target) if n.op == "call_module" else n.name
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if not isinstance(result, Tensor) or (n.op == "placeholder" and self.nodes):
            raise UnsupportedError(f"{path}: the network must take and pass on single tensors. {_HELP}")
        if n.op == "placeholder":
            self._add(n, "input", (), result, path)
        elif isinstance(module, LAYER_TYPES):
            self._layer(n, module, inputs, result, seen)
        elif isinstance(module, BATCH_NORMS):
            self._norm(n, module, inputs, result, path)
        elif not self._elementwise(n, module, inputs, result, path) and not self._pool(n, module, inputs, result, path):
            what = type(module).__name__ if module is not None else getattr(n.target, "__name__", str(n.target))
            raise UnsupportedError(f"{path}: {what} has no integer form here. {_HELP}")

    def _add(self, n: fx.Node, kind: str, inputs: tuple[str, ...], result: Tensor, path: str, **settings: Any) -> None:
        self.nodes.append(Node(n.name, kind, inputs, tuple(result.shape[1:]), path, settings=settings))

    def _pass(self, n: fx.Node, inputs: tuple[str, ...]) -> None:
        self.same[n.name] = inputs[0]

    def _layer(
        self, n: fx.Node, module: nn.Module, inputs: tuple[str, ...], result: Tensor, seen: list[tuple[Any, ...]]
    ) -> None:
        path = str(n.target)
        if not isinstance(module, QuantLayer):
            raise UnsupportedError(f"{path}: {type(module).__name__} is not quantized: quantize it, or target=onnx")
        if (
            len(seen) != 1
            or result.dim() != (2 if isinstance(module, nn.Linear) else 4)
            or not passes_on(seen[0], result)
        ):
            raise UnsupportedError(f"{path}: {type(module).__name__} is not one product of images or vectors. {_HELP}")
        if isinstance(module, nn.Linear):
            self._add(n, "layer", inputs, result, path)
            return
        taken, _, _, stride, padding, dilation, groups = seen[0]
        if isinstance(module, nn.ConvTranspose2d) or not isinstance(module, nn.Conv2d):
            raise UnsupportedError(f"{path}: {type(module).__name__} has no integer form here. {_HELP}")
        given = self.env[n.all_input_nodes[0]]
        sides = _padding(module, given, taken, padding, path)
        conv = {"padding": sides, "stride": sizes(stride), "dilation": sizes(dilation), "groups": int(groups)}
        self._add(n, "layer", inputs, result, path, **conv)

    def _norm(self, n: fx.Node, module: nn.Module, inputs: tuple[str, ...], result: Tensor, path: str) -> None:
        if getattr(module, "running_mean", None) is None:
            raise UnsupportedError(f"{path}: the batch norm keeps no statistics to fold")
        act = getattr(module, "act", None)  # timm's batch norms may hold their activation
        self._add(n, "norm", inputs, result, path)
        if act is not None and not isinstance(act, nn.Identity):
            last = self.nodes[-1]
            self.nodes[-1] = replace(last, name=f"{n.name}_norm")
            cap = relu_cap(act)
            if cap is None:
                raise UnsupportedError(f"{path}: {type(act).__name__} has no integer form here. {_HELP}")
            self._add(n, "relu", (f"{n.name}_norm",), result, path, cap=cap)

    def _elementwise(
        self, n: fx.Node, module: nn.Module | None, inputs: tuple[str, ...], result: Any, path: str
    ) -> bool:
        if in_place(n, module) and len(n.all_input_nodes[0].users) > 1:
            raise UnsupportedError(f"{path}: it changes a tensor in place that is used elsewhere: set inplace=False")
        cap = relu_cap(module if n.op == "call_module" else n.target)
        if cap is not None:
            self._add(n, "relu", inputs, result, path, cap=cap)
        elif n.target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(inputs) == 2:
            if n.kwargs.get("alpha", 1) != 1:
                return False
            if len({tuple(self.env[a].shape) for a in n.all_input_nodes}) > 1:
                raise UnsupportedError(f"{path}: what is added must have the same shape. {_HELP}")
            self._add(n, "add", inputs, result, path)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d) or is_drop_path(module):
            self._pass(n, inputs)
        elif n.target is operator.getitem and slice_strides(n.args[1]):
            self._add(n, "slice", inputs, result, path, stride=slice_strides(n.args[1]))
        elif n.target is F.pad and pads_channels(n):
            sides = cast(Any, n.args[1])
            self._add(n, "pad_channels", inputs, result, path, before=sides[4], after=sides[5])
        else:
            return False
        return True

    def _pool(self, n: fx.Node, module: nn.Module | None, inputs: tuple[str, ...], result: Any, path: str) -> bool:
        given = self.env[n.all_input_nodes[0]] if n.all_input_nodes else None
        image = given if isinstance(given, Tensor) and given.dim() == 4 else None
        if image is not None and is_global_mean(n, module):
            kernel = tuple(image.shape[2:])
            settings: dict[str, Any] = {"kernel": kernel, "stride": kernel, "padding": (0, 0)}
            self._add(n, "average", inputs, result.reshape(*result.shape[:2], 1, 1), path, **settings)
        elif isinstance(module, nn.AvgPool2d) and not module.ceil_mode and module.divisor_override is None:
            if sizes(module.padding) != (0, 0) and not module.count_include_pad:
                return False
            self._add(n, "average", inputs, result, path, **window(module))
        elif isinstance(module, nn.MaxPool2d) and not module.ceil_mode and sizes(module.dilation) == (1, 1):
            self._add(n, "max", inputs, result, path, **window(module))
        elif isinstance(module, nn.Flatten) or n.target in (torch.flatten, "flatten", "view", "reshape", "squeeze"):
            if not isinstance(given, Tensor) or result.dim() != 2 or result.shape != given.flatten(1).shape:
                return False
            self._add(n, "flatten", inputs, result, path)
        else:
            return False
        return True


def _fold_norms(nodes: list[Node]) -> list[Node]:
    """Every batch norm into the layer whose output it alone takes."""
    users: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            users[name] = users.get(name, 0) + 1
    found: dict[str, Node] = {}
    for node in nodes:
        if node.kind != "norm":
            found[node.name] = node
            continue
        before = found.get(node.inputs[0])
        if before is None or before.kind != "layer" or before.norm is not None or users[before.name] != 1:
            raise UnsupportedError(f"{node.path}: a batch norm must follow a layer that feeds it alone. {_HELP}")
        del found[before.name]
        found[node.name] = replace(before, name=node.name, norm=node.path)
    return list(found.values())


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output follows from, it last, the input first."""
    by_name = {node.name: node for node in nodes}
    if output not in by_name:
        raise UnsupportedError(f"the network must return what a layer or an operation on it gives, got {output}")
    wanted, stack = set(), [output]
    while stack:
        name = stack.pop()
        if name not in wanted:
            wanted.add(name)
            stack.extend(by_name[name].inputs)
    kept = [node for node in nodes if node.name in wanted and node.name != output]
    return [*kept, by_name[output]]


def _padding(module: nn.Conv2d, given: Tensor, taken: Tensor, padding: Any, path: str) -> tuple[int, ...]:
    """Zeros left, right, above and below, whether the layer or its operator puts them there."""
    if module.padding_mode != "zeros":
        raise UnsupportedError(f"{path}: padding_mode must be 'zeros', got {module.padding_mode!r}. {_HELP}")
    extra = [t - g for t, g in zip(taken.shape[:1:-1], given.shape[:1:-1], strict=True)]
    before = [side for e in extra for side in (e // 2, e - e // 2)]
    inside = module.input_quantizer(given) if isinstance(module, QuantLayer) and module.input_quantizer else given
    if min(before) < 0 or not torch.equal(F.pad(inside, before), taken):
        raise UnsupportedError(f"{path}: {type(module).__name__} does more to its input than to pad it with zeros")
    if padding == "same":
        inner = same_padding(module.kernel_size, module.dilation)
    else:
        rows, columns = (0, 0) if padding == "valid" else sizes(padding)
        inner = [columns, columns, rows, rows]
    return tuple(a + b for a, b in zip(before, inner, strict=True))
