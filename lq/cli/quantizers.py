"""``lq quantizers``: the methods there are, and what one heeds."""

import argparse
from collections.abc import Sequence

from lq.cli.fields import field_lines
from lq.cli.schema import schema
from lq.quantizers import Method, find_method, method_names
from lq.spec import OPTIONS, LayerSpec
from lq.text import format_table

__all__ = ["details", "main", "table"]


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
        rows.append(_row(name, method))
    return _table(rows)


def details(name: str) -> str:
    """The line of one method, and the fields of `lq.QuantSpec` that it heeds.

    Args:
        name: of the method.

    Returns:
        Lines for a terminal.

    Raises:
        ValueError: for a name that neither the registry nor a package knows.
    """
    method = find_method(name)
    idle = set(OPTIONS) - set(method.options or ())
    fields = schema(LayerSpec, instantiate=False, skip=("quantizer", *idle))
    rest = [] if method.options is not None else ["", "It does not say which other fields it heeds."]
    return "\n".join([_table([_row(name, method)]), "", "Fields that it heeds:", *field_lines(fields, ""), *rest])


def _row(name: str, method: Method) -> tuple[str, ...]:
    low, high = method.bits
    return name, f"{low}-{high}", method.summary, method.learned, method.source


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return format_table(("name", "bits", "what it is", "learned", "source"), rows)


def main(arguments: Sequence[str]) -> None:
    """Print the table, or one method.

    Args:
        arguments: of the command line.
    """
    description = "Methods to quantize with: LearnedQuantization(quantizer=NAME), lq train quantizer=NAME."
    parser = argparse.ArgumentParser(prog="lq quantizers", description=description)
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one and the fields that it heeds")
    name = parser.parse_args(arguments).name
    try:
        print(table() if name is None else details(name))
    except ValueError as error:
        parser.error(str(error))
    except Exception as error:  # whatever an installed package raises
        parser.error(f"{name} cannot be loaded: {type(error).__name__}: {error}")
