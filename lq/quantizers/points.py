"""What quantizers onto unequally spaced points share; `subset` and `codebook` say how the points are found."""

import math

import torch
from torch import Tensor

from lq.functional.hard import lsq_gradient_scale
from lq.functional.layout import ScaleLayout, positive
from lq.functional.levels import CodeRange
from lq.functional.points import decode_points, encode_points
from lq.functional.soft_points import PointSet, point_regularizer, point_staircase, point_statistics
from lq.functional.statistics import LevelStatistics
from lq.quantizers.base import Quantizer

__all__ = ["PointQuantizer"]


class PointQuantizer(Quantizer):
    """Levels at chosen points, all multiplied by a learned scale; see `lq.functional.point_staircase`.

    Args:
        bits: width of a code.
        signed: whether the points carry their sign (2^b of them); otherwise 2^(b-1) magnitudes and a sign bit.
        per_channel: whether every scale has points of its own.
        layout: which values share a scale.
        count: values that share one scale, for LSQ's gradient scale.
        gradient_scale: whether the gradient of the scale is multiplied by LSQ's ``1/sqrt(N Q)``.
        staircase: function between two levels: "tanh", "atan" or "linear".
        hard: nearest level in the forward pass, soft derivative in the backward pass.
        slope_backward_max: cap on the slope in the derivative alone, None for none.
        straight_through_scale: whether the scale's gradient takes the staircase's derivative for 1, its mean.
    """

    points: Tensor
    slope: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = False,
        per_channel: bool = False,
        layout: ScaleLayout | None = None,
        count: int = 0,
        gradient_scale: bool = True,
        staircase: str = "tanh",
        hard: bool = False,
        slope_backward_max: float | None = None,
        straight_through_scale: bool = False,
    ) -> None:
        """Allocate the points at their final shape, evenly spaced until `calibrate_` has seen data."""
        super().__init__(CodeRange(0, 2**bits - 1, 0.0), layout=layout, count=count, gradient_scale=gradient_scale)
        self.signed = signed
        self.staircase = staircase
        self.hard_forward = hard
        self.slope_backward_max = math.inf if slope_backward_max is None else slope_backward_max
        self.straight_through_scale = straight_through_scale
        points = torch.linspace(-1, 1, 2**bits) if signed else torch.arange(1, 2 ** (bits - 1) + 1) / 2 ** (bits - 1)
        self.register_buffer("points", points.expand(self.layout.scales, -1).clone() if per_channel else points)
        self.register_buffer("slope", torch.zeros(1))

    @property
    def point_set(self) -> PointSet:
        """The points and how their codes are made."""
        return PointSet(self.points, self.codes.bits, self.signed)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize: the staircase in training, the nearest level in evaluation, there with gradients straight through.

        Args:
            x: any shape, floating point.

        Returns:
            Quantized values, shape and dtype of ``x``.
        """
        learns = torch.is_grad_enabled() and (x.requires_grad or self.scale.requires_grad)
        if not self.training and not learns:
            return self.hard(x)
        factor = 1.0
        if self.gradient_scale:
            largest = float(2 ** (self.codes.bits - 1) - 1)  # as many steps as uniform levels would have
            factor = lsq_gradient_scale(self.count or x.numel() // max(x.shape[0], 1), largest)
        rows = self._rows(x)
        if self.training:
            y = self.fake_quantize(rows, self.scale, factor)
        else:
            y = point_staircase(
                rows,
                self.scale.to(rows.dtype),
                torch.zeros_like(self.slope),
                self.point_set,
                hard=True,
                gradient_scale=factor,
            )
        return self.layout.unrows(y, x.shape).to(x.dtype)

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Staircase at the present slope.

        Args:
            x: rows, one per scale.
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

    def hard(self, x: Tensor) -> Tensor:
        """Nearest level, whatever the mode.

        Args:
            x: any shape, floating point.

        Returns:
            Levels, shape and dtype of ``x``.
        """
        rows = self._rows(x)
        y = self.point_set.hard(rows, positive(self.scale.to(rows.dtype)))
        return self.layout.unrows(y, x.shape).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest points, uint8, the sign in the top bit unless the points are signed.

        Args:
            x: any shape.

        Returns:
            Codes, shape of ``x``.
        """
        rows = self._rows(x)
        scale = positive(self.scale.to(rows.dtype))
        codes = encode_points(rows, self.points, scale, bits=self.codes.bits, signed=self.signed)
        return self.layout.unrows(codes, x.shape)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes; `decode` of `encode` equals `hard` bit for bit.

        Args:
            codes: shape of the tensor they came from.

        Returns:
            Levels, dtype of the scale.
        """
        scale = positive(self.scale)
        rows = self.layout.rows(codes)
        values = decode_points(rows, self.points, scale, bits=self.codes.bits, signed=self.signed)
        return self.layout.unrows(values, codes.shape)

    def level_values(self) -> Tensor:
        """All levels, ascending.

        Returns:
            Shape ``(L,)``, or ``(C, L)`` per channel.
        """
        values = positive(self.scale.detach()).reshape(-1, 1) * self.point_set.levels
        return values[0] if self.scale.numel() == 1 else values

    def set_points_(self, points: Tensor, scale: Tensor) -> None:
        """Take over points and scales found elsewhere.

        Args:
            points: shape of ``self.points``.
            scale: shape ``(scales,)``; a channel of zeros may have 0.
        """
        with torch.no_grad():
            self.points.copy_(points)
            self.scale.copy_(scale.reshape(-1))

    def set_slope(self, slope: float) -> None:
        """Set the slope.

        Args:
            slope: new slope, not negative.
        """
        self.slope.fill_(slope)

    def regularizer(self, x: Tensor, *, kind: str, on: str = "latent", scale_gradient: bool = False) -> Tensor:
        """Pull towards the points, see `lq.functional.point_regularizer`.

        Args:
            x: weight.
            kind: "nearest", "l1" or "sine".
            on: "latent" (the weight) or "quantized" (what training sees of it).
            scale_gradient: whether the scale learns from this term.

        Returns:
            Scalar.
        """
        rows, scale = self._rows(x), self.scale
        if on == "quantized":
            rows = self.fake_quantize(rows, scale if scale_gradient else scale.detach(), 1.0)
        return point_regularizer(rows, scale.to(rows.dtype), self.point_set, kind=kind, scale_gradient=scale_gradient)

    @torch.no_grad()
    def statistics(self, x: Tensor, *, soft: bool = False, power: int = 2) -> LevelStatistics:
        """Sums that describe how ``x`` sits on its levels.

        Args:
            x: weight or activations.
            soft: describe what training sees of ``x`` instead of ``x``.
            power: 2 or 4.

        Returns:
            `lq.functional.LevelStatistics`.
        """
        rows = self._rows(x)
        if soft:
            rows = self.fake_quantize(rows, self.scale, 1.0)
        return point_statistics(rows, positive(self.scale.to(rows.dtype)), self.point_set, power)

    def _data(self, x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows to search, magnitudes unless signed, and their importance."""
        rows = self._rows(x.detach())
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("cannot choose points for values that are not finite: check the weights or the input data")
        h = None if importance is None else self.layout.rows(importance.to(x.device).expand(x.shape)).double()
        if h is not None:
            h = torch.where(h.sum(1, keepdim=True) > 0, h, torch.ones_like(h))
        return (rows if self.signed else rows.abs()), h

    def _rows(self, x: Tensor) -> Tensor:
        return self.layout.rows(x.to(torch.promote_types(x.dtype, torch.float32)))

    def extra_repr(self) -> str:
        """Bits and number of points and scales.

        Returns:
            One line for ``print(module)``.
        """
        return f"bits={self.codes.bits}, points={self.points.shape[-1]}, scales={self.layout.scales}"
