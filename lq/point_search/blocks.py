"""Which modules are reconstructed together, and what goes in and out of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lq.point_search.inputs import Batches, Forward, StopForward, run

__all__ = ["BlockData", "find_blocks"]

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
    blocks: dict[str, list[str]] = {}
    for path, block in chosen.items():
        holds_blocks = any(other != path and other.startswith(f"{block}.") for other in chosen.values())
        blocks.setdefault(path if holds_blocks else block, []).append(path)
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


class BlockData:
    """Inputs and float outputs of one block after the other, in order of execution.

    Where a block takes just what the one before it returned, its inputs are computed from those, not through the whole
    network again.

    Args:
        model: quantized, in evaluation mode, changing block by block.
        float_model: the same before quantization.
        blocks: their paths, in order of execution.
        batches: on the model's device.
        forward: runs the model on a batch.
    """

    def __init__(
        self, model: nn.Module, float_model: nn.Module, blocks: Sequence[str], batches: Batches, forward: Forward | None
    ) -> None:
        """See which block feeds which."""
        self.model, self.float_model = model, float_model
        self.batches, self.forward = batches, forward
        self.before, self.calls = _links(float_model, blocks, batches, forward)
        self.last: tuple[str, Tensor, Tensor] | None = None

    @torch.no_grad()
    def of(self, block: str) -> tuple[Tensor | None, Tensor | None]:
        """Inputs of a block in the quantized network, and outputs of its float twin on its own inputs.

        Args:
            block: its path.

        Returns:
            Two tensors, None where a block does not turn one tensor into one, called once.
        """
        if self.calls.get(block) != 1:
            self.last = None
            return None, None
        module, twin = self.model.get_submodule(block), self.float_model.get_submodule(block)
        if self.last is not None and self.before.get(block) == self.last[0]:
            size = max(1, len(self.last[1]) // len(self.batches))
            previous = self.model.get_submodule(self.last[0])
            x: Tensor | None = torch.cat([previous(part) for part in self.last[1].split(size)])
            target: Tensor | None = torch.cat([twin(part) for part in self.last[2].split(size)])
        else:
            x = self._seen(self.model, module, before=True)
            target = self._seen(self.float_model, twin, before=False)
        self.last = None if x is None or target is None else (block, x, target)
        return x, target

    def _seen(self, model: nn.Module, block: nn.Module, *, before: bool) -> Tensor | None:
        """What goes into a block, or comes out of it, over all batches."""
        seen: list[Tensor] = []
        plain = True

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *output: Any) -> None:
            nonlocal plain
            values = output if output else [v for v in (*args, *kwargs.values()) if v is not None]
            plain = plain and len(values) == 1 and isinstance(values[0], Tensor) and (bool(output) or len(args) == 1)
            if plain:
                seen.append(values[0].detach().clone())
            raise StopForward

        if before:
            handle = block.register_forward_pre_hook(see, with_kwargs=True)
        else:
            handle = block.register_forward_hook(see, with_kwargs=True)
        try:
            run(model, self.batches, self.forward)
        finally:
            handle.remove()
        usable = plain and len(seen) == len(self.batches) and len({x.shape[1:] for x in seen}) == 1
        return torch.cat(seen) if usable else None


def _links(
    model: nn.Module, blocks: Sequence[str], batches: Batches, forward: Forward | None
) -> tuple[dict[str, str], dict[str, int]]:
    """Block to the one before it, where it takes that one's output as it is; and how often each is called."""
    outputs: dict[int, tuple[str, int]] = {}
    alive: list[Any] = []  # identities are unique only among objects that live
    calls: dict[str, int] = {}
    links: dict[str, str] = {}
    handles = []
    for path in blocks:

        def enter(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            calls[path] = calls.get(path, 0) + 1
            before = outputs.get(id(args[0])) if len(args) == 1 else None
            if before is not None and before[1] == args[0]._version:  # not changed in place since
                links[path] = before[0]

        def leave(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
            alive.append(output)
            if isinstance(output, Tensor):
                outputs[id(output)] = path, output._version

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        run(model, batches[:1], forward)
    finally:
        for handle in handles:
            handle.remove()
    return {path: before for path, before in links.items() if calls[path] == calls[before] == 1}, calls
