"""What quantizers onto unequally spaced points share; `subset` and `codebook` say how the points are found."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lq.functional.layout import positive
from lq.functional.levels import CodeRange
from lq.functional.points import decode_points, encode_points, midpoints
from lq.functional.shift_add import has_integer_points
from lq.functional.soft_points import PointSet, point_regularizer, point_staircase, point_statistics
from lq.functional.statistics import LevelStatistics
from lq.quantizers.soft import SoftQuantizer

__all__ = ["PointQuantizer"]


class PointQuantizer(SoftQuantizer):
    """Levels at chosen points, all multiplied by a learned scale; see `lq.functional.point_staircase`.

    Args:
        bits: width of a code.
        signed: whether the points carry their sign (2^b of them); otherwise 2^(b-1) magnitudes and a sign bit.
        per_channel: whether every scale has points of its own.
        power: of the quantization loss, 2 or 4.
        **common: arguments of `SoftQuantizer`.
    """

    points: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = False,
        per_channel: bool = False,
        power: int = 2,
        **common: Any,
    ) -> None:
        """Allocate the points at their final shape, evenly spaced until `calibrate_` has seen data."""
        super().__init__(CodeRange(0, 2**bits - 1, 0.0), **common)
        self.signed, self.power = signed, power
        points = torch.linspace(-1, 1, 2**bits) if signed else torch.arange(1, 2 ** (bits - 1) + 1) / 2 ** (bits - 1)
        self.register_buffer("points", points.expand(self.layout.scales, -1).clone() if per_channel else points)

    @property
    def point_set(self) -> PointSet:
        """The points and how their codes are made."""
        return PointSet(self.points, self.codes.bits, self.signed)

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Staircase at the present slope.

        Args:
            x: rows, one per scale; of one scale any shape.
            scale: learned scale, shape ``(C,)``.
            gradient_scale: factor on the gradient of the scale.

        Returns:
            Softly quantized values.
        """
        return point_staircase(
            x,
            scale.to(x.dtype),
            self.slope,
            self.point_set,
            staircase=self.staircase,
            hard=self.hard_forward,
            slope_backward_max=self.slope_backward_max,
            gradient_scale=gradient_scale,
            straight_through_scale=self.straight_through_scale,
        )

    @property
    def shiftable(self) -> bool:
        """Whether points are whole multiples of one power of two, so that a product is shifts and additions."""
        return has_integer_points(self.points)

    def level_values(self) -> Tensor:
        """All levels, ascending.

        Returns:
            Shape ``(L,)``, or ``(C, L)`` per channel.
        """
        values = positive(self.scale.detach()).reshape(-1, 1) * self.point_set.levels
        return values[0] if self.scale.numel() == 1 else values

    def limits(self) -> Tensor:
        """Values halfway between neighbouring levels, ascending, shape ``(L-1,)``; of one scale and signed points."""
        return midpoints(self.points) * positive(self.scale.detach())

    def rank(self, codes: Tensor) -> Tensor:
        """Codes in the order of their levels: of magnitudes, negative ones count downwards.

        Args:
            codes: from `encode`.

        Returns:
            Ranks, int16, shape of the codes.
        """
        if self.signed:
            return super().rank(codes)
        half = 2 ** (self.codes.bits - 1)
        rows = self.layout.rows(codes).to(torch.int16)
        ranks = torch.where(rows >= half, half - 1 - rows + self._zero(), rows)
        return self.layout.unrows(ranks, codes.shape)

    def unrank(self, ranks: Tensor) -> Tensor:
        """Inverse of `rank`.

        Args:
            ranks: whole numbers.

        Returns:
            Codes, int16, for `decode`.
        """
        if self.signed:
            return super().unrank(ranks)
        half = 2 ** (self.codes.bits - 1)
        rows = self.layout.rows(ranks).to(torch.int16)
        codes = torch.where(rows < 0, half - 1 - rows + self._zero(), rows)
        return self.layout.unrows(codes, ranks.shape)

    def _zero(self) -> Tensor:
        """1 for rows whose smallest magnitude is zero, which has one code, else 0."""
        return (self.points[..., :1] == 0).to(torch.int16).reshape(-1, 1)

    def set_points_(self, points: Tensor, scale: Tensor) -> None:
        """Take over points and scales found elsewhere.

        Args:
            points: shape of ``self.points``.
            scale: shape ``(scales,)``; a channel of zeros may have 0.
        """
        with torch.no_grad():
            self.points.copy_(points)
            self.scale.copy_(scale.reshape(-1))

    @torch.no_grad()
    def calibrate_(
        self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int | None = None
    ) -> None:
        """Choose points and scale for a weight, or for a sample of activations, in place.

        Args:
            x: the values.
            method: has no meaning here.
            importance: of each value, broadcastable to ``x``, such as the counts of a histogram.
            power: of the quantization loss; None takes the quantizer's own.

        Raises:
            ValueError: for values that are not finite.
        """
        rows = self.layout.rows(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("cannot choose points for values that are not finite: check the weights or the input data")
        magnitudes = rows if self.signed else rows.abs()
        self._choose_(magnitudes, self.layout.importance_rows(importance, x), power or self.power)

    @abstractmethod
    def _choose_(self, rows: Tensor, importance: Tensor | None, power: int) -> None:
        """Set points and scales for rows of values, one per scale, magnitudes unless signed, and their importance."""

    def _largest(self) -> float:
        return float(2 ** (self.codes.bits - 1) - 1)  # as many steps as uniform levels would have

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        how = {"hard": True, "slope_backward_max": 0.0, "gradient_scale": gradient_scale}
        return point_staircase(view, scale, self.slope, self.point_set, **how)

    def _nearest(self, view: Tensor, scale: Tensor) -> Tensor:
        return self.point_set.hard(view, scale)

    def _encode(self, view: Tensor, scale: Tensor) -> Tensor:
        return encode_points(view, self.points, scale, bits=self.codes.bits, signed=self.signed)

    def _decode(self, view: Tensor, scale: Tensor) -> Tensor:
        return decode_points(view.long(), self.points, scale, bits=self.codes.bits, signed=self.signed)

    def _pull(self, view: Tensor, scale: Tensor, kind: str, scale_gradient: bool) -> Tensor:
        return point_regularizer(view, scale, self.point_set, kind=kind, scale_gradient=scale_gradient)

    def _sums(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return point_statistics(view, scale, self.point_set, power)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self._precision(x)
        x = x.to(dtype)
        # one scale needs no rows, whose values would have to be brought from their order in memory and back
        as_it_is = self.layout.shape is None and self.points.dim() == 1 < x.dim()
        return x if as_it_is else self.layout.rows(x), self.scale.to(dtype)

    def _restore(self, view: Tensor, shape: torch.Size) -> Tensor:
        return self.layout.unrows(view, shape)

    def extra_repr(self) -> str:
        """Bits and number of points and scales.

        Returns:
            One line for ``print(module)``.
        """
        return f"bits={self.codes.bits}, points={self.points.shape[-1]}, scales={self.layout.scales}"
