"""DSQ: hard levels, the derivative of a soft staircase whose shape is learned."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.dsq import DSQ_ALPHA_MAX, dsq_quantize, dsq_soft
from lq.functional.levels import CodeRange
from lq.quantizers.base import Quantizer

__all__ = ["DSQQuantizer"]


class DSQQuantizer(Quantizer):
    """Learned scale, learned alpha; see `lq.functional.dsq_quantize`.

    The authors learn the two clip values; levels being symmetric here, the scale is both.

    Args:
        codes: code range.
        alpha: at the start, at most 0.5; 0 would be rounding.
        **common: arguments of `Quantizer`.

    Raises:
        ValueError: for an alpha outside 0 to 0.5.

    Source: Gong et al., Differentiable Soft Quantization, ICCV 2019.

    >>> DSQQuantizer(CodeRange(-1, 1, 0.0))(torch.tensor([0.2, 0.9, 3.0])).tolist()
    [0.0, 1.0, 1.0]
    """

    softens = True

    def __init__(self, codes: CodeRange, *, alpha: float = 0.2, **common: Any) -> None:
        """One alpha per tensor."""
        super().__init__(codes, **common)
        if not 0 < alpha <= DSQ_ALPHA_MAX:
            raise ValueError(f"alpha must lie above 0 and be at most {DSQ_ALPHA_MAX}, got {alpha}: 0.2 is usual")
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels with the soft staircase's derivatives.

        Args:
            x: values in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: factor on the gradients of scale and alpha.

        Returns:
            Levels.
        """
        alpha = self.alpha.to(x.dtype)
        return dsq_quantize(x, scale, alpha, gradient_scale=gradient_scale, **self.codes._asdict())

    def _softened(self, view: Tensor, scale: Tensor) -> Tensor:
        shape = self.alpha.detach().to(view.dtype)  # no regularizer shall sharpen it in place of moving weights
        return dsq_soft(view, scale, shape, **self.codes._asdict())
