"""Weights rounded toward zero, whose sums an accumulator of few bits holds."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.accumulator import bound_l1, l1_bound, project_l1
from lq.functional.hard import hard_quantize, lsq_quantize, quantize
from lq.functional.layout import positive
from lq.functional.levels import CodeRange
from lq.quantizers.base import Quantizer
from lq.quantizers.normalizer import WeightNormalizer
from lq.spec import LayerSpec

__all__ = ["A2QQuantizer", "AccumulatorNormalizer"]

_INSIDE = 1 - 2.0**-13  # where a norm that crossed its bound is put: so far inside that it goes on learning


class A2QQuantizer(Quantizer):
    """Levels toward zero; with ``normalize`` no accumulator of a given width can overflow.

    Rounding toward zero never adds to a magnitude: a bound on the weights is one on their codes. The layer normalizes
    its weights to that bound, see `AccumulatorNormalizer`.

    Args:
        codes: code range, with a zero.
        limit: largest sum of magnitudes of the codes of a channel; infinity for no limit.
        centred: whether weights have mean 0 (A2Q+).
        **common: arguments of `Quantizer`.

    Raises:
        ValueError: for levels without a zero.

    Source: Colbert et al., A2Q, ICCV 2023; Colbert et al., A2Q+, ICML 2024.

    >>> quantizer = A2QQuantizer(CodeRange(-3, 3, 0.0))
    >>> quantizer.eval()(torch.tensor([-1.9, 0.9, 2.0])).tolist()
    [-1.0, 0.0, 2.0]
    """

    def __init__(self, codes: CodeRange, *, limit: float = float("inf"), centred: bool = False, **common: Any) -> None:
        """Keep the limit."""
        super().__init__(codes, **common)
        if codes.offset:
            raise ValueError("grid must be 'mid_tread' or 'full_range' for a2q, got 'mid_rise': it rounds to zero")
        self.limit, self.centred = limit, centred

    @property
    def largest_norm(self) -> Tensor:
        """Largest sum of magnitudes of the weights of each channel, shape ``(C,)``."""
        return self.limit * positive(self.scale)

    def make_normalizer(self, weight: Tensor) -> WeightNormalizer:
        """What keeps a weight within the limit.

        Args:
            weight: the weight.

        Returns:
            The normalizer.
        """
        return AccumulatorNormalizer(self.layout.rows(weight), centred=self.centred)

    @torch.no_grad()
    def fit_(self, weight: Tensor) -> None:
        """Begin with the nearest weights within the limit: merely scaled down, most would round to zero (A2Q+).

        Args:
            weight: changed in place; its scale is set already.
        """
        if self.limit < float("inf"):
            rows = self.layout.rows(weight).to(torch.promote_types(weight.dtype, torch.float32))
            rows = rows - rows.mean(1, keepdim=True) if self.centred else rows
            weight.copy_(self.layout.unrows(project_l1(rows, self.largest_norm.to(rows)), weight.shape))

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Levels toward zero; gradients as if nothing were rounded, and those of the scale as LSQ's.

        Args:
            x: values in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: factor on the gradient of the scale.

        Returns:
            Levels.
        """
        return lsq_quantize(x, scale, gradient_scale=gradient_scale, toward_zero=True, **self.codes._asdict())

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        return self.fake_quantize(view, scale, gradient_scale)

    def _nearest(self, view: Tensor, scale: Tensor) -> Tensor:
        return hard_quantize(view, scale, toward_zero=True, **self.codes._asdict())

    def _encode(self, view: Tensor, scale: Tensor) -> Tensor:
        return quantize(view, scale, toward_zero=True, **self.codes._asdict()).to(torch.int8)


class AccumulatorNormalizer(WeightNormalizer):
    """Gives every output channel a learned sum of magnitudes, which the quantizer's limit bounds::

        w = v * min(2^t, T s) / sum |v|              (v the parameter, T the limit in steps, s the scale)

    In training t is put back to the bound after it has crossed it, in place of the authors' penalty on what is beyond.

    Args:
        rows: weights, one row per output channel.
        centred: whether the mean of every channel is taken from it first.

    >>> normalizer = AccumulatorNormalizer(torch.tensor([[1.0, -3.0]]))
    >>> normalizer.log_norm
    Parameter containing:
    tensor([2.], requires_grad=True)
    """

    def __init__(self, rows: Tensor, *, centred: bool = False) -> None:
        """Start with the norm that there is."""
        super().__init__()
        self.centred = centred
        rows = rows.detach().float()
        norm = (rows - rows.mean(1, keepdim=True) if centred else rows).abs().sum(1)
        self.log_norm = nn.Parameter(norm.clamp_min(torch.finfo(norm.dtype).tiny).log2())

    def forward(self, weight: Tensor, quantizer: Quantizer, *, bounded: bool = True) -> Tensor:
        """Normalize.

        Args:
            weight: the parameter.
            quantizer: of the weight; its limit and scale make the bound.
            bounded: whether there is one: levels are set without.

        Returns:
            Shape and dtype of the weight.
        """
        rows = quantizer.layout.rows(weight).to(self.log_norm.dtype)
        limit = None
        if bounded and isinstance(quantizer, A2QQuantizer) and quantizer.limit < float("inf"):
            limit = quantizer.largest_norm.detach()
            if self.training:
                with torch.no_grad():
                    self.log_norm.copy_(torch.minimum(self.log_norm, (limit * _INSIDE).log2()))
        bound = bound_l1(rows, self.log_norm.exp2(), limit, centred=self.centred)
        return quantizer.layout.unrows(bound, weight.shape).to(weight.dtype)


def a2q_weight(spec: LayerSpec, codes: CodeRange, centred: bool, **common: Any) -> A2QQuantizer:
    """The weight quantizer that a spec describes.

    Args:
        spec: the layer's spec.
        codes: code range.
        centred: whether weights have mean 0 (A2Q+).
        **common: arguments of `Quantizer`.

    Returns:
        The quantizer.

    Raises:
        ValueError: where the spec normalizes, but has no accumulators to bound, or one scale for all of them.
    """
    if not spec.normalize:
        return A2QQuantizer(codes, **common)
    if spec.activation is None:
        raise ValueError(
            f"activation must not be None for {spec.quantizer}, got None: accumulators are of integer inputs, take auto"
        )
    if spec.granularity != "channel":
        raise ValueError(
            f"granularity must be 'channel' for {spec.quantizer}, got {spec.granularity!r}: every output channel has "
            "an accumulator of its own"
        )
    # an input that turns out to be signed has codes of half that magnitude
    largest = spec.activation_codes(signed=spec.activation == "signed" and not centred).hi
    return A2QQuantizer(
        codes, limit=l1_bound(spec.accumulator_bits, largest, centred=centred), centred=centred, **common
    )
