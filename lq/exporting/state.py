"""The tensors of a network by name: which are all of them, which are one."""

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["holds_all_in_state", "key_of", "loose_dtypes", "shared_parameters", "tie"]


def key_of(path: str, name: str) -> str:
    """Key of a part in the state of the network; the path of the network itself is ""."""
    return f"{path}.{name}" if path else name


def shared_parameters(network: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one and the same, group by group."""
    groups: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def tie(network: nn.Module, names: list[str]) -> None:
    """Make the first of these parameters all of them."""
    first = network.get_parameter(names[0])
    for name in names[1:]:
        parent, _, attribute = name.rpartition(".")
        cast(nn.Module, network.get_submodule(parent)).register_parameter(attribute, first)


def holds_all_in_state(network: nn.Module) -> bool:
    """Whether a network has no tensors beside its state: those would stay without values."""
    held = {id(t) for t in network.state_dict(keep_vars=True).values()}
    buffers = all(id(b) in held for b in network.buffers())
    loose = any(isinstance(v, Tensor) for m in network.modules() for v in vars(m).values())
    return buffers and not loose


def loose_dtypes(network: nn.Module) -> dict[str, str]:
    """Names of the floating point buffers beside the state that are not in float32, and their types."""
    held = network.state_dict().keys()
    loose = {name: b for name, b in network.named_buffers() if name not in held and b.is_floating_point()}
    return {name: str(b.dtype).removeprefix("torch.") for name, b in loose.items() if b.dtype != torch.float32}
