"""Configuration schemas made from the signatures and docstrings of what they configure, so that each is said once."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

__all__ = ["argument_docs", "schema"]

_SIMPLE = (bool, int, float, str)


def schema(
    target: Callable[..., Any], *, instantiate: bool = True, skip: tuple[str, ...] = (), **defaults: Any
) -> type[Any]:
    """Dataclass for Hydra with one field per argument of a function or class; unknown keys are rejected by it.

    Args:
        target: what is configured.
        instantiate: whether to add ``_target_``, so that Hydra can call it.
        skip: arguments that are no settings.
        **defaults: defaults that differ from the signature's.

    Returns:
        The dataclass; each field carries its line of documentation as metadata "help".

    >>> def resize(size: int, mode: str = "area"):
    ...     '''Resize.
    ...
    ...     Args:
    ...         size: in pixels.
    ...         mode: how.
    ...     '''
    >>> [(f.name, f.metadata.get("help")) for f in dataclasses.fields(schema(resize, instantiate=False))]
    [('size', 'in pixels.'), ('mode', 'how.')]
    """
    callable_ = target.__init__ if inspect.isclass(target) and not dataclasses.is_dataclass(target) else target
    hints = get_type_hints(callable_) if callable_ is not target else get_type_hints(target)
    docs = argument_docs(target)
    fields: list[Any] = []
    if instantiate:
        path = f"{target.__module__}.{target.__qualname__}"
        fields.append(("_target_", str, dataclasses.field(default=path, metadata={"help": ""})))
    for name, parameter in inspect.signature(target).parameters.items():
        if name in skip or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = defaults.get(name, MISSING if parameter.default is parameter.empty else parameter.default)
        fields.append((name, _type(hints.get(name, Any)), _field(default, docs.get(name, ""))))
    return dataclasses.make_dataclass(f"{target.__name__}Schema", fields)


def _field(default: Any, help_: str) -> Any:
    metadata = {"help": help_}
    if isinstance(default, tuple | list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    if repr(default) == "<factory>":  # an empty mapping; null in its place can be overridden with new keys
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _type(hint: Any) -> Any:
    """The type where OmegaConf can check it, else Any."""
    if hint in _SIMPLE:
        return hint
    inner = [a for a in get_args(hint) if a is not type(None)]
    if len(inner) == 1 and len(get_args(hint)) == 2 and inner[0] in _SIMPLE:
        return inner[0] | None
    return Any


def argument_docs(target: Callable[..., Any]) -> dict[str, str]:
    """First sentence on each argument, from the "Args" section of a docstring.

    Args:
        target: function or class.

    Returns:
        Argument to sentence.
    """
    docs: dict[str, str] = {}
    sources = [target, target.__init__, *target.__mro__[1:]] if inspect.isclass(target) else [target]
    for source in reversed(sources):
        section = re.search(r"Args:\n(.*?)(\n\n\s*[A-Z]|\n\n\s*>>>|\Z)", inspect.getdoc(source) or "", re.DOTALL)
        if section is None:
            continue
        for name, text in re.findall(
            r"^ {4}(\w+)(?: \([^)]*\))?:\s*(.*?)(?=^ {4}\w|\Z)", section[1], re.DOTALL | re.MULTILINE
        ):
            docs[name] = " ".join(text.split())
    return docs
