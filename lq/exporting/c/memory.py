"""Where every buffer of a network lies: those that live at the same time side by side, others in the same place."""

from dataclasses import dataclass

__all__ = ["Buffer", "place"]

_ALIGNMENT = 16


@dataclass
class Buffer:
    """A buffer.

    Args:
        size: bytes.
        first: unit that writes it.
        last: last unit that reads it.
        start: byte at which it lies, once placed.
    """

    size: int
    first: int
    last: int
    start: int = 0


def place(buffers: list[Buffer]) -> int:
    """Give every buffer a place, the largest first, each at the lowest free one.

    Args:
        buffers: to place.

    Returns:
        Bytes in all.

    >>> a, b, c = Buffer(16, 0, 1), Buffer(32, 1, 2), Buffer(16, 2, 3)
    >>> place([a, b, c]), a.start == c.start
    (48, True)
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.size):
        rivals = sorted((b for b in placed if b.first <= buffer.last and buffer.first <= b.last), key=lambda b: b.start)
        start = 0
        for rival in rivals:
            if start + buffer.size <= rival.start:
                break
            start = max(start, _aligned(rival.start + rival.size))
        buffer.start = start
        placed.append(buffer)
    return max((_aligned(b.start + b.size) for b in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
