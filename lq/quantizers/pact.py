"""PACT: a learned bound for activations, and SAWB, its companion for weights."""

from typing import Any

import torch
from torch import Tensor

from lq.functional.clipping import pact_quantize, sawb_scale
from lq.functional.hard import hard_quantize
from lq.functional.levels import CodeRange
from lq.quantizers.base import Quantizer
from lq.quantizers.computed_scale import ComputedScaleQuantizer

__all__ = ["PACTQuantizer", "SAWBQuantizer"]


class PACTQuantizer(Quantizer):
    """Bound learned from clipped activations alone; see `lq.functional.pact_quantize`.

    The authors decay the bound as they do weights, and a common implementation begins with a bound of 6; `lq` decays no
    scale, and begins with that of least squares.

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


class SAWBQuantizer(ComputedScaleQuantizer):
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
        """See that the number of levels has coefficients."""
        super().__init__(codes, **common)
        sawb_scale(torch.ones(1, 1), codes)  # complains early

    def compute_scale(self, rows: Tensor) -> Tensor:
        """Scale from the moments of the weights.

        Args:
            rows: shape ``(C, N)``.

        Returns:
            Scales, shape ``(C,)``.
        """
        return sawb_scale(rows, self.codes)

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + (hard_quantize(x, scale, **self.codes._asdict()) - x).detach()
