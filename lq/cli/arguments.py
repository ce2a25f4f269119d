"""Arguments of the form FIELD=VALUE for commands that are one dataclass and no Hydra application."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lq.cli.help import field_lines

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
    names = [f.name for f in dataclasses.fields(schema)]
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not equals or name not in names:
            raise ValueError(f"arguments must read FIELD=VALUE, got {argument!r}: the fields are {', '.join(names)}")
    config: Any = OmegaConf.structured(schema)
    try:
        config = OmegaConf.merge(config, OmegaConf.from_cli(list(arguments)))
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    missing = [name for name in names if OmegaConf.is_missing(config, name)]
    if missing:
        raise ValueError(f"{missing[0]} must be given: {missing[0]}=...")
    return config


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
