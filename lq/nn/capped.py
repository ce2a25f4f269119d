"""A ReLU with an upper end per channel: what a ReLU6 becomes when its channels are rescaled."""

import torch
from torch import Tensor, nn

__all__ = ["CappedReLU"]


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
