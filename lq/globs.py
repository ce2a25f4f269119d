"""Globs that select layers by path or by class."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["globs", "matches"]


def globs(name: str, value: Any) -> tuple[str, ...] | None:
    """A list of globs as it is kept: strings, a class as ``type:`` and its name.

    Args:
        name: of the setting, for the message.
        value: the list, or None.

    Returns:
        The globs, or None.

    Raises:
        ValueError: for what is no list.

    >>> globs("include", ["layer1.*", int])
    ('layer1.*', 'type:int')
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f'{name} must be a list of globs or None, got {value!r}: write {name}=["{value}"]')
    return tuple(f"type:{v.__name__}" if isinstance(v, type) else str(v) for v in value)


def matches(pattern: str, path: str, class_names: Sequence[str] = ()) -> bool:
    """Whether a glob selects a layer.

    Args:
        pattern: glob on the module path, or ``type:`` and a glob on a class name.
        path: module path.
        class_names: names of the layer's class and its bases.

    Returns:
        True where it matches.

    >>> matches("layer1.*", "layer1.0.conv1"), matches("type:Conv*", "stem", ["Conv2dSame", "Conv2d"])
    (True, True)
    """
    if pattern.startswith("type:"):
        return any(fnmatchcase(name, pattern[5:]) for name in class_names)
    return fnmatchcase(path, pattern)
