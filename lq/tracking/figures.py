"""Pictures of a quantized network."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lq.network import distinct_weights, layer_statistics

__all__ = ["alignment_figure", "histograms_figure", "weights_figure"]


def weights_figure(model: nn.Module, most: int = 12) -> Any:
    """Histograms of the weights of each layer with its levels.

    Args:
        model: a quantized model.
        most: layers shown, spread evenly over the network.

    Returns:
        Matplotlib figure.
    """
    layers = dict(distinct_weights(model))

    def panel(path: str) -> tuple[str, Tensor, list[float]]:
        quantizer = layers[path].weight_quantizer
        few = quantizer.layout.scales == 1 and quantizer.codes.levels <= 32
        levels = quantizer.level_values().tolist() if few else []
        return f"{path} ({quantizer.codes.bits} bits)", layers[path].float_weight(), levels

    return histograms_figure("weights (blue) and levels (orange)", list(layers), panel, most)


def histograms_figure(
    title: str, paths: list[str], panel: Callable[[str], tuple[str, Tensor, list[float]]], most: int
) -> Any:
    """Histograms side by side, each with vertical lines.

    Args:
        title: of the figure.
        paths: of the layers.
        panel: from a path, the panel's title, the values, and where the lines are.
        most: layers shown, spread evenly.

    Returns:
        Matplotlib figure.
    """
    from matplotlib.figure import Figure

    picks = torch.linspace(0, len(paths) - 1, min(most, len(paths))).round().long().unique().tolist()
    columns = max(1, min(4, len(picks)))
    rows = max(1, -(-len(picks) // columns))
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows), layout="constrained")
    for i, pick in enumerate(picks):
        name, values, lines = panel(paths[pick])
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.hist(values.detach().float().flatten().cpu().numpy(), bins=160, color="tab:blue")
        for line in lines:
            axes.axvline(line, color="tab:orange", linewidth=0.6)
        axes.set_title(name, fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
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
