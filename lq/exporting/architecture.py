"""What a stored network is built from: a timm name with arguments, or a function that the loader must allow."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lq.exporting.files import ArtifactError
from lq.models import create_model

__all__ = ["architecture_of", "build", "network_of"]

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)?")
_REACHING_OUT = ("pretrained", "checkpoint", "cfg", "cache_dir", "file", "path", "url")  # what would read other files
_LARGEST = 1 << 16


def network_of(model: nn.Module) -> nn.Module:
    """The network inside a LightningModule that keeps it as ``model``; any other module itself.

    Args:
        model: any module.

    Returns:
        The network.
    """
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) and "model" in _hyperparameters(model) else model


def architecture_of(model: nn.Module) -> dict[str, Any]:
    """How to build a network anew, as far as it says so itself.

    Args:
        model: a LightningModule with hyperparameters "model" as in `lq.classifier.Classifier`, or a timm model.

    Returns:
        Name and arguments for `build`.

    Raises:
        ValueError: for a module that does not say it.
    """
    arguments = _hyperparameters(model).get("model")
    if isinstance(arguments, Mapping):
        names = ("name", "num_classes", "in_chans", "options")
        return {name: _plain(arguments[name]) for name in names if arguments.get(name) is not None}
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    if name and timm.is_model(name):
        found: dict[str, Any] = {"name": name}
        for key in ("num_classes", "in_chans"):
            value = getattr(model, key, None)
            found |= {key: value} if isinstance(value, int) else {}
        return found
    raise ValueError(
        f"architecture must be given for {type(model).__name__}, which does not say how it is built: pass "
        'architecture={"name": "resnet18", "num_classes": 10} for a timm model, or '
        'architecture={"import_path": "package.module:function", "arguments": {...}}'
    )


def build(architecture: Mapping[str, Any], allow: Collection[str] = (), *, parts: int | None = None) -> nn.Module:
    """Build a network without any weights of its own from files.

    Args:
        architecture: ``name`` with ``num_classes``, ``in_chans`` and ``options`` of `lq.models.create_model`, or
            ``import_path`` with ``arguments``.
        allow: import paths that may be imported and called.
        parts: number of tensors that were stored; a network of many times as many parameters is not built to its end.

    Returns:
        The float network.

    Raises:
        ArtifactError: for anything else, and for arguments that no network has.
    """
    if "import_path" in architecture:
        return _import(architecture, allow)
    name = architecture.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not timm.is_model(name):
        raise ArtifactError(f"architecture name must be one of timm's, got {name!r}: upgrade timm, or register it")
    unknown = set(architecture) - {"name", "num_classes", "in_chans", "options"}
    options = architecture.get("options") or {}
    if unknown or not isinstance(options, Mapping):
        raise ArtifactError(f"architecture must have name, num_classes, in_chans and options, got {sorted(unknown)}")
    for key in options:
        if any(word in str(key) for word in _REACHING_OUT):
            raise ArtifactError(f"architecture option {key!r} is refused: it would read other files")
    _check_values({**architecture, "name": ""})
    arguments = {key: architecture[key] for key in ("num_classes", "in_chans") if key in architecture}
    with torch.random.fork_rng(devices=[]), _limited(parts):
        return create_model(name, **arguments, options=options)


@contextmanager
def _limited(parts: int | None) -> Iterator[None]:
    """Stop while a network is built that cannot be the stored one: it has far too many parameters."""
    count = 0

    def see(*_: Any) -> None:
        nonlocal count
        count += 1
        if parts is not None and count > 4 * parts + 1000:
            raise ArtifactError(f"architecture must build a network of about {parts} tensors, got one of many more")

    handle = register_module_parameter_registration_hook(see)
    try:
        yield
    finally:
        handle.remove()


def _import(architecture: Mapping[str, Any], allow: Collection[str]) -> nn.Module:
    target, arguments = architecture["import_path"], architecture.get("arguments") or {}
    if not isinstance(target, str) or not isinstance(arguments, Mapping) or target.count(":") != 1:
        raise ArtifactError(f'import_path must read "package.module:function", got {target!r}')
    if target not in allow:
        raise ArtifactError(
            f"architecture {target!r} is code that must be allowed before it is run: if you trust the file, call "
            f"lq.load(path, allow=[{target!r}])"
        )
    module, _, attribute = target.partition(":")
    with torch.random.fork_rng(devices=[]):
        return getattr(import_module(module), attribute)(**arguments)


def _check_values(value: Any, depth: int = 0) -> None:
    """Plain values of modest size: a hostile width or depth must not fill the memory."""
    if depth > 6:
        raise ArtifactError("architecture must be nested less deeply")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            _check_values(part, depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= _LARGEST:
        raise ArtifactError(f"architecture must have numbers up to {_LARGEST}, got {value}")


def _hyperparameters(model: nn.Module) -> Mapping[str, Any]:
    found = getattr(model, "hparams", None)
    return found if isinstance(found, Mapping) else {}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
