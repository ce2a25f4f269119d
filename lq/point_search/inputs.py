"""What calibration batches say of the inputs of each layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.calibration import default_forward
from lq.nn import LAYER_TYPES, ObserveOperator, QuantLayer, SubstituteWeight, is_transposed, same_padding, sizes

__all__ = ["Batches", "Forward", "StopForward", "fisher_importance", "hessians", "input_importance", "run", "watching"]

Batches = Sequence[Any]
_PATCHED = 16  # inputs whose patches are laid out at a time
Forward = Callable[[nn.Module, Any], Any]
See = Callable[[str, nn.Module, Tensor], None]


class StopForward(Exception):  # noqa: N818  it is no error
    """Ends a forward pass once all that is wanted has been seen."""


@torch.no_grad()
def run(model: nn.Module, batches: Batches, forward: Forward | None = None) -> None:
    """Run batches through a model in evaluation mode; a `StopForward` ends one of them.

    Args:
        model: in evaluation mode.
        batches: on the model's device.
        forward: runs the model on a batch.

    Raises:
        ValueError: for no batches, or batches that the model cannot run.
    """
    if not batches:
        raise ValueError("batches must hold at least one batch, got none: pass a few batches of training data")
    for batch in batches:
        try:
            (forward or default_forward)(model, batch)
        except StopForward:
            continue
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, IndexError) as error:
            shapes = [tuple(t.shape) for t in tensors_of(batch)]
            raise ValueError(
                f"batches must be inputs that the model runs on, got tensors of shapes {shapes}: {error}. Pass batches "
                "of the data it was trained on, or say how with forward= (calibration_forward= of the callback)"
            ) from error


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, or of a list of batches."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """While active, ``see(path, layer, input)`` is called before each layer runs.

    Args:
        layers: path to layer.
        see: is told.
    """
    handles = []
    for path, layer in layers.items():

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            see(path, module, args[0] if args else next(iter(kwargs.values())))

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _float_forward(layer: nn.Module) -> Callable[..., Tensor]:
    return cast(Any, layer.float_class if isinstance(layer, QuantLayer) else type(layer)).forward


def multiplied(layer: nn.Module, x: Tensor) -> Tensor:
    """Sum of all that each weight of a layer multiplies: the gradient of its summed output, the layer being linear.

    Args:
        layer: any convolution or linear layer.
        x: its input.

    Returns:
        Shape of the weight.
    """
    weight = torch.zeros_like(cast(Tensor, layer.weight), requires_grad=True)
    with torch.enable_grad(), SubstituteWeight(weight.shape, lambda _: weight):
        return torch.autograd.grad(_float_forward(layer)(layer, x).sum(), weight)[0]


def input_importance(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, forward: Forward | None = None
) -> dict[str, Tensor]:
    """Second moment of what each weight multiplies: the diagonal of the Hessian of the layer's squared output error.

    Args:
        model: float, in evaluation mode.
        layers: path to layer.
        batches: on the model's device.
        forward: runs the model on a batch.

    Returns:
        Path to h, shape of the weight, with mean 1.
    """
    sums: dict[str, Tensor] = {}

    def see(path: str, layer: nn.Module, x: Tensor) -> None:
        # halves cannot hold sums of squares: divided first, then summed in full
        largest = x.detach().abs().amax().clamp_min(1e-30)
        count = x.numel() // max(1, x.shape[0])
        part = multiplied(layer, (x.detach() / largest).square() / count).double() * (largest.double() ** 2 * count)
        sums[path] = sums[path] + part if path in sums else part

    with watching(layers, see):
        run(model, batches, forward)
    return {path: _unit_mean(h).to(cast(Tensor, layers[path].weight)) for path, h in sums.items()}


def fisher_importance(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    forward: Forward | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information: mean of squared gradients of single inputs.

    The model's own predictions are drawn as classes, so that no labels are needed.

    Args:
        model: float, in evaluation mode; its output are logits, classes last.
        layers: path to layer.
        batches: on the model's device; the inputs lie along the first axis of every tensor.
        forward: runs the model on a batch.
        seed: of the draws.

    Returns:
        Path to h, shape of the weight, with mean 1.

    Source: Choi et al., Towards the Limit of Network Quantization, ICLR 2017, section 3 (weights by their curvature).
    """
    generator = torch.Generator().manual_seed(seed)
    for path, layer in layers.items():
        if not isinstance(layer.weight, nn.Parameter):
            raise ValueError(
                f"layers must hold their weights as parameters for importance='fisher', got {path} which computes its "
                "own: use importance='inputs'"
            )
    weights = {path: cast(Tensor, layer.weight) for path, layer in layers.items()}
    wanted = {path: w.requires_grad for path, w in weights.items()}
    sums = {path: torch.zeros_like(w) for path, w in weights.items()}
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for batch in batches:
            for x in _singles(batch):
                with torch.enable_grad():
                    output = (forward or default_forward)(model, x)
                    if not isinstance(output, Tensor):
                        raise ValueError(
                            f"the model must return logits for importance='fisher', got {type(output).__name__}: give "
                            "a forward that returns them, or use importance='inputs'"
                        )
                    logits = output.flatten(0, -2)
                    classes = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
                    loss = F.cross_entropy(logits, classes[:, 0].to(logits.device))
                    grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for path, grad in zip(weights, grads, strict=True):
                    if grad is not None:
                        sums[path] += grad.square()
    finally:
        for path, w in weights.items():
            w.requires_grad_(wanted[path])
    return {path: _unit_mean(h) for path, h in sums.items()}


