"""What an integer network costs: bytes of weights and tables, operations, and how wide its accumulators must be."""

from dataclasses import asdict, dataclass
from typing import Any

from lq.exporting.integer import IntegerNetwork
from lq.exporting.lower import Step
from lq.functional.packing import packed_bytes
from lq.text import format_table

__all__ = ["CostReport", "LayerCost", "integer_cost"]


@dataclass(frozen=True)
class LayerCost:
    """One layer, per image.

    Args:
        path: of the layer.
        float_bytes: of its weights in float32.
        int8_bytes: of its weights as int8.
        packed_bytes: of its weights as codes.
        table_bytes: of its decoder, which all its products share: one entry per code, of a sign and the shifts, or of
            an integer; 0 where codes are integers themselves.
        products: weights times positions.
        shifts: of shifters.
        adds: of the accumulators.
        multiplies: those that remain.
        bound_bits: width that an accumulator needs for the worst input.
        observed_bits: width that it needed so far; 0 before the first run.
    """

    path: str
    float_bytes: int
    int8_bytes: int
    packed_bytes: int
    table_bytes: int
    products: int
    shifts: int
    adds: int
    multiplies: int
    bound_bits: int
    observed_bits: int


@dataclass(frozen=True)
class CostReport:
    """All layers.

    Args:
        rows: one per layer.
    """

    rows: tuple[LayerCost, ...]

    @property
    def total(self) -> LayerCost:
        """Sums, and the largest widths."""
        sums: dict[str, Any] = {"path": "total"}
        for name in asdict(self.rows[0]):
            values = [getattr(row, name) for row in self.rows]
            if name != "path":
                sums[name] = max(values) if name.endswith("_bits") else sum(values)
        return LayerCost(**sums)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Rows and the total, as plain values."""
        return [asdict(row) for row in (*self.rows, self.total)]

    def __str__(self) -> str:
        """A table."""
        headers = ["layer", "float B", "int8 B", "packed B", "table B", "products", "shifts", "adds", "multiplies"]
        rows = [list(row.values()) for row in self.to_dicts()]
        return format_table([*headers, "acc bits, bound", "observed"], rows)


def integer_cost(network: IntegerNetwork) -> CostReport:
    """Cost of an integer network.

    Args:
        network: run it on data first where observed widths are wanted.

    Returns:
        The report.
    """
    return CostReport(tuple(_cost(step, network) for step in network.steps if step.layer is not None))


def _cost(step: Step, network: IntegerNetwork) -> LayerCost:
    plan = step.layer
    assert plan is not None
    count = plan.codes.numel()
    positions = step.node.shape[1] * step.node.shape[2] if len(step.node.shape) == 3 else 1
    used = (plan.table.shifts >= 0).sum(1)[plan.codes.long()]
    multiplies = 0 if plan.shift_add else int((plan.weight != 0).sum()) * positions
    shifts = int(used.sum()) * positions if plan.shift_add else 0
    entries = len(plan.table.value)
    return LayerCost(
        path=plan.path,
        float_bytes=4 * count,
        int8_bytes=count,
        packed_bytes=packed_bytes(count, plan.bits),
        table_bytes=entries * (1 + plan.table.words) if plan.shift_add else 0,
        products=count * positions,
        shifts=shifts,
        adds=shifts or multiplies,
        multiplies=multiplies,
        bound_bits=_width(int(plan.bounds.min()), int(plan.bounds.max())),
        observed_bits=_width(-network.observed[plan.path], network.observed[plan.path])
        if plan.path in network.observed
        else 0,
    )


def _width(low: int, high: int) -> int:
    """Bits of the narrowest two's complement register that holds both."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + 1
