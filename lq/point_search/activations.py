"""Input quantizers from histograms of calibration data."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lq.nn import QuantLayer
from lq.point_search.inputs import Batches, Forward, run
from lq.quantizers import ActivationQuantizer
from lq.spec import LayerSpec

__all__ = ["Histogram", "calibrate_inputs"]

_BINS = 2048  # on each side of zero


class Histogram:
    """Counts and sums of values in bins whose width doubles whenever a value lies beyond the last bin.

    The width is a power of two and zero a border of bins, so that no bin mixes signs and doubling merges pairs.
    """

    def __init__(self) -> None:
        """Empty; the first values set the width."""
        self.width = 0.0
        self.counts = torch.zeros(2 * _BINS, dtype=torch.float64)
        self.sums = torch.zeros(2 * _BINS, dtype=torch.float64)
        self.lowest = float("inf")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        """Add all values of a tensor.

        Args:
            x: any shape.

        Raises:
            ValueError: for values that are not finite.
        """
        flat = x.detach().reshape(-1).float()
        low, high = (float(v) for v in torch.aminmax(flat))
        largest = max(-low, high)
        if not largest < float("inf"):
            raise ValueError("activations must be finite, got NaN or infinite values: check the model and the batches")
        self.lowest = min(self.lowest, low)
        if self.width == 0:
            self.width = 2.0 ** (torch.tensor(max(largest, 1e-30) / _BINS).log2().floor().item() + 1)
        while largest >= self.width * _BINS:
            self._double()
        bins = (flat / self.width).floor_().long().add_(_BINS).cpu()
        self.counts += torch.bincount(bins, minlength=2 * _BINS)
        self.sums += torch.bincount(bins, weights=flat.double().cpu(), minlength=2 * _BINS)

    def _double(self) -> None:
        self.width *= 2
        for values in (self.counts, self.sums):
            merged = values.view(-1, 2).sum(1)
            values.zero_()
            values[_BINS // 2 : _BINS // 2 + _BINS] = merged

    def points(self) -> tuple[Tensor, Tensor]:
        """Means and counts of the bins that hold values.

        Returns:
            Two tensors of shape ``(n,)``, float32 and float64.
        """
        used = self.counts > 0
        return (self.sums[used] / self.counts[used]).float(), self.counts[used]


def calibrate_inputs(
    model: nn.Module, layers: Mapping[str, QuantLayer], batches: Batches, forward: Forward | None = None
) -> list[str]:
    """Find the sign, the scale and, where asked for, the points of the input of each layer, in place.

    Args:
        model: with quantized layers, in evaluation mode.
        layers: path to layer.
        batches: on the model's device.
        forward: runs the model on a batch.

    Returns:
        Paths of the layers whose inputs were found.
    """
    quantizers = {path: layer.input_quantizer for path, layer in layers.items() if layer.input_quantizer is not None}
    seen: dict[ActivationQuantizer, Histogram] = {}
    for quantizer in quantizers.values():
        quantizer.observer = seen.setdefault(quantizer, Histogram())
    try:
        run(model, batches, forward)
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    found = []
    for path, quantizer in quantizers.items():
        histogram = seen[quantizer]
        if not bool(histogram.counts.any()):
            continue
        spec = cast(LayerSpec, layers[path].layer_spec)
        values, counts = (t.to(quantizer.signed.device) for t in histogram.points())
        power = spec.power if spec.activation_levels == "subset" else 2
        quantizer.calibrate_(values, histogram.lowest, spec.scale_init, importance=counts, power=power)
        found.append(path)
    return found
