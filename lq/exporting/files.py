"""One file of tensors and a JSON header, written whole or not at all, and believed only after it was checked."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse
from safetensors.torch import save as serialize
from torch import Tensor

from lq.files import raw_bytes, write_whole

__all__ = ["FORMAT_VERSION", "ArtifactError", "read_artifact", "write_artifact"]

FORMAT_VERSION = 1
_LARGEST_HEADER = 1 << 24
_KEY = "lq"  # one entry, checksum and header: safetensors writes several in any order
_QUANTIZERS = re.compile(r"(?<![^.])(?:weight|input)_quantizer")


class ArtifactError(ValueError):
    """A file that is no sound artifact; the message says what is wrong with it."""


def write_artifact(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and header with a checksum of each block.

    Args:
        path: of the file.
        tensors: by name.
        header: plain JSON values.

    Returns:
        The path.
    """
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    sums = _checksums(held)
    text = json.dumps({"format_version": FORMAT_VERSION, **header, "sha256": sums}, allow_nan=False)
    data = serialize(held, {_KEY: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})
    return write_whole(path, lambda partial: partial.write_bytes(data))


def read_artifact(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_artifact` wrote, believing nothing of it unchecked.

    Args:
        path: of the file.

    Returns:
        Tensors and header.

    Raises:
        FileNotFoundError: where there is no file.
        ArtifactError: for a file that is truncated, altered, of a newer version, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"an artifact must be a file, got {str(path)!r} which does not exist")
    data = path.read_bytes()
    checksum, _, text = _entry(data, path).partition(" ")
    if hashlib.sha256(text.encode(errors="replace")).hexdigest() != checksum:
        raise ArtifactError(f"{path.name}: the header does not match its checksum: fetch or export the file again")
    try:
        header = json.loads(text)
        tensors = parse(data)
    except Exception as error:  # a parser's own kinds of errors, and too deep a nesting
        raise ArtifactError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("format_version"), int):
        raise ArtifactError(f"{path.name}: the header must be an object with a format_version")
    if not 1 <= header["format_version"] <= FORMAT_VERSION:
        raise ArtifactError(
            f"{path.name}: format_version must be at most {FORMAT_VERSION}, got {header['format_version']}: upgrade lq"
        )
    found, sums = _checksums(tensors), header.get("sha256")
    if not isinstance(sums, dict) or sums.keys() != found.keys():
        raise ArtifactError(f"{path.name}: the header must hold a checksum of every block, and of no other")
    for block, checksum in found.items():
        if checksum != sums[block]:
            raise ArtifactError(f"{path.name}: block {block!r} does not match its checksum: fetch or export it again")
    return tensors, header


def _entry(data: bytes, path: Path) -> str:
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 2 <= size <= len(data) - 8:
        raise ArtifactError(f"{path.name} is truncated, or no safetensors file")
    if size > _LARGEST_HEADER:
        raise ArtifactError(f"{path.name}: the header must have at most {_LARGEST_HEADER} bytes, got {size}")
    try:
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is no artifact of lq: its header cannot be read") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        raise ArtifactError(f"{path.name} is no artifact of lq: write one with lq.save or lq export")
    return metadata[_KEY]


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each block: of names, types, shapes and values of all that one module holds, its quantizers' too."""
    blocks: dict[str, Any] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        digest = blocks.setdefault(_QUANTIZERS.split(name)[0].rpartition(".")[0], hashlib.sha256())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return {block: digest.hexdigest() for block, digest in blocks.items()}
