"""The annealed soft staircase: `lq`'s own method."""

import math

import torch
from torch import Tensor

from lq.functional.layout import ScaleLayout, damped
from lq.functional.levels import CodeRange
from lq.functional.scale import scale_parity
from lq.functional.soft import soft_staircase
from lq.quantizers.base import Quantizer

__all__ = ["SoftQuantizer"]


class SoftQuantizer(Quantizer):
    """Soft staircase whose slope sharpens it from the identity towards rounding; see `lq.functional.soft_staircase`.

    Args:
        codes: code range.
        layout: which values share a scale.
        count: values that share one scale, for LSQ's gradient scale; 0 takes the features of one sample.
        gradient_scale: whether the gradient of the scale is multiplied by LSQ's ``1/sqrt(N Q)``.
        staircase: function between two levels: "tanh", "atan" or "linear".
        hard: round in the forward pass, keep the soft derivative in the backward pass.
        slope_backward_max: cap on the slope in the derivative alone, None for none.
        straight_through_scale: whether the scale's gradient takes the staircase's derivative for 1, its mean.
        parity: whether the gradient of the scale is multiplied by `lq.functional.scale_parity` beside LSQ's factor;
            of weights only, as the mean of activations would cost a pass in each step.

    >>> from lq.functional import code_range
    >>> quantizer = SoftQuantizer(code_range(2))
    >>> quantizer.set_slope(1e4)
    >>> quantizer(torch.tensor([0.2, 0.9, 3.0])).tolist()
    [0.0, 1.0, 1.0]
    """

    slope: Tensor

    softens = True

    def __init__(
        self,
        codes: CodeRange,
        *,
        layout: ScaleLayout | None = None,
        count: int = 0,
        gradient_scale: bool = True,
        staircase: str = "tanh",
        hard: bool = False,
        slope_backward_max: float | None = None,
        straight_through_scale: bool = False,
        parity: bool = False,
    ) -> None:
        """Start as the identity inside the range: slope 0."""
        super().__init__(codes, layout=layout, count=count, gradient_scale=gradient_scale)
        self.staircase = staircase
        self.hard_forward = hard
        self.slope_backward_max = math.inf if slope_backward_max is None else slope_backward_max
        self.straight_through_scale = straight_through_scale
        self.parity = parity and count > 0
        self.register_buffer("slope", torch.zeros(1))

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Staircase at the present slope.

        Args:
            x: values in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: factor on the gradient of the scale.

        Returns:
            Softly quantized values.
        """
        return soft_staircase(
            x,
            scale,
            self.slope,
            lo=self.codes.lo,
            hi=self.codes.hi,
            offset=self.codes.offset,
            staircase=self.staircase,
            hard=self.hard_forward,
            slope_backward_max=self.slope_backward_max,
            gradient_scale=gradient_scale,
            straight_through_scale=self.straight_through_scale,
        )

    def set_slope(self, slope: float) -> None:
        """Set the slope.

        Args:
            slope: new slope, not negative.
        """
        self.slope.fill_(slope)

    def _softened(self, view: Tensor, scale: Tensor) -> Tensor:
        hard, self.hard_forward = self.hard_forward, False
        try:
            return self.fake_quantize(view, scale, 1.0)
        finally:
            self.hard_forward = hard

    def _restrained(self, view: Tensor, scale: Tensor) -> Tensor:
        return damped(scale, scale_parity(view, scale, self._largest())) if self.parity else scale
