"""Quantization networks: sums of sigmoids between what is scaled on the way in and on the way out."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.codebook import codebook_rows
from lq.functional.hard import hard_quantize
from lq.functional.layout import positive
from lq.functional.levels import CodeRange
from lq.functional.regularizer import chosen_regularizer
from lq.functional.scale import initial_scale, thinned
from lq.functional.sigmoid_sum import reached, sigmoid_sum
from lq.functional.statistics import LevelStatistics, level_statistics
from lq.quantizers.soft import SoftQuantizer

__all__ = ["SigmoidSumQuantizer"]

_WIDER = 1.25
_COLDEST = 10.0
_HOTTER = 20.0  # per unit of the slope
_CLUSTERED = 32  # levels; of more, clusters cost seconds and lose more than twice what even steps do
_APART = 1e-3  # of a step: thresholds keep this far from the zero level
_TOO_MUCH = 2.0  # times the loss of evenly spaced thresholds
_TINY = 1e-30


class SigmoidSumQuantizer(SoftQuantizer):
    """Evenly spaced levels behind fixed thresholds, with one learned scale before and one behind them::

        y = s * (lo + sum over k of sigmoid(T (x/u - b_k))),     T = max(10, 20 k)      (k the slope)

    In evaluation sigmoids are steps. Thresholds lie between the clusters of k-means, as many as there are levels and as
    far above zero as below, and stay; above 5 bits, and where clusters lose more than twice what evenly spaced
    thresholds do, they are those. The temperature rises with the slope as the authors' does with the epochs: they
    multiply 10 or 20 by their number, to 350 or 700 in 35, and this one ends at 320. A cap of 1 on the slope in the
    derivative keeps it at 10 there: a wider derivative leaves deep networks hardly a gradient, a sharper one explodes.

    Args:
        codes: code range.
        **common: arguments of `SoftQuantizer`.

    Source: Yang et al., Quantization Networks, CVPR 2019: u = max|x| / (1.25 Q) at the start. They start with s = u,
        here that is ``scale_init="max"``; by default s is the least-squares scale of the codes.

    >>> quantizer = SigmoidSumQuantizer(CodeRange(-1, 1, 0.0))
    >>> quantizer.calibrate_(torch.tensor([-2.0, -1.8, -0.1, 0.0, 0.1, 1.8, 2.0]))
    >>> [round(y, 4) for y in quantizer.eval()(torch.tensor([-1.5, 0.5, 3.0])).tolist()]
    [-1.9, 0.0, 1.9]
    """

    thresholds: Tensor

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """As many thresholds as codes of that width may need; those of evenly spaced levels until data were seen."""
        super().__init__(codes, **common)
        self.input_scale = nn.Parameter(torch.ones(self.layout.scales))
        self.register_buffer("thresholds", torch.empty(2**codes.bits - 1))
        self.settle_()

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Sum of sigmoids at the present temperature.

        Args:
            x: values in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: factor on the gradients of both scales.

        Returns:
            Softly quantized values.
        """
        return self._sum(x, scale, gradient_scale, self.hard_forward)

    @torch.no_grad()
    def settle_(self) -> None:
        """Make levels their own hard values, in place: what is stored are levels, and they are read again."""
        self.input_scale.copy_(self.scale)
        steps = torch.arange(self.codes.lo, self.codes.hi) + (self.codes.offset + 0.5)
        self._set_thresholds_(steps.to(self.thresholds))

    @torch.no_grad()
    def coarsen_(self, factor: Tensor) -> None:
        """Widen the levels and move the thresholds along, in place.

        Args:
            factor: above 0, shape of the scale or ``(1,)``.
        """
        super().coarsen_(factor)
        self.input_scale.mul_(factor)

    @torch.no_grad()
    def hold(self, codes: Tensor) -> Tensor:
        """Values in the middle between the thresholds of these codes, which stay there as the scales part.

        Args:
            codes: from `encode`.

        Returns:
            Values, dtype of the scale.
        """
        view, unit = self.layout.view(codes), positive(self._unit(self.scale))
        return self._restore(self._middles()[view.long() - self.codes.lo] * unit, codes.shape)

    def limits(self) -> Tensor:
        """Values at which the code changes, ascending, shape ``(L-1,)``; of one scale."""
        return self.thresholds[: self.codes.levels - 1] * positive(self.input_scale.detach())

    @torch.no_grad()
    def calibrate_(self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int = 2) -> None:
        """Set thresholds and both scales from data, in place.

        Args:
            x: the weight, or a sample of activations.
            method: "max" starts both scales alike, every other one behind the thresholds with the least squares.
            importance: of each value, broadcastable to ``x``.
            power: has no meaning here.
        """
        rows = self.layout.rows(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
        even = initial_scale(rows, self.codes, "mse")
        h = self.layout.importance_rows(importance, x)
        if self.codes.levels > _CLUSTERED or self._far_worse_clustered_(x, rows, h, even):
            self.scale.copy_(even)
            self.settle_()
        elif method == "max":
            self.scale.copy_(self.input_scale)

    def _far_worse_clustered_(self, x: Tensor, rows: Tensor, h: Tensor | None, even: Tensor) -> bool:
        """Set thresholds between clusters and scales to suit; whether that loses far more than even steps do."""
        unit = initial_scale(rows, self.codes, "max") / _WIDER
        steps = rows / unit[:, None]
        weights = torch.ones_like(steps) if h is None else h.to(steps)
        self._set_thresholds_(self._between_clusters(steps.reshape(-1), weights.reshape(-1)))
        self.input_scale.copy_(unit)
        codes = reached(rows, unit[:, None], self.thresholds) + (self.codes.lo + self.codes.offset)
        fitted = (weights * codes * rows).sum(1) / (weights * codes * codes).sum(1).clamp_min(_TINY)
        self.scale.copy_(torch.where(fitted > 0, fitted, unit))
        lost = ((rows - self.layout.rows(self.hard(x)).to(rows)).square() * weights).sum()
        nearest = hard_quantize(rows, even[:, None], **self.codes._asdict())
        return float(lost) > _TOO_MUCH * float(((rows - nearest).square() * weights).sum())

    def _between_clusters(self, steps: Tensor, weights: Tensor) -> Tensor:
        """Between clusters of the sample and its mirror image, as many as symmetric levels that reach as far."""
        most = max(-self.codes.lo, self.codes.hi + (1 if self.codes.offset else 0))
        count = 2 * most + (0 if self.codes.offset else 1)
        steps = steps if self.codes.lo else steps.clamp_min(0)
        pool = thinned(torch.stack([torch.cat([steps, -steps]), weights.repeat(2)]))
        centres = codebook_rows(pool[:1], pool[1:], count, 2)[0][0].to(steps)
        found = (centres[1:] + centres[:-1]) / 2
        found = (found - found.flip(0)) / 2  # of equally good clusters some are not their own mirror image
        return found[most + self.codes.lo : most + self.codes.hi]

    def _set_thresholds_(self, found: Tensor) -> None:
        below = -self.codes.lo  # so many lie below the zero level
        if not self.codes.offset:
            found = torch.cat([found[:below].clamp_max(-_APART), found[below:].clamp_min(_APART)])
        self.thresholds.fill_(torch.inf)
        self.thresholds[: len(found)] = found

    def _pull_latent(self, view: Tensor, scale: Tensor, kind: str, scale_gradient: bool) -> Tensor:
        # to the middles between thresholds, which stay: levels of the scale behind them need not lie there
        middles, unit = self._middles().to(view.dtype), positive(self._unit(view)).detach()
        target = middles[self._codes(view) - self.codes.lo] * unit
        return chosen_regularizer(view, target, middles[0] * unit, middles[-1] * unit)

    def _sums_latent(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return level_statistics(view, scale, self.codes, power, chosen=self._codes(view))

    def _middles(self) -> Tensor:
        b = self.thresholds[: self.codes.levels - 1]
        return torch.cat([b[:1] - 0.5, (b[1:] + b[:-1]) / 2, b[-1:] + 0.5])

    def _unit(self, view: Tensor) -> Tensor:
        return self.layout.broadcast(self.input_scale.to(view.dtype))

    def _codes(self, view: Tensor) -> Tensor:
        return reached(view, self._unit(view), self.thresholds) + self.codes.lo

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        return self._sum(view, scale, gradient_scale, True)

    def _sum(self, view: Tensor, scale: Tensor, gradient_scale: float, hard: bool) -> Tensor:
        return sigmoid_sum(
            view,
            scale,
            self._unit(view),
            self.thresholds,
            (_HOTTER * self.slope).clamp_min(_COLDEST),
            lowest=self.codes.lo + self.codes.offset,
            hard=hard,
            gradient_scale=gradient_scale,
            temperature_backward_max=_COLDEST * self.slope_backward_max,
        )

    def _nearest(self, view: Tensor, scale: Tensor) -> Tensor:
        return self._decode(self._codes(view).to(view.dtype), scale)

    def _encode(self, view: Tensor, scale: Tensor) -> Tensor:
        return self._codes(view).to(torch.uint8 if self.codes.lo >= 0 else torch.int8)
