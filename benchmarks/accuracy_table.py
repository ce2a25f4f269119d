"""The rows of accuracy.csv as a table in Markdown and as a picture."""

import statistics
from pathlib import Path
from typing import Any

from accuracy_rows import rows_of

SPAN = 4.0  # points of accuracy below the best that a panel shows


def _usual(rows: list[dict]) -> dict[str, str]:
    """What most rows have: the protocol."""
    return {name: statistics.mode(row[name] for row in rows) for name in ("extras", "epochs", "lr") if rows}


def _cells(path: Path, network: str) -> dict[str, dict[str, list[float]]]:
    """Accuracies by method, with extras, epochs and learning rate where they are not the usual ones, then by width."""
    cells: dict[str, dict[str, list[float]]] = {}
    rows = [row for row in rows_of(path) if row["network"] == network]
    for row in rows:
        unusual = [f"{column} {row[column]}" for column, value in _usual(rows).items() if row[column] != value]
        name = ", ".join([row["method"], *unusual])
        cells.setdefault(name, {}).setdefault(row["bits"], []).append(float(row["test"] or row["held_out"]))
    return cells


def show(path: Path, network: str) -> str:
    """Accuracy as a table in Markdown: mean, and standard error where there are several seeds."""
    cells = _cells(path, network)
    widths = sorted({width for columns in cells.values() for width in columns})
    lines = ["| | " + " | ".join(f"W{w}A{w}" for w in widths) + " |", "| --- |" + " --: |" * len(widths)]
    for name, columns in cells.items():
        lines.append(f"| {name} | " + " | ".join(spread(columns.get(w, [])) for w in widths) + " |")
    return "\n".join(lines)


def spread(values: list[float], *, sign: bool = False) -> str:
    """Mean, and standard error where there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.2f} ({len(values)})"


def picture(path: Path, network: str) -> Path:
    """Methods as they are, of the usual extras and budget, as dots, best above, a panel per width; errors as bars."""
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(path) if row["network"] == network]
    own = [row for row in rows if "=" not in row["method"]]  # those with --set are not the method's own
    rows = own if any(row["method"] != "float" for row in own) else rows
    usual = [row for row in rows if all(row[name] == value for name, value in _usual(rows).items())]
    widths = sorted({row["bits"] for row in usual if row["method"] != "float"} or {row["bits"] for row in usual})
    found = {width: _by_method(usual, width) for width in widths}
    height = 0.3 * max(len(values) for values in found.values()) + 1.2
    figure = Figure(figsize=(4.6 * len(widths), height), layout="constrained")
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        _panel(axes, found[width])
        axes.set(title=f"W{width}A{width}", xlabel="accuracy in %")
    target = path.with_name(f"{path.stem}_{network}.png")
    figure.savefig(target, dpi=120)
    return target


def _by_method(rows: list[dict], width: str) -> dict[str, list[float]]:
    """Accuracies at one width, the float network's beside them, best mean first."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["bits"] == width or row["method"] == "float":
            values.setdefault(row["method"], []).append(float(row["test"] or row["held_out"]))
    return dict(sorted(values.items(), key=lambda item: -statistics.mean(item[1])))


def _panel(axes: Any, methods: dict[str, list[float]]) -> None:
    means = [statistics.mean(values) for values in methods.values()]
    best = max([mean for name, mean in zip(methods, means, strict=True) if name != "float"] or means)
    edge = best - SPAN  # what is further behind is an arrow, so that the rest can be told apart
    for y, ((name, values), mean) in enumerate(zip(methods.items(), means, strict=True)):
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
        ours = name.split(",")[0] in ("soft", "subset")
        colour = "tab:grey" if name == "float" else "tab:orange" if ours else "tab:blue"
        marker = "<" if mean < edge else "o"
        axes.errorbar(max(mean, edge), y, xerr=error, fmt=marker, color=colour, capsize=3)
        axes.annotate(f"{mean:.2f}", (max(mean, edge), y), (4, 5), textcoords="offset points", fontsize=7)
    axes.set_yticks(range(len(methods)), list(methods), fontsize=8)
    axes.set_ylim(len(methods) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3)
