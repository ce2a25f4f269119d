"""Results of finished layers and blocks in a folder, each with a hash of what it depends on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lq.files import raw_bytes, write_whole

__all__ = ["StaleResultError", "Store", "digest_of"]

VERSION = 1
_KEY = "lq_search"


class StaleResultError(ValueError):
    """A stored result was found for other inputs than the present ones."""


def digest_of(tensors: Iterable[Tensor | None], settings: Mapping[str, Any]) -> str:
    """Hash of tensors and settings.

    Args:
        tensors: whose bytes count, in order.
        settings: plain values.

    Returns:
        SHA-256 in hexadecimal digits.

    >>> import torch
    >>> len(digest_of([torch.zeros(2)], {"bits": 4}))
    64
    """
    total = hashlib.sha256(json.dumps({"version": VERSION, **settings}, sort_keys=True, default=str).encode())
    for tensor in tensors:
        if tensor is None:
            total.update(b"none")
            continue
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(raw_bytes(tensor))
    return total.hexdigest()


class Store:
    """Folder with one file per finished layer or block; written whole or not at all.

    Args:
        folder: made when first written to; None keeps nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        """Nothing is touched yet."""
        self.folder = None if folder is None else Path(folder)

    def load(self, name: str, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A finished result.

        Args:
            name: of the layer or block.
            digest: of the present inputs.

        Returns:
            Tensors and values, or None where nothing is stored.

        Raises:
            StaleResultError: where the stored result is of other inputs.
        """
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise StaleResultError(
                f"folder must hold results of a search, got {path}: {error}. Delete that file"
            ) from error
        with opened as file:
            values = json.loads((file.metadata() or {}).get(_KEY, '{"digest": ""}'))
            if values["digest"] != digest:
                raise StaleResultError(
                    f"folder must hold results of these weights and settings, got {path} of others: delete the folder, "
                    "or name another"
                )
            return {key: file.get_tensor(key) for key in file.keys()}, values["result"]  # noqa: SIM118  no mapping

    def save(self, name: str, digest: str, tensors: Mapping[str, Tensor], result: Any) -> None:
        """Keep a finished result.

        Args:
            name: of the layer or block.
            digest: of its inputs.
            tensors: to keep.
            result: dataclass or plain values to keep.
        """
        path = self._path(name)
        if path is None:
            return
        values = result if isinstance(result, dict) else asdict(result)
        plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        metadata = {_KEY: json.dumps({"digest": digest, "result": values})}
        write_whole(path, lambda partial: save_file(plain, partial, metadata=metadata))

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"
