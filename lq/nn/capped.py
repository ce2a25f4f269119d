"""ReLUs and where they end; one with an upper end per channel: what a ReLU6 becomes when its channels are rescaled."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CappedReLU", "relu_cap"]


class CappedReLU(nn.Module):
    """``min(max(x, 0), cap)`` with one cap per channel.

    Args:
        cap: positive, shape ``(C,)``.

    Shape:
        ``(N, C, ...)`` to the same.

    >>> CappedReLU(torch.tensor([1.0, 6.0]))(torch.tensor([[9.0, -1.0]]))
    tensor([[1., 0.]])
    """

    cap: Tensor

    def __init__(self, cap: Tensor) -> None:
        """Keep the caps as a buffer."""
        super().__init__()
        self.register_buffer("cap", cap)

    def forward(self, x: Tensor) -> Tensor:
        """Clip each channel."""
        return torch.minimum(x.clamp_min(0), self.cap.reshape(-1, *[1] * (x.dim() - 2)).to(x.dtype))


_CAPS: dict[Any, float] = {
    **dict.fromkeys((nn.ReLU, torch.relu, F.relu, "relu", "relu_"), float("inf")),
    **dict.fromkeys((nn.ReLU6, F.relu6), 6.0),
}


def relu_cap(step: Any) -> Tensor | None:
    """Where a ReLU ends.

    Args:
        step: a module, or the function or the name of the method that a traced network calls.

    Returns:
        Its upper end, shape ``(1,)`` or ``(C,)``, infinity for none; None for anything but a ReLU.

    >>> relu_cap(nn.ReLU6()), relu_cap("relu"), relu_cap(nn.GELU())
    (tensor([6.]), tensor([inf]), None)
    """
    if isinstance(step, CappedReLU):
        return step.cap
    key = type(step) if isinstance(step, nn.Module) else step
    return torch.tensor([_CAPS[key]]) if key in _CAPS else None
