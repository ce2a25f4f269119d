"""Constants of the C file, and how many bytes of flash they take."""

from typing import Any

from torch import Tensor

from lq.exporting.c.sizes import struct_of
from lq.exporting.graph import UnsupportedError

__all__ = ["Constants"]

_BYTES = {"uint8_t": 1, "int8_t": 1, "int16_t": 2, "int32_t": 4, "int64_t": 8}


class Constants:
    """Arrays and structs in the order in which they are defined."""

    def __init__(self) -> None:
        """None yet."""
        self.texts: list[str] = []
        self.flash = 0

    def array(self, kind: str, name: str, values: Tensor) -> str:
        """An array of integers.

        Args:
            kind: C type of an element.
            name: of the array.
            values: integers.

        Returns:
            The name.

        Raises:
            UnsupportedError: for points that 16 bits do not hold.
        """
        if kind == "int16_t" and bool((values.abs() > 32767).any()):
            raise UnsupportedError(f"{name}: points must be below 2^15 over their smallest power of two for C")
        flat = [f"INT64_C({v})" if kind == "int64_t" else str(v) for v in values.reshape(-1).tolist()]
        self.flash += _BYTES[kind] * len(flat)
        lines = [", ".join(flat[k : k + 24]) for k in range(0, len(flat), 24)]
        self.texts.append(f"static const {kind} {name}[{len(flat)}] = {{\n" + ",\n".join(lines) + "};")
        return name

    def struct(self, kind: str, name: str, fields: dict[str, Any]) -> str:
        """A struct with named fields.

        Args:
            kind: C type.
            name: of the struct.
            fields: name to text of the value.

        Returns:
            The name.
        """
        self.texts.append(f"static const {kind} {name} = {struct_of(fields)};")
        return name
