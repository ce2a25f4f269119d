"""What quantizers share whose scale is computed from the values themselves, at every step of training."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lq.functional.hard import lsq_quantize
from lq.functional.layout import positive
from lq.functional.levels import CodeRange
from lq.quantizers.base import Quantizer

__all__ = ["ComputedScaleQuantizer"]


class ComputedScaleQuantizer(Quantizer):
    """Nearest levels at a scale that a subclass computes in `compute_scale`; nothing is learned.

    Evaluation takes the scale of the last step.

    Args:
        codes: code range.
        **common: arguments of `Quantizer`.
    """

    follows_weights = True

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Nothing is learned."""
        super().__init__(codes, **common)
        self.scale.requires_grad_(False)

    @abstractmethod
    def compute_scale(self, rows: Tensor) -> Tensor:
        """Scale of each row.

        Args:
            rows: shape ``(C, N)``, at least float32.

        Returns:
            Scales, shape ``(C,)``.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Quantize, in training at the scale that the values themselves give; to look at them otherwise changes none.

        Args:
            x: any shape, floating point.

        Returns:
            Quantized values, shape and dtype of ``x``.
        """
        if self.training:
            with torch.no_grad():
                self._follow(self._computed(x))
        return super().forward(x)

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels.

        Args:
            x: values in the layout's view.
            scale: as computed, broadcastable to ``x``.
            gradient_scale: has no meaning here.

        Returns:
            Levels.
        """
        return self._rounded(x, positive(scale))

    @torch.no_grad()
    def calibrate_(self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int = 2) -> None:
        """Set the scale from the values, in place.

        Args:
            x: the values.
            method: has no meaning here, nor have the others.
            importance: as method.
            power: as method.
        """
        super().calibrate_(x, "max")  # what rows of zeros keep
        computed = self._computed(x)
        self.scale.copy_(torch.where(computed > 0, computed, self.scale))

    def _computed(self, x: Tensor) -> Tensor:
        rows = self.layout.rows(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
        return self.compute_scale(rows).to(self.scale)

    def _follow(self, computed: Tensor) -> None:
        self.scale.copy_(positive(computed))

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        return lsq_quantize(x, scale, **self.codes._asdict())
