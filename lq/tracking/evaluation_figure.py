"""Picture of deployed networks side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["evaluation_figure"]


def evaluation_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy over size, one point per network.

    Args:
        rows: with "network", "kind", "accuracy" and "bytes".

    Returns:
        Matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        sizes = [row["bytes"] / 1024 for row in of_kind]
        axes.scatter(sizes, [100 * row["accuracy"] for row in of_kind], label=kind)
    for i, row in enumerate(rows):
        axes.annotate(
            str(i + 1), (row["bytes"] / 1024, 100 * row["accuracy"]), xytext=(4, 4), textcoords="offset points"
        )
    axes.set_xscale("log")
    axes.set_xlabel("KiB")
    axes.set_ylabel("accuracy in %")
    axes.set_title("deployed networks, numbered as in the table")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
