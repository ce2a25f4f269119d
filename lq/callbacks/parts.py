"""Parts of a network by their path."""

from torch import nn

__all__ = ["descend", "paths_near"]


def descend(network: nn.Module, path: str) -> tuple[bool, tuple[str, nn.Module]]:
    """Whether a path exists, and the part that it leads to, or the last one on the way."""
    where, part = "", network
    for name in filter(None, path.split(".")):
        children = dict(part.named_children())
        if name not in children:
            return False, (where, part)
        where, part = f"{where}.{name}".lstrip("."), children[name]
    return True, (where, part)


def paths_near(where: str, part: nn.Module) -> list[str]:
    """What could have been meant: the parts there that learn, or that part itself."""
    inside = [f"{where}.{n}".lstrip(".") for n, child in part.named_children() if any(True for _ in child.parameters())]
    return inside or [where] * bool(where)
