"""Fields of schemas: how one is written with its line of documentation, and how that is printed."""

import copy
import dataclasses
import textwrap
from typing import Any

from omegaconf import MISSING

__all__ = ["doc", "entry", "field_lines", "shown"]

_WIDTH = 118


def doc(text: str, default: Any) -> Any:
    """Field of a schema with its line of documentation.

    Args:
        text: for the help.
        default: of the field.

    Returns:
        The dataclass field.
    """
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def field_lines(node: type[Any], prefix: str) -> list[str]:
    """A line for each field of a schema that has help.

    Args:
        node: a dataclass.
        prefix: of the names.

    Returns:
        Name, sentence and default.
    """
    lines = []
    for f in dataclasses.fields(node):
        if f.name == "_target_" or "help" not in f.metadata:
            continue
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        lines.append(entry(prefix + f.name, shown(f.metadata["help"], default)))
    return lines


def shown(text: str, default: Any) -> str:
    """What is said of a field.

    Args:
        text: on it; the first sentence is taken.
        default: of it.

    Returns:
        The sentence and the default in brackets.
    """
    inside = "required" if default == MISSING else f"default {_plain(default)}"
    return f"{text.split('. ')[0].rstrip('.')} [{inside}]".strip()


def entry(name: str, text: str) -> str:
    """A name and what is said of it, wrapped.

    Args:
        name: on the left.
        text: on the right.

    Returns:
        Lines for a terminal.
    """
    head = f"  {name:<36} "
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
