"""Self-contained C99 of an integer network."""

from lq.exporting.c.generate import CSource, c_source, write_c

__all__ = ["CSource", "c_source", "write_c"]
