"""Which modules are reconstructed together, and what goes in and out of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lq.point_search.inputs import Batches, Forward, StopForward, run

__all__ = ["find_blocks", "inputs_of", "outputs_of"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module, layers: Sequence[str]) -> dict[str, list[str]]:
    """Split the layers of a network into blocks: the smallest modules that hold several of them, else single layers.

    Args:
        model: any module.
        layers: paths of the layers, in execution order.

    Returns:
        Path of each block to the paths of its layers, in execution order of their first layers.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(2, 1, 2))
    >>> find_blocks(net, ["0", "1.linear1", "1.linear2"])
    {'0': ['0'], '1': ['1.linear1', '1.linear2']}
    """
    chosen = {path: _block(model, path, layers) for path in layers}
    tops = set(chosen.values())
    blocks: dict[str, list[str]] = {}
    for path, block in chosen.items():
        outer = [top for top in tops if block.startswith(f"{top}.")]  # blocks within a block join it
        blocks.setdefault(min(outer, key=len) if outer else block, []).append(path)
    return blocks


def _block(model: nn.Module, path: str, layers: Sequence[str]) -> str:
    parent = path
    while "." in parent:
        parent = parent.rpartition(".")[0]
        several = sum(other.startswith(f"{parent}.") for other in layers) > 1
        if several and not isinstance(model.get_submodule(parent), _CONTAINERS):
            return parent
        if several:
            break  # a container of blocks: the layer stands alone in it
    return path


@torch.no_grad()
def inputs_of(model: nn.Module, block: str, batches: Batches, forward: Forward | None = None) -> Tensor | None:
    """All inputs of a block.

    Args:
        model: in evaluation mode.
        block: its path.
        batches: on the model's device.
        forward: runs the model on a batch.

    Returns:
        Inputs, or None where it is not called once with one tensor alone.
    """
    seen: list[Tensor] = []
    plain = True

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal plain
        values = [v for v in (*args, *kwargs.values()) if v is not None]
        plain = plain and len(values) == 1 and isinstance(values[0], Tensor) and len(args) == 1
        if plain:
            seen.append(values[0].detach().clone())
        raise StopForward

    handle = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run(model, batches, forward)
    finally:
        handle.remove()
    sizes = {x.shape[1:] for x in seen}
    return torch.cat(seen) if plain and len(sizes) == 1 else None


@torch.no_grad()
def outputs_of(model: nn.Module, block: str, batches: Batches, forward: Forward | None = None) -> Tensor | None:
    """All outputs of a block.

    Args:
        model: in evaluation mode.
        block: its path.
        batches: on the model's device.
        forward: runs the model on a batch.

    Returns:
        Outputs, or None where it is not called exactly once or returns something else than one tensor.
    """
    seen: list[Any] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output.detach().clone() if isinstance(output, Tensor) else None)

    handle = model.get_submodule(block).register_forward_hook(keep)
    try:
        run(model, batches, forward)
    finally:
        handle.remove()
    usable = len(seen) == len(batches) and all(isinstance(y, Tensor) for y in seen)
    return torch.cat(seen) if usable and len({y.shape[1:] for y in seen}) == 1 else None