def _singles(batch: Any) -> Iterator[Any]:
    """Batches of one, of the same structure: tensors are cut along their first axis."""
    for i in range(len(next(tensors_of(batch)))):
        yield _cut(batch, i)


def _cut(batch: Any, i: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[i : i + 1]
    if isinstance(batch, Mapping):
        return {key: _cut(value, i) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_cut(value, i) for value in batch]
    return batch


def _unit_mean(h: Tensor) -> Tensor:
    """Importance has no unit: with mean 1 losses of one layer can be compared with and without it."""
    mean = h.mean()
    return h / mean if bool(mean > 0) else torch.ones_like(h)


def hessians(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, forward: Forward | None = None
) -> dict[str, Tensor]:
    """``X X^T`` of the inputs that the weights of one output channel multiply, for each group of a layer.

    Args:
        model: in evaluation mode.
        layers: path to layer: linear layers, and convolutions of one or two dimensions.
        batches: on the model's device.
        forward: runs the model on a batch.

    Returns:
        Path to shape ``(groups, d, d)``, float64, d weights per output channel.
    """
    sums: dict[str, Tensor] = {}

    def see(path: str, layer: nn.Module, x: Tensor) -> None:
        product: Tensor | float = 0.0
        for part in x.detach().split(_PATCHED) if x.dim() > 1 else [x]:  # patches of a batch are many times its size
            with torch.autocast(x.device.type, enabled=False):  # sums of squares leave the range of halves
                patches = input_patches(layer, part.to(cast(Tensor, layer.weight).dtype))
                patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
                product = product + (patches.transpose(1, 2) @ patches).double()
        assert isinstance(product, Tensor)
        sums[path] = sums[path] + product if path in sums else product

    with watching(layers, see):
        run(model, batches, forward)
    return sums


def with_patches(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that `input_patches` knows."""
    return {
        path: layer
        for path, layer in layers.items()
        if isinstance(layer, LAYER_TYPES) and not isinstance(layer, nn.Conv3d) and not is_transposed(layer)
    }


def input_patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What the weights of one output channel multiply, at each position.

    Args:
        layer: linear, or a convolution of one or two dimensions.
        x: its input.

    Returns:
        Shape ``(groups, positions, d)``, in the order of ``weight[o].flatten()``.
    """
    seen: list[tuple[Any, ...]] = []
    with ObserveOperator(lambda args: seen.append(args)):
        _float_forward(layer)(layer, x)
    source = seen[0][0]
    if isinstance(layer, nn.Linear):
        return source.reshape(1, -1, source.shape[-1])
    _, weight, _, stride, padding, dilation, groups = seen[0]
    kernel = tuple(weight.shape[2:])
    if len(kernel) == 1:
        source, kernel = source[:, :, None], (1, *kernel)
        stride, dilation = (1, *sizes(stride, 1)), (1, *sizes(dilation, 1))
        padding = padding if isinstance(padding, str) else (0, *sizes(padding, 1))
    dilation = sizes(dilation, 2)
    if isinstance(padding, str):
        source, padding = F.pad(source, same_padding(kernel, dilation)) if padding == "same" else source, 0
    columns = F.unfold(source, kernel, dilation=dilation, padding=padding, stride=stride)
    n, _, positions = columns.shape
    return columns.reshape(n, groups, -1, positions).permute(1, 0, 3, 2).reshape(groups, n * positions, -1)
