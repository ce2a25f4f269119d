"""Pictures of a quantized network."""

from typing import Any

import torch
from torch import nn

from lq.network import distinct_weights, layer_statistics

__all__ = ["alignment_figure", "weights_figure"]


def weights_figure(model: nn.Module, most: int = 12) -> Any:
    """Histograms of the weights of each layer with its levels.

    Args:
        model: a quantized model.
        most: layers shown, spread evenly over the network.

    Returns:
        Matplotlib figure.
    """
    from matplotlib.figure import Figure

    layers = list(distinct_weights(model))
    picks = torch.linspace(0, len(layers) - 1, min(most, len(layers))).round().long().unique().tolist()
    columns = min(4, len(picks))
    rows = -(-len(picks) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows), layout="constrained")
    for i, pick in enumerate(picks):
        path, layer = layers[pick]
        quantizer = layer.weight_quantizer
        axes = figure.add_subplot(rows, columns, i + 1)
        weights = layer.float_weight().detach().float().flatten().cpu()
        axes.hist(weights.numpy(), bins=160, color="tab:blue")
        if quantizer.layout.scales == 1 and quantizer.codes.levels <= 32:
            for level in quantizer.level_values().tolist():
                axes.axvline(level, color="tab:orange", linewidth=0.6)
        axes.set_title(f"{path} ({quantizer.codes.bits} bits)", fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
    figure.suptitle("weights (blue) and levels (orange)", fontsize=9)
    return figure


def alignment_figure(model: nn.Module) -> Any:
    """Alignment and SQNR of every layer.

    Args:
        model: a quantized model.

    Returns:
        Matplotlib figure.
    """
    from matplotlib.figure import Figure

    statistics = layer_statistics(model)
    figure = Figure(figsize=(9, 0.9 + 0.2 * len(statistics)), layout="constrained")
    for i, (name, label) in enumerate((("alignment", "alignment"), ("sqnr_db", "SQNR in dB"))):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.barh(list(statistics), [float(getattr(sums, name)) for sums in statistics.values()], color="tab:blue")
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.tick_params(labelsize=7, labelleft=i == 0)
    return figure
