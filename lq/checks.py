"""Checks of settings: each names the setting, the value got, the values allowed and the fix."""

import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["require_bool", "require_integer", "require_number", "require_one_of"]


def require_one_of(name: str, value: Any, allowed: Sequence[Any], fix: str = "choose one of those") -> None:
    """See that a value is one of a few.

    Args:
        name: of the setting.
        value: what was given.
        allowed: what may be given.
        fix: what to do instead.

    Raises:
        ValueError: for another value.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}: {fix}")


def require_bool(name: str, value: Any) -> None:
    """See that a value is True or False: a word such as "no" would count as true.

    Args:
        name: of the setting.
        value: what was given.

    Raises:
        ValueError: for another value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}: choose one of those")


def require_integer(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, fix: str = "choose one of those"
) -> None:
    """See that a value is a whole number in a range.

    Args:
        name: of the setting.
        value: what was given.
        least: smallest value allowed.
        most: largest value allowed.
        fix: what to do instead.

    Raises:
        ValueError: for another value.

    >>> require_integer("bits", 4, 2, 8)
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bounds = f" from {least} to {most}" if most < math.inf else f" of at least {least}" if least > -math.inf else ""
        raise ValueError(f"{name} must be an integer{bounds}, got {value!r}: {fix}")


def require_number(name: str, value: Any, inside: Callable[[float], bool], where: str, fix: str) -> None:
    """See that a value is a number in a range.

    Args:
        name: of the setting.
        value: what was given.
        inside: whether a number is allowed; it need not know of strings.
        where: the same in words, after "must".
        fix: what to do instead.

    Raises:
        ValueError: for another value, such as a number in quotes.

    >>> require_number("until", 0.3, lambda v: 0 < v < 1, "lie between 0 and 1", "0.5 is usual")
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not inside(value):
        kind = "" if number else "be a number and "
        raise ValueError(f"{name} must {kind}{where}, got {value!r}: {fix}")
