"""Alignment and quantization loss as torchmetrics, synchronised over ranks, usable with or without the callbacks."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lq.quantizers import Quantizer

__all__ = ["Alignment", "QuantizationLoss"]


class Alignment(Metric):
    """Alignment of values with the levels of their quantizer: ``1 - 4 mean(d)``.

    ``d`` is the distance, in steps, of the clipped value to its nearest level: 1 on the levels, 0 for uniform
    residuals, -1 midway.

    Args:
        soft: describe what training sees of the values instead of the values.
        **kwargs: of `torchmetrics.Metric`.

    >>> from lq.functional import code_range
    >>> from lq.quantizers import LSQQuantizer
    >>> metric = Alignment()
    >>> metric.update(torch.tensor([0.0, 1.0, 0.25]), LSQQuantizer(code_range(2)))
    >>> round(metric.compute().item(), 4)
    0.6667
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    distance: Tensor
    count: Tensor

    def __init__(self, soft: bool = False, **kwargs: Any) -> None:
        """Start with empty sums."""
        super().__init__(**kwargs)
        self.soft = soft
        for name in ("distance", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, quantizer: Quantizer) -> None:
        """Add values.

        Args:
            values: weights or activations, any shape.
            quantizer: their quantizer.
        """
        sums = quantizer.statistics(values.detach(), soft=self.soft)
        self.distance += sums.distance
        self.count += sums.count

    def compute(self) -> Tensor:
        """Alignment of everything added.

        Returns:
            Scalar in [-1, 1].
        """
        return (1 - 4 * self.distance / self.count).float()


class QuantizationLoss(Metric):
    """Quantization loss ``sum |x - Q(x)|^p``, or the signal-to-quantization-noise ratio of everything added.

    Args:
        power: p, 2 or 4.
        sqnr: give ``10 log10(sum |x|^p / loss)`` in decibels instead.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: for another power.

    >>> from lq.functional import code_range
    >>> from lq.quantizers import LSQQuantizer
    >>> metric = QuantizationLoss()
    >>> metric.update(torch.tensor([0.0, 1.0, 0.25]), LSQQuantizer(code_range(2)))
    >>> metric.compute().item()
    0.0625
    """

    is_differentiable = False
    full_state_update = False
    loss: Tensor
    energy: Tensor

    def __init__(self, power: int = 2, sqnr: bool = False, **kwargs: Any) -> None:
        """Start with empty sums."""
        if power not in (2, 4):
            raise ValueError(f"power must be 2 or 4, got {power!r}: choose one of those")
        super().__init__(**kwargs)
        self.power = power
        self.sqnr = sqnr
        for name in ("loss", "energy"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, quantizer: Quantizer) -> None:
        """Add values.

        Args:
            values: weights or activations, any shape.
            quantizer: their quantizer.
        """
        sums = quantizer.statistics(values.detach(), power=self.power)
        self.loss += sums.loss
        self.energy += sums.energy

    def compute(self) -> Tensor:
        """Loss or ratio of everything added.

        Returns:
            Scalar.
        """
        return (10 * torch.log10(self.energy / self.loss) if self.sqnr else self.loss).float()
