"""``lq quantizers``: the methods there are."""

import argparse
from collections.abc import Sequence

from lq.quantizers import find_method, method_names
from lq.text import format_table

__all__ = ["main", "table"]


def table() -> str:
    """One line for every method: of `lq`, registered, or offered by an installed package.

    Returns:
        The table.
    """
    rows = []
    for name in method_names():
        try:
            method = find_method(name)
        except Exception as error:  # whatever an installed package raises must not hide the others
            rows.append((name, "", f"cannot be loaded: {type(error).__name__}: {error}", "", ""))
            continue
        low, high = method.bits
        rows.append((name, f"{low}-{high}", method.summary, method.learned, method.source))
    return format_table(("name", "bits", "what it is", "learned", "source"), rows)


def main(arguments: Sequence[str]) -> None:
    """Print the table.

    Args:
        arguments: of the command line.
    """
    description = "Methods to quantize with: LearnedQuantization(quantizer=NAME), lq train quantizer=NAME."
    argparse.ArgumentParser(prog="lq quantizers", description=description).parse_args(arguments)
    print(table())
