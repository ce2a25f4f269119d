"""Sizes of convolutions, as torch lets them be written."""

from collections.abc import Sequence
from typing import Any

__all__ = ["same_padding", "sizes"]


def sizes(value: Any, count: int = 2) -> tuple[int, ...]:
    """As many numbers as there are dimensions, from one or from all.

    Args:
        value: an integer, or a sequence of them.
        count: of dimensions.

    Returns:
        The numbers.

    >>> sizes(3), sizes([1, 2])
    ((3, 3), (1, 2))
    """
    return tuple(int(v) for v in value) if isinstance(value, tuple | list) else (int(value),) * count


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Zeros around an input so that the output has its size, the odd one at the end, as torch does it.

    Args:
        kernel: size along each dimension.
        dilation: along each dimension.

    Returns:
        For `torch.nn.functional.pad`: before and after, the last dimension first.

    >>> same_padding((3, 4), (1, 1))
    [1, 2, 1, 1]
    """
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
