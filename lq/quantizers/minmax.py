"""Ranges from the largest values: of weights as they are now, of activations as a moving average."""

from typing import Any

from torch import Tensor

from lq.distributed import mean_
from lq.functional.levels import CodeRange
from lq.quantizers.computed_scale import ComputedScaleQuantizer

__all__ = ["MinMaxQuantizer", "MovingRangeQuantizer"]


class MinMaxQuantizer(ComputedScaleQuantizer):
    """Scale by which the largest weight is the largest level, at every step of training::

        s = max |w| / Q,        y = s * round(w / s)        dy/dw = 1

    Nothing is learned; evaluation takes the scale of the last step. At 8 bits codes are -127 to 127.

    Args:
        codes: code range.
        **common: arguments of `Quantizer`.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        CVPR 2018, section 3; per tensor there. Batch norms are not folded in training here, but when exported.

    >>> import torch
    >>> quantizer = MinMaxQuantizer(CodeRange(-1, 1, 0.0))
    >>> quantizer(torch.tensor([-2.0, 0.9, 1.1])).tolist()
    [-2.0, 0.0, 2.0]
    """

    def compute_scale(self, rows: Tensor) -> Tensor:
        """Scale by which the largest value is the largest level.

        Args:
            rows: shape ``(C, N)``.

        Returns:
            Scales, shape ``(C,)``.
        """
        return rows.abs().amax(1) / self.codes.largest


class MovingRangeQuantizer(MinMaxQuantizer):
    """The same for activations, whose range is a moving average over batches and processes::

        s <- m s + (1 - m) max x / Q        (max |x| where there are negative levels)

    Calibration sets it before the first step, in place of the authors' first steps without quantization.

    Args:
        codes: code range.
        momentum: m.
        **common: arguments of `Quantizer`.

    Source: Jacob et al., CVPR 2018, section 3.1; ranges symmetric about zero or from zero up.

    >>> import torch
    >>> quantizer = MovingRangeQuantizer(CodeRange(0, 3, 0.0), momentum=0.5)
    >>> y = quantizer(torch.tensor([0.0, 9.0]))
    >>> quantizer.scale.tolist()  # from 1 half of the way to 9/3
    [2.0]
    """

    def __init__(self, codes: CodeRange, *, momentum: float = 0.99, **common: Any) -> None:
        """Remember the momentum."""
        super().__init__(codes, **common)
        self.momentum = momentum

    def compute_scale(self, rows: Tensor) -> Tensor:
        """The same, without values that an unsigned range cannot hold.

        Args:
            rows: shape ``(C, N)``.

        Returns:
            Scales, shape ``(C,)``.
        """
        return super().compute_scale(rows if self.codes.lo else rows.clamp_min(0))

    def _follow(self, computed: Tensor) -> None:
        self.scale.lerp_(mean_(computed), 1 - self.momentum)
