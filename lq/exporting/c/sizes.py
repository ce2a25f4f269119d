"""How a layer looks in C: types of its numbers, sizes of its buffers, texts."""

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lq.exporting.graph import UnsupportedError
from lq.exporting.lower import LayerPlan, Step
from lq.functional.fixed_point import Multiplier

__all__ = [
    "BLOCK",
    "TYPES",
    "CSource",
    "accumulators_of",
    "image_shape",
    "is_narrow",
    "plan_of",
    "rounding_of",
    "struct_of",
    "taps_of",
    "taps_per_byte",
    "text_of",
    "type_of",
    "work_bytes",
]

BLOCK = 16  # accumulators that the C code computes at a time
GROUPS = 64  # of taps: a place of a shifter and a sign
TYPES = (("int8_t", 1, -128, 127), ("uint8_t", 1, 0, 255), ("int16_t", 2, -32768, 32767))


@dataclass(frozen=True)
class CSource:
    """A network in C.

    Args:
        text: of the file.
        flash_bytes: constants: packed weights, tables, multipliers.
        ram_bytes: buffers, accumulators and taps.
        input_type: C type of an input code.
    """

    text: str
    flash_bytes: int
    ram_bytes: int
    input_type: str


def plan_of(step: Step) -> LayerPlan:
    """The plan of a step that is a layer."""
    assert step.layer is not None
    return step.layer


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels, rows and columns; a vector is channels of one pixel."""
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)


def type_of(plan: LayerPlan) -> int:
    """Which of `TYPES` holds the integers of a layer's input."""
    low, high = plan.takes.range
    for i, (_, _, least, most) in enumerate(TYPES):
        if least <= low and high <= most:
            return i
    raise UnsupportedError(f"{plan.path}: its input points must be below 2^15 for C: choose fewer powers of two")


def is_narrow(plan: LayerPlan) -> bool:
    """Whether 16 bits hold the sum of the eight taps of one pass."""
    factor = int(plan.table.value.abs().max())
    if plan.shift_add:
        factor = 1 << int(plan.table.shifts.max().clamp_min(0))
    return 8 * max(abs(end) for end in plan.takes.range) * factor <= 32767


def taps_per_byte(plan: LayerPlan) -> int:
    """How many inputs 8 bits hold the sum of."""
    low, high = plan.takes.range
    most = 255 // max(high, 1) if low >= 0 else min(128 // -low, 127 // max(high, 1))
    return min(max(most, 1), 255)


def taps_of(plan: LayerPlan) -> int:
    """Most taps of one output channel."""
    return plan.codes[0].numel() * (plan.table.words if plan.shift_add else 1)


def accumulators_of(step: Step) -> int:
    """Accumulators of one output channel, those between the rows of a frame included."""
    plan = plan_of(step)
    _, height, width = image_shape(step.node.shape)
    stride = plan.conv["stride"]
    if stride != (1, 1):  # one row of results, and the columns between them
        count = (width - 1) * stride[1] + 1
    else:
        reach = plan.conv["dilation"][1] * (plan.codes.shape[3] - 1)  # a row of the frame is that much longer
        count = (height - 1) * (width + reach) + width
    return -(-count // BLOCK) * BLOCK


def work_bytes(accumulators: int, line: int, taps: int) -> int:
    """RAM beside the buffers: sums, a row of results, taps with their factors, and where each group of them begins."""
    return 4 * (accumulators + line) + (4 + 2) * taps + 4 + 4 * (GROUPS + 1)


def rounding_of(by: Multiplier) -> dict[str, Any]:
    """Fields of a multiplier that adds nothing."""
    return {"m": int(by.m), "half": f"INT64_C({int(by.half)})", "n": int(by.n)}


def struct_of(fields: dict[str, Any]) -> str:
    """Initialiser of a struct with named fields."""
    return "{" + ", ".join(f".{name} = {value}" for name, value in fields.items()) + "}"


def text_of(name: str) -> str:
    """A file of C beside this one."""
    return (files("lq.exporting.c") / name).read_text(encoding="utf-8")
