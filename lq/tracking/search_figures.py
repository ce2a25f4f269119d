"""Pictures of a searched network."""

from typing import Any

from torch import Tensor, nn

from lq.functional.layout import positive
from lq.network import distinct_weights
from lq.point_search import SearchReport
from lq.quantizers import PointQuantizer
from lq.tracking.figures import histograms_figure

__all__ = ["accuracy_figure", "loss_figure", "points_figure"]


def points_figure(model: nn.Module, most: int = 12) -> Any:
    """Histograms of the weights of each layer in units of their scale, with the chosen points.

    Args:
        model: a searched model.
        most: layers shown, spread evenly over the network.

    Returns:
        Matplotlib figure.
    """
    layers = {
        path: layer for path, layer in distinct_weights(model) if isinstance(layer.weight_quantizer, PointQuantizer)
    }

    def panel(path: str) -> tuple[str, Tensor, list[float]]:
        quantizer = layers[path].weight_quantizer
        assert isinstance(quantizer, PointQuantizer)
        values = quantizer.layout.rows(layers[path].float_weight().detach().float())
        values = values / positive(quantizer.scale.detach()).reshape(-1, 1)
        largest = 1.3 * float(quantizer.points.abs().max())
        levels = quantizer.point_set.levels
        lines = (levels if levels.dim() == 1 else levels[0]).tolist()
        return f"{path} ({quantizer.codes.bits} bits)", values.clamp(-largest, largest), lines

    title = "weights over their scale (blue) and chosen points (orange)"
    return histograms_figure(title, list(layers), panel, most)


def loss_figure(report: SearchReport) -> Any:
    """Quantization loss of each layer beside that of the best uniform levels, all relative to free levels.

    Args:
        report: of a search with ``reference=True``; without it the SQNR of each layer is drawn.

    Returns:
        Matplotlib figure.
    """
    from matplotlib.figure import Figure

    rows = [r for r in report.rows if r.reference_loss]
    shown = rows or list(report.rows)
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    names = [r.path for r in shown]
    if rows:
        for label, marker, losses in (
            ("chosen points", "o", [r.loss for r in rows]),
            ("uniform, mid-rise", "|", [r.mid_rise_loss for r in rows]),
            ("uniform, mid-tread", "x", [r.mid_tread_loss for r in rows]),
        ):
            relative = [(a or 0) / (r.reference_loss or 1) for a, r in zip(losses, rows, strict=True)]
            axes.plot(relative, names, marker, label=label)
        axes.axvline(1.0, color="gray", linewidth=0.8, label="free levels (k-means)")
        axes.set_xlabel("quantization loss over that of as many free levels")
        figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    else:
        axes.barh(names, [r.sqnr_db for r in shown], color="tab:blue")
        axes.set_xlabel("SQNR in dB")
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    return figure


def accuracy_figure(before: float, after: float) -> Any:
    """Test accuracy before and after.

    Args:
        before: of the float network, from 0 to 1.
        after: of the searched one.

    Returns:
        Matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(["float", "searched"], [100 * before, 100 * after], color=["gray", "tab:blue"])
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_ylabel("test accuracy in %")
    return figure
