"""Weights rounded toward zero, whose sums an accumulator of few bits holds."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.accumulator import bound_l1, l1_bound, project_l1
from lq.functional.hard import lsq_gradient_scale
from lq.functional.layout import damped, positive
from lq.functional.levels import CodeRange
from lq.functional.regularizer import chosen_regularizer
from lq.functional.statistics import LevelStatistics, level_statistics
from lq.layer_spec import LayerSpec
from lq.quantizers.base import Quantizer
from lq.quantizers.lsq import LSQQuantizer
from lq.quantizers.normalizer import WeightNormalizer

__all__ = ["A2QQuantizer", "AccumulatorNormalizer", "limit_of"]


class A2QQuantizer(LSQQuantizer):
    """Levels toward zero of weights whose sum of magnitudes is bounded, so that no accumulator overflows.

    Rounding toward zero never adds to a magnitude: a bound on the weights is one on their codes. The layer normalizes
    its weights to that bound, see `AccumulatorNormalizer`. Without a limit levels are the nearest ones, as LSQ's: so
    stored networks give back what they held.

    Args:
        codes: code range, with a zero.
        limit: largest sum of magnitudes of the codes of a channel; None for no limit.
        centred: whether weights have mean 0 (A2Q+).
        **common: arguments of `Quantizer`.

    Raises:
        ValueError: for levels without a zero.

    Source: Colbert et al., A2Q, ICCV 2023; Colbert et al., A2Q+, ICML 2024.

    >>> quantizer = A2QQuantizer(CodeRange(-3, 3, 0.0), limit=100.0)
    >>> quantizer.eval()(torch.tensor([-1.9, 0.9, 2.0])).tolist()
    [-1.0, 0.0, 2.0]
    """

    def __init__(self, codes: CodeRange, *, limit: float | None = None, centred: bool = False, **common: Any) -> None:
        """Keep the limit."""
        super().__init__(codes, **common)
        if codes.offset:
            name = "a2q_plus" if centred else "a2q"
            raise ValueError(f"grid must be 'mid_tread' or 'full_range' for {name}, got 'mid_rise': it rounds to zero")
        self.limit, self.centred = limit, centred

    def adopt_(self, spec: LayerSpec) -> None:
        """Take over the code range of another spec, and the limit that follows from it.

        Args:
            spec: the layer's new spec.
        """
        super().adopt_(spec)
        self.limit = limit_of(spec, self.centred)

    def largest_norm(self, dtype: torch.dtype) -> Tensor | None:
        """Largest sum of magnitudes of the weights of each channel, a little less than the limit, shape ``(C,)``.

        Args:
            dtype: of the weights: what rounding to it may add is left free.

        Returns:
            At least float32, differentiable in the scale, damped as all gradients of it; None without a limit.
        """
        if self.limit is None:
            return None
        factor = lsq_gradient_scale(self.count, self._largest()) if self.gradient_scale and self.count else 1.0
        return positive(damped(self.scale, factor)) * (self.limit * (1 - 2.0**-14 - 2 * torch.finfo(dtype).eps))

    def make_normalizer(self, weight: Tensor) -> WeightNormalizer:
        """What keeps a weight within the limit.

        Args:
            weight: the weight.

        Returns:
            The normalizer.
        """
        return AccumulatorNormalizer(self._rows(weight.detach()))

    @torch.no_grad()
    def fit_(self, weight: Tensor) -> None:
        """Begin with the nearest weights within the limit: merely scaled down, most would round to zero (A2Q+).

        Args:
            weight: changed in place; its scale is set already.
        """
        limit = self.largest_norm(weight.dtype)
        if limit is not None:
            rows = self._rows(weight)
            weight.copy_(self.layout.unrows(project_l1(rows, limit.to(rows)), weight.shape))

    def _rows(self, weight: Tensor) -> Tensor:
        rows = self.layout.rows(weight).to(torch.promote_types(weight.dtype, torch.float32))
        return rows - rows.mean(1, keepdim=True) if self.centred else rows

    def _pull_latent(self, view: Tensor, scale: Tensor, kind: str, scale_gradient: bool) -> Tensor:
        if self.limit is None:
            return self._pull(view, scale, kind, scale_gradient)
        step = positive(scale.detach())
        target = self._nearest(view.detach(), step)
        return chosen_regularizer(view, target, self.codes.lo * step, self.codes.hi * step)

    def _sums_latent(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return level_statistics(view, scale, self.codes, power, chosen=self._encode(view, scale))

    def _rounding(self) -> dict[str, Any]:
        return {**super()._rounding(), "toward_zero": self.limit is not None}


class AccumulatorNormalizer(WeightNormalizer):
    """Gives every output channel a learned sum of magnitudes, which the quantizer's limit bounds.

    See `lq.functional.accumulator.bound_l1`; the authors have a penalty on what is beyond the limit.

    Args:
        rows: weights, one row per output channel.

    >>> normalizer = AccumulatorNormalizer(torch.tensor([[1.0, -3.0]]))
    >>> normalizer.log_norm
    Parameter containing:
    tensor([2.], requires_grad=True)
    """

    def __init__(self, rows: Tensor) -> None:
        """Start with the norms that there are; rows of zeros with one that lets them grow."""
        super().__init__()
        norm = rows.float().abs().sum(1)
        least = (norm.mean() / 100).clamp_min(torch.finfo(norm.dtype).tiny)
        self.log_norm = nn.Parameter(torch.maximum(norm, least).log2())

    def forward(
        self, weight: Tensor, quantizer: Quantizer, *, bounded: bool = True, scale_gradient: bool = False
    ) -> Tensor:
        """Normalize.

        Args:
            weight: the parameter.
            quantizer: of the weight; its limit and scale make the bound.
            bounded: whether there is one: levels are set without.
            scale_gradient: whether the scale learns from the bound: codes that fill it do not depend on the scale.

        Returns:
            Shape and dtype of the weight.
        """
        assert isinstance(quantizer, A2QQuantizer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        limit = quantizer.largest_norm(weight.dtype) if bounded else None
        if limit is not None:
            limit = (limit if scale_gradient else limit.detach()).to(dtype)
        rows = quantizer.layout.rows(weight).to(dtype)
        bound = bound_l1(rows, self.log_norm.to(dtype), limit, centred=quantizer.centred)
        return quantizer.layout.unrows(bound, weight.shape).to(weight.dtype)


def limit_of(spec: LayerSpec, centred: bool) -> float | None:
    """Largest sum of magnitudes of codes that the accumulators of a spec hold; None where it does not normalize.

    Args:
        spec: the layer's spec.
        centred: whether weights have mean 0 (A2Q+).

    Returns:
        The limit.

    Raises:
        ValueError: where the spec normalizes, but has no accumulators to bound, or one scale for all of them.
    """
    if not spec.normalized:
        return None
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
    return l1_bound(spec.accumulator_bits, largest, centred=centred)
