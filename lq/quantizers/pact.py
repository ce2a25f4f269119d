"""PACT: a learned bound for activations, and SAWB, its companion for weights."""

from typing import Any

import torch
from torch import Tensor

from lq.functional.clipping import pact_quantize, sawb_scale
from lq.functional.hard import hard_quantize
from lq.functional.layout import positive
from lq.functional.levels import CodeRange
from lq.quantizers.base import Quantizer

__all__ = ["PACTQuantizer", "SAWBQuantizer"]


class PACTQuantizer(Quantizer):
    """Bound learned from clipped activations alone; see `lq.functional.pact_quantize`.

    The authors decay the bound as they do weights; `lq` decays no scale.

    Source: Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, 2018.

    >>> PACTQuantizer(CodeRange(0, 3, 0.0))(torch.tensor([0.2, 0.9, 8.0])).tolist()
    [0.0, 1.0, 3.0]
    """

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels; the scale learns from what is clipped.

        Args:
            x: values in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: has no meaning here.

        Returns:
            Levels.
        """
        return pact_quantize(x, scale, **self.codes._asdict())


class SAWBQuantizer(Quantizer):
    """Scale computed from the weights at every step of training; see `lq.functional.sawb_scale`.

    Evaluation takes the scale of the last step. Gradients pass straight through everywhere.

    Args:
        codes: code range, of a number of levels that has coefficients.
        **common: arguments of `Quantizer`.

    Source: Choi et al., Accurate and Efficient 2-bit Quantized Neural Networks, MLSys 2019.

    >>> quantizer = SAWBQuantizer(CodeRange(-1, 1, 0.0))
    >>> [round(y, 2) for y in quantizer(torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.2])).tolist()]
    [-0.9, 0.9, -0.9, 0.9, 0.0]
    """

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Nothing is learned."""
        super().__init__(codes, **common)
        self.scale.requires_grad_(False)
        sawb_scale(torch.ones(1, 1), codes)  # complains early

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels at the scale that the weights themselves give.

        Args:
            x: weights in the layout's view.
            scale: of the step before.
            gradient_scale: has no meaning here.

        Returns:
            Levels.
        """
        with torch.no_grad():
            if self.training:
                self.scale.copy_(sawb_scale(self.layout.rows(x.detach()), self.codes).to(self.scale))
                scale = self.layout.broadcast(self.scale.to(x.dtype))
            hard = hard_quantize(x, positive(scale), **self.codes._asdict())
        return x + (hard - x).detach()

    @torch.no_grad()
    def calibrate_(self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int = 2) -> None:
        """Set the scale from the weights, in place.

        Args:
            x: the weights.
            method: has no meaning here, nor have the others.
            importance: as method.
            power: as method.
        """
        self.scale.copy_(sawb_scale(self.layout.rows(x.detach()).to(self.scale), self.codes))
