"""Sums, extremes and samples over all processes; each is the identity where there is only one."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["first_", "gather_first", "is_distributed", "mean_", "minimum", "sum_"]


def is_distributed() -> bool:
    """Whether more than one process takes part.

    Returns:
        True in a process group of two or more.
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def minimum(x: Tensor) -> Tensor:
    """Elementwise minimum over processes.

    Args:
        x: the same shape everywhere.

    Returns:
        A new tensor.
    """
    x = x.clone()
    if is_distributed():
        dist.all_reduce(x, op=dist.ReduceOp.MIN)
    return x


def sum_(x: Tensor) -> Tensor:
    """Sum over processes, in place.

    Args:
        x: the same shape everywhere.

    Returns:
        ``x``.
    """
    if is_distributed():
        dist.all_reduce(x)
    return x


def mean_(x: Tensor) -> Tensor:
    """Mean over processes, in place.

    Args:
        x: floating point, the same shape everywhere.

    Returns:
        ``x``.
    """
    return sum_(x).div_(dist.get_world_size()) if is_distributed() else x


def first_(x: Tensor) -> Tensor:
    """What the first process has, in place.

    Args:
        x: the same shape everywhere.

    Returns:
        ``x``.
    """
    if is_distributed():
        whole = x.contiguous()
        dist.broadcast(whole, 0)
        x.copy_(whole)
    return x


def gather_first(x: Tensor) -> Tensor:
    """Concatenation of 1-D tensors in the order of ranks, each cut to the length of the shortest.

    Args:
        x: shape ``(n,)``.

    Returns:
        Shape ``(world * min n,)``, the same on every rank.
    """
    if not is_distributed():
        return x
    shortest = int(minimum(torch.tensor([x.numel()], device=x.device)).item())
    parts = [torch.empty(shortest, dtype=x.dtype, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x[:shortest].contiguous())
    return torch.cat(parts)
