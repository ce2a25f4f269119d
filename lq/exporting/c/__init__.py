"""Self-contained C99 of an integer network, and how to run it from here."""

from lq.exporting.c.generate import CSource, c_source, write_c
from lq.exporting.c.program import CProgram

__all__ = ["CProgram", "CSource", "c_source", "write_c"]
