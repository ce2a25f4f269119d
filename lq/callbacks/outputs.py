"""What student and teacher take and return, checked where one can only tell as they run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["as_logits", "check_shapes", "feature", "kind"]


def as_logits(output: Any) -> Tensor:
    """What a network returned, which must be its logits.

    Args:
        output: of student or teacher.

    Returns:
        The same.

    Raises:
        ValueError: for something else than a tensor.
    """
    if not isinstance(output, Tensor):
        raise ValueError(
            f"student and teacher must return logits, got {type(output).__name__}: give logits=, which takes them from "
            "what is returned"
        )
    return output


def feature(path: str, seen: Mapping[str, Tensor], whose: str) -> Tensor:
    """What a part of a network gave.

    Args:
        path: of the part.
        seen: what the parts gave last, by path.
        whose: "student" or "teacher".

    Returns:
        Its output.

    Raises:
        ValueError: for a part that did not run, or gave something else than a tensor.
    """
    value = seen.get(path)
    if not isinstance(value, Tensor):
        what = "did not run" if value is None else f"returned {type(value).__name__}"
        raise ValueError(f"features must be parts that return a tensor, got {path!r}, which {what} in the {whose}")
    return value


def check_shapes(what: str, student: Tensor, teacher: Tensor, fix: str) -> None:
    """See that both have one shape.

    Args:
        what: is compared.
        student: the student's.
        teacher: the teacher's.
        fix: what to do otherwise.

    Raises:
        ValueError: where they differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what} of student and teacher must have one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: {fix}"
        )


def kind(value: Any) -> str:
    """A value for messages: its type, of a tensor the shape, too.

    Args:
        value: anything.

    Returns:
        A few words.
    """
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
