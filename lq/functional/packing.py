"""Codes of 2 to 8 bits as a stream of bits without gaps, and back.

Code i occupies the bits ``i*b .. i*b + b - 1`` of the stream, and bit j of the stream is bit ``j mod 8`` of its byte
``j div 8``. Eight codes fill exactly b bytes, so that widths that do not divide 8 lie across byte borders. The last
group is filled up with zero bits to whole bytes.

Eight codes, one per byte, are one 64-bit word. Neighbouring fields are joined three times: bytes to pairs, pairs to
fours, fours to eight; then the low b bytes of the word are the stream. Unpacking runs the other way.
"""

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]

_COLUMNS = [(torch.int32, 4), (torch.int16, 2), (torch.uint8, 1)]  # type and bytes
_CHUNK = 1 << 17  # words at a time: many to a call, and what is made of them stays in the cache


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that codes need, ``ceil(count * bits / 8)``.

    Args:
        count: number of codes.
        bits: width b of a code.

    Returns:
        Bytes.

    >>> packed_bytes(3, 3), packed_bytes(8, 3)
    (2, 3)
    """
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes.

    Args:
        codes: any shape, integers in ``0 .. 2^b - 1``.
        bits: width b of a code, 1 to 8.

    Returns:
        uint8, shape ``(packed_bytes(n, b),)``.

    Raises:
        ValueError: for codes that do not fit in b bits.

    >>> [f"{byte:08b}" for byte in pack(torch.tensor([1, 2, 7]), 3).tolist()]
    ['11010001', '00000001']
    """
    _check_bits(bits)
    flat = codes.detach().reshape(-1).cpu()
    low, high = (int(end) for end in flat.aminmax()) if flat.numel() else (0, 0)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"codes must lie in 0..{(1 << bits) - 1} for {bits} bits, got {low}..{high}")
    flat = flat.to(torch.uint8)
    size = packed_bytes(flat.numel(), bits)
    if bits == 8 or not flat.numel():
        return flat.clone()
    groups = -(-flat.numel() // 8)
    if groups * 8 != flat.numel() or flat.storage_offset() % 8:
        flat = torch.cat([flat, flat.new_zeros(groups * 8 - flat.numel())])
    words, out = flat.view(torch.int64), torch.empty(groups, bits, dtype=torch.uint8)
    work, spare = torch.empty(2, min(groups, _CHUNK), dtype=torch.int64)
    for start in range(0, groups, _CHUNK):
        part = words[start : start + _CHUNK]
        x, t = work[: len(part)], spare[: len(part)]
        x.copy_(part)
        for width, step in _joins(bits):
            torch.bitwise_right_shift(x, step - width, out=t)
            if step < 2 * width:  # what is left of the lower field would lie under the upper one
                t.bitwise_and_(_fields(width, 2 * step) << width)
                x.bitwise_and_(_fields(width, 2 * step)).bitwise_or_(t)
            else:
                x.bitwise_or_(t).bitwise_and_(_fields(2 * width, 2 * step))
        _copy_bytes(out[start : start + _CHUNK], x.view(torch.uint8).view(-1, 8), bits)
    return out.view(-1)[:size]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes to codes.

    Args:
        packed: from `pack`.
        bits: width b of a code, 1 to 8.
        count: number of codes.

    Returns:
        uint8, shape ``(count,)``.

    Raises:
        ValueError: where the bytes are not those of as many codes.

    >>> unpack(pack(torch.tensor([1, 2, 7]), 3), 3, 3).tolist()
    [1, 2, 7]
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_bytes(count, bits):
        raise ValueError(
            f"packed must be {packed_bytes(count, bits)} bytes for {count} codes of {bits} bits, got "
            f"{packed.dtype} of shape {tuple(packed.shape)}"
        )
    if bits == 8 or not count:
        return packed.clone()
    groups = -(-count // 8)
    if packed.storage_offset() % 4:  # where wide columns cannot be seen
        packed = packed.clone()
    if groups * bits != packed.numel():
        packed = torch.cat([packed, packed.new_zeros(groups * bits - packed.numel())])
    source, words = packed.view(groups, bits), torch.empty(groups, dtype=torch.int64)
    spare = torch.empty(min(groups, _CHUNK), dtype=torch.int64)
    for start in range(0, groups, _CHUNK):
        x = words[start : start + _CHUNK]
        t = spare[: len(x)]
        x.zero_()
        _copy_bytes(x.view(torch.uint8).view(-1, 8), source[start : start + _CHUNK], bits)
        for width, step in reversed(_joins(bits)):
            torch.bitwise_left_shift(x, step - width, out=t)
            if step < 2 * width:
                t.bitwise_and_(_fields(width, 2 * step) << step)
                x.bitwise_and_(_fields(width, 2 * step)).bitwise_or_(t)
            else:
                x.bitwise_or_(t).bitwise_and_(_fields(width, step))
    return words.view(torch.uint8)[:count]


def _copy_bytes(to: Tensor, source: Tensor, count: int) -> None:
    """The first bytes of every row, one wide column after the other: faster than all at once."""
    wide, size = next((kind, size) for kind, size in _COLUMNS if count % size == 0)
    to, source = to.view(wide), source.view(wide)
    for i in range(count // size):
        to[:, i].copy_(source[:, i])


def _joins(bits: int) -> list[tuple[int, int]]:
    """Width of the fields and distance between them, before each of the three joins."""
    return [(bits, 8), (2 * bits, 16), (4 * bits, 32)]


def _fields(width: int, step: int) -> int:
    """Ones in the low ``width`` bits of every ``step`` bits of a word."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, step))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}: choose one of those")
