"""What surgery did to every layer, and why."""

from dataclasses import asdict, dataclass
from typing import Any

from lq.text import format_table

__all__ = ["QUANTIZED", "SKIPPED", "SwapReport", "SwapRow"]

QUANTIZED, SKIPPED = "quantized", "skipped"
_HEADERS = ("path", "class", "action", "reason", "weight", "bits", "levels", "scales", "input bits", "input")


@dataclass(frozen=True)
class SwapRow:
    """One convolution or linear layer.

    Args:
        path: module path; the first one where a module is shared.
        class_name: class of the float layer.
        action: "quantized" or "skipped".
        reason: why it was skipped, or what is special about it.
        weight_shape: shape of its weight.
        bits: width of a weight code.
        levels: number of weight levels.
        granularity: "tensor" or "channel".
        activation_bits: width of an input code, None for weight-only.
        activation: "auto", "signed", "unsigned" or None.
    """

    path: str
    class_name: str
    action: str
    reason: str = ""
    weight_shape: tuple[int, ...] | None = None
    bits: int | None = None
    levels: int | None = None
    granularity: str | None = None
    activation_bits: int | None = None
    activation: str | None = None


@dataclass(frozen=True)
class SwapReport:
    """Every layer found, in registration order.

    Args:
        rows: one per convolution, linear or similar layer.
        order: how the first and the last block were found.

    >>> print(SwapReport((SwapRow("fc", "Linear", "skipped", "excluded", (10, 4)),), "registration order"))
    path  class   action   reason    weight  bits  levels  scales  input bits  input
    ----  ------  -------  --------  ------  ----  ------  ------  ----------  -----
    fc    Linear  skipped  excluded  10x4    -     -       -       -           -
    0 of 1 layers quantized; first and last block by registration order
    """

    rows: tuple[SwapRow, ...]
    order: str

    @property
    def quantized(self) -> tuple[SwapRow, ...]:
        """Rows of the quantized layers."""
        return tuple(row for row in self.rows if row.action == QUANTIZED)

    @property
    def skipped(self) -> tuple[SwapRow, ...]:
        """Rows of the layers left in float."""
        return tuple(row for row in self.rows if row.action == SKIPPED)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows as plain dictionaries, for tables in a tracking store.

        Returns:
            One dictionary per row.
        """
        return [{**asdict(row), "weight_shape": _shape(row.weight_shape)} for row in self.rows]

    def __str__(self) -> str:
        """The table and a summary line."""
        cells = [
            (
                *(row.path, row.class_name, row.action, row.reason, _shape(row.weight_shape), row.bits, row.levels),
                *(row.granularity, row.activation_bits, row.activation),
            )
            for row in self.rows
        ]
        total = f"{len(self.quantized)} of {len(self.rows)} layers quantized; first and last block by {self.order}"
        return f"{format_table(_HEADERS, cells)}\n{total}"


def _shape(shape: tuple[int, ...] | None) -> str | None:
    return None if shape is None else "x".join(map(str, shape))
