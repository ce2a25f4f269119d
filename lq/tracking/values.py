"""Figures of a quantized network as one flat dictionary, read from the device in one go."""

import torch
from torch import Tensor, nn

from lq.functional.statistics import LevelStatistics
from lq.network import layer_statistics, network_size
from lq.tracking.names import layer_metric, metric

__all__ = ["network_metrics"]

_SHARED = ("alignment", "sqnr_db", "clipped_fraction", "zero_fraction")


def network_metrics(
    model: nn.Module, *, layers: bool = True, statistics: dict[str, LevelStatistics] | None = None
) -> dict[str, float]:
    """Alignment, quantization loss, SQNR, clipped and zero fractions and sizes of a quantized network.

    Args:
        model: a quantized model.
        layers: whether to give the figures of every layer, too.
        statistics: `lq.network.layer_statistics` of the model, where they are known already.

    Returns:
        Metric name to value, in the names of `lq.tracking.names`.
    """
    hard = layer_statistics(model) if statistics is None else statistics
    soft = layer_statistics(model, soft=True)
    values: dict[str, Tensor] = _describe(_total(hard), "")
    values[metric("alignment_soft")] = _total(soft).alignment
    if layers:
        for path, sums in hard.items():
            values |= _describe(sums, path)
            values[layer_metric("alignment_soft", path)] = soft[path].alignment
    numbers = torch.stack(list(values.values())).tolist()
    size = network_size(model)
    sizes = {metric("size_bytes"): float(size.packed_bytes), metric("bits_per_weight"): size.bits_per_weight}
    return dict(zip(values, numbers, strict=True)) | sizes


def _total(parts: dict[str, LevelStatistics]) -> LevelStatistics:
    return LevelStatistics(*(torch.stack(column).sum() for column in zip(*parts.values(), strict=True)))


def _describe(sums: LevelStatistics, path: str) -> dict[str, Tensor]:
    named = {name: getattr(sums, name) for name in _SHARED} | {"quantization_loss": sums.loss}
    return {layer_metric(name, path) if path else metric(name): value for name, value in named.items()}
