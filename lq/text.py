"""Plain text tables for reports, logs and terminals."""

from collections.abc import Sequence
from typing import Any

__all__ = ["format_table"]


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Table with aligned columns: numbers to the right, the rest to the left.

    Args:
        headers: column titles.
        rows: cells; None is shown as "-", floats with four significant digits.

    Returns:
        Lines joined by newlines, without a trailing one.

    >>> print(format_table(["name", "bits"], [["conv1", 8], ["fc", None]]))
    name   bits
    -----  ----
    conv1     8
    fc        -
    """
    cells = [[_cell(value) for value in row] for row in rows]
    columns = [[row[i] for row in rows if row[i] is not None] for i in range(len(headers))]
    right = [bool(column) and all(isinstance(value, int | float) for value in column) for column in columns]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if align else text.ljust(width)
            for text, width, align in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
