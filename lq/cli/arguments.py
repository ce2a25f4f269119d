"""Arguments of the form FIELD=VALUE for commands that are one dataclass and no Hydra application."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lq.cli.fields import field_lines

__all__ = ["parse", "usage"]


def parse(schema: type[Any], arguments: Sequence[str]) -> Any:
    """Read arguments into a dataclass.

    Args:
        schema: the dataclass; fields without a default are required.
        arguments: of the command line, such as ``["bits=4", "allow=[a,b]"]``.

    Returns:
        The configuration.

    Raises:
        ValueError: for unknown or missing fields and for values of another type.

    >>> @dataclasses.dataclass
    ... class Config:
    ...     bits: int = 4
    >>> parse(Config, ["bits=3"]).bits
    3
    """
    kinds = {f.name: f.type for f in dataclasses.fields(schema)}
    literal, others = {}, []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in kinds:
            raise ValueError(f"arguments must read FIELD=VALUE, got {argument!r}: the fields are {', '.join(kinds)}")
        if kinds[name] is str:
            literal[name] = value  # a path may look like a number, a list or an interpolation
        else:
            others.append(argument)
    missing = [f.name for f in dataclasses.fields(schema) if f.default == MISSING and f.name not in literal]
    if missing:
        raise ValueError(f"{missing[0]} must be given: {missing[0]}=...")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema(**dict.fromkeys(literal, ""))), OmegaConf.from_cli(others))
        found: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{' '.join(others)}: {str(error).splitlines()[0]}") from error
    return dataclasses.replace(found, **literal)


def usage(head: str, schema: type[Any]) -> str:
    """Help of a command.

    Args:
        head: what it does and how it is called.
        schema: its fields.

    Returns:
        Lines for a terminal.
    """
    required = [f"{f.name}=..." for f in dataclasses.fields(schema) if f.default == MISSING]
    return "\n".join([f"usage: {head} {' '.join(required)} [FIELD=VALUE] ...", "", *field_lines(schema, "")])
