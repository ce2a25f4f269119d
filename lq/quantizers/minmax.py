"""Ranges from the largest values: of weights as they are now, of activations as a moving average."""

from typing import Any

import torch
from torch import Tensor

from lq.distributed import mean_
from lq.functional.hard import lsq_quantize
from lq.functional.layout import positive
from lq.functional.levels import CodeRange
from lq.quantizers.base import Quantizer

__all__ = ["MinMaxQuantizer", "MovingRangeQuantizer"]


class MinMaxQuantizer(Quantizer):
    """Scale by which the largest weight is the largest level, at every step of training::

        s = max |w| / Q,        y = s * round(w / s)        dy/dw = 1

    Nothing is learned; evaluation takes the scale of the last step. At 8 bits codes are -127 to 127.

    Args:
        codes: code range.
        **common: arguments of `Quantizer`.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        CVPR 2018, section 3; per tensor there. Batch norms are not folded in training here, but when exported.

    >>> quantizer = MinMaxQuantizer(CodeRange(-1, 1, 0.0))
    >>> quantizer(torch.tensor([-2.0, 0.9, 1.1])).tolist()
    [-2.0, 0.0, 2.0]
    """

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Nothing is learned."""
        super().__init__(codes, **common)
        self.scale.requires_grad_(False)

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels at the scale that the values themselves give.

        Args:
            x: values in the layout's view.
            scale: of the step before.
            gradient_scale: has no meaning here.

        Returns:
            Levels.
        """
        if self.training:
            with torch.no_grad():
                self._follow(self.layout.rows(x.detach()))
            scale = self.layout.broadcast(self.scale.to(x.dtype))
        return lsq_quantize(x, scale, **self.codes._asdict())

    def _follow(self, rows: Tensor) -> None:
        self.scale.copy_(positive(rows.abs().amax(1) / self.codes.largest))

    @torch.no_grad()
    def calibrate_(self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int = 2) -> None:
        """Set the scale from the largest values, in place.

        Args:
            x: the values.
            method: has no meaning here, nor have the others.
            importance: as method.
            power: as method.
        """
        super().calibrate_(x, "max")


class MovingRangeQuantizer(MinMaxQuantizer):
    """The same for activations, whose range is a moving average over batches and processes::

        s <- m s + (1 - m) max x / Q        (max |x| where there are negative levels)

    Calibration sets it before the first step, in place of the authors' first steps without quantization.

    Args:
        codes: code range.
        momentum: m.
        **common: arguments of `Quantizer`.

    Source: Jacob et al., CVPR 2018, section 3.1; ranges symmetric about zero or from zero up.

    >>> quantizer = MovingRangeQuantizer(CodeRange(0, 3, 0.0), momentum=0.5)
    >>> y = quantizer(torch.tensor([0.0, 9.0]))
    >>> quantizer.scale.tolist()  # from 1 half of the way to 9/3
    [2.0]
    """

    def __init__(self, codes: CodeRange, *, momentum: float = 0.99, **common: Any) -> None:
        """Remember the momentum."""
        super().__init__(codes, **common)
        self.momentum = momentum

    def _follow(self, rows: Tensor) -> None:
        largest = rows.amax(1) if self.codes.lo == 0 else rows.abs().amax(1)
        target = largest.clamp_min(0) / self.codes.largest
        self.scale.lerp_(mean_(target.to(self.scale)), 1 - self.momentum)
