"""Files that are written whole or not at all, and the bytes of tensors."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["raw_bytes", "write_whole"]


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Have a file written under another name, flush it to the disk, and only then give it its name.

    Args:
        path: of the file; its folder is made.
        write: writes the file it is given the path of.

    Returns:
        The path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/new/a.txt", lambda partial: partial.write_text("all of it")).read_text()
    'all of it'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def raw_bytes(tensor: Tensor) -> memoryview:
    r"""The bytes of a tensor's elements, as a checksum takes them.

    Args:
        tensor: of any dtype, shape and device.

    Returns:
        The bytes, in row-major order.

    >>> bytes(raw_bytes(torch.tensor([1, 258], dtype=torch.int16)))
    b'\x01\x00\x02\x01'
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
