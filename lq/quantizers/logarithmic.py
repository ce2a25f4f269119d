"""Levels at powers of two, or of a smaller base, and a sign; rounded in the logarithmic domain."""

from typing import Any

import torch
from torch import Tensor

from lq.functional.layout import positive
from lq.functional.log_levels import log_points, log_round, power_of_two_scale
from lq.functional.regularizer import chosen_regularizer
from lq.functional.soft_points import point_statistics
from lq.functional.statistics import LevelStatistics
from lq.quantizers.points import PointQuantizer

__all__ = ["LogQuantizer"]

_MOST_SHIFTS = 24


class LogQuantizer(PointQuantizer):
    """``2^(b-1)`` magnitudes with evenly spaced exponents and a sign bit, no zero; the scale is a power of two.

    Nothing is learned: while training, the scale is the one that loses least at every step; gradients pass straight
    through everywhere. Where they ended at the largest magnitude, all weights beyond it would never move again:
    no learned scale brings them back inside.

    Args:
        bits: width of a code, sign included.
        span: octaves between the smallest and the largest magnitude; None for whole exponents, ``2^(b-1) - 1``.
        **common: arguments of `PointQuantizer`.

    Source: Miyashita et al., Convolutional Neural Networks using Logarithmic Data Representation, 2016, whose exponents
        are as many without the sign bit and who keep an exact 0; Cai et al., 2018, with fractional exponents from -7 to
        0.

    >>> quantizer = LogQuantizer(3)
    >>> quantizer.calibrate_(torch.tensor([1.0]))
    >>> quantizer.eval()(torch.tensor([-0.3, 0.72])).tolist()
    [-0.25, 1.0]
    """

    softens, follows_weights = False, True

    def __init__(self, bits: int, *, span: float | None = None, **common: Any) -> None:
        """Place the points."""
        super().__init__(bits, **common)
        count = self.points.shape[-1]
        self.span = count - 1.0 if span is None else span
        self.points.copy_(log_points(count, self.span))
        self.scale.requires_grad_(False)

    @property
    def shiftable(self) -> bool:
        """Exponents are whole, and few enough for 32-bit accumulators."""
        return self.span % (self.points.shape[-1] - 1) == 0 and self.span < _MOST_SHIFTS

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels in the logarithmic domain.

        Args:
            x: rows, one per scale.
            scale: of the step before, shape ``(C,)``.
            gradient_scale: has no meaning here.

        Returns:
            Levels.
        """
        if self.training:
            with torch.no_grad():
                self._choose_(x.detach().reshape(scale.numel(), -1), None, self.power)
                scale = self.scale.to(x.dtype)
        return x + (self._nearest(x.detach(), scale) - x).detach()

    def _choose_(self, rows: Tensor, importance: Tensor | None, power: int) -> None:
        self.scale.copy_(power_of_two_scale(rows, self.points, importance, power).to(self.scale))

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        return self.fake_quantize(view, scale, gradient_scale)

    def _nearest(self, view: Tensor, scale: Tensor) -> Tensor:
        return self._decode(self._encode(view, scale), scale)

    def _pull_latent(self, view: Tensor, scale: Tensor, kind: str, scale_gradient: bool) -> Tensor:
        step = positive(scale.detach())
        end = self.points.to(view.dtype)[..., -1:] * step.reshape(-1, 1)
        return chosen_regularizer(view, self._nearest(view.detach(), step), -end, end)

    def _sums_latent(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return point_statistics(view, scale, self.point_set, power, self._nearest(view, scale))

    def _encode(self, view: Tensor, scale: Tensor) -> Tensor:
        column = torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, 1)
        return super()._encode(log_round(view / column, self.points) * column, scale)
