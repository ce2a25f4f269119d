"""Ranges as wide as they must be for accumulators of few bits: widened wherever a sum overflows."""

from typing import Any

import torch
from torch import Tensor

from lq.distributed import sum_
from lq.functional.accumulator import range_factor_step
from lq.functional.levels import CodeRange
from lq.layer_spec import LayerSpec
from lq.quantizers.base import Quantizer
from lq.quantizers.computed_scale import ComputedScaleQuantizer
from lq.quantizers.minmax import MinMaxQuantizer, MovingRangeQuantizer

__all__ = ["OverflowAwareQuantizer", "WidenedRangeQuantizer"]


class _Widened(ComputedScaleQuantizer):
    """A range that is wider than the values by a factor, so that codes and their sums are smaller by it."""

    range_factor: Tensor

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Begin with the range of the values."""
        super().__init__(codes, **common)
        self.register_buffer("range_factor", torch.ones(1))

    def compute_scale(self, rows: Tensor) -> Tensor:
        """Scale of the wider range.

        Args:
            rows: shape ``(C, N)``.

        Returns:
            Scales, shape ``(C,)``.
        """
        return super().compute_scale(rows) * self.range_factor.to(rows)

    @torch.no_grad()
    def widen_(self, factor: Tensor) -> None:
        """Set the factor, in place.

        Args:
            factor: shape ``(1,)``, at least 1.
        """
        self.scale.mul_((factor / self.range_factor).to(self.scale))
        self.range_factor.copy_(factor)


class WidenedRangeQuantizer(_Widened, MovingRangeQuantizer):
    """Moving ranges of activations, times the factor that the weights of the layer find.

    Source: Xie et al., IJCAI 2020.
    """


class OverflowAwareQuantizer(_Widened, MinMaxQuantizer):
    """Min-max ranges of a layer's weights and input, both times one factor that follows its overflows::

        a <- a + min(r log(1 + N), m)        where N sums of a batch overflowed
        a <- max(a - d, 1)                   where none did

    ``N`` counts the layer's outputs, bias aside, that an accumulator of ``accumulator_bits`` cannot hold, over all
    processes. At 8 bits and a factor from 2 to 4, codes have 7 to 6 bits in effect.

    Args:
        codes: code range.
        accumulator_bits: width of a signed accumulator.
        **common: arguments of `Quantizer`.

    Source: Xie et al., Overflow Aware Quantization, IJCAI 2020. Its rates are not published with it: r = 0.01, m = 0.1,
        and d = 0.0001, so that overflows stay rare once the factor is large enough.

    >>> quantizer = OverflowAwareQuantizer(CodeRange(-127, 127, 0.0), accumulator_bits=8)
    >>> quantizer.see_sums_(torch.tensor([[900.0, 100.0]]), WidenedRangeQuantizer(CodeRange(0, 255, 0.0)))
    >>> round(quantizer.range_factor.item(), 4)  # one sum of two is larger than 127
    1.0069
    """

    watches_sums = True

    def __init__(self, codes: CodeRange, *, accumulator_bits: int = 16, **common: Any) -> None:
        """Remember the width."""
        super().__init__(codes, **common)
        self.accumulator_bits = accumulator_bits

    def adopt_(self, spec: LayerSpec) -> None:
        """Take over the code range and the accumulators of another spec.

        Args:
            spec: the layer's new spec.
        """
        super().adopt_(spec)
        self.accumulator_bits = spec.accumulator_bits

    @torch.no_grad()
    def see_sums_(self, sums: Tensor, inputs: Quantizer) -> None:
        """Widen or narrow the ranges of weights and input by the overflows of one batch, in place.

        Args:
            sums: of products of codes.
            inputs: quantizer of the layer's input.
        """
        limit = 2 ** (self.accumulator_bits - 1) - 1
        overflows = sum_((sums.abs() > limit).sum().to(self.range_factor))
        factor = (self.range_factor + range_factor_step(overflows)).clamp_min(1)
        for quantizer in (self, inputs):
            if isinstance(quantizer, _Widened):
                quantizer.widen_(factor)
