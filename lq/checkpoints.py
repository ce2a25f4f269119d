"""Checkpoints that say what they are: what is written, how it is checked, and how to load one without the callback."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lq.spec import LayerSpec, QuantSpec
from lq.surgery import caps_and_biases, layer_specs, rebuild, restore_parts, set_widths

__all__ = ["checkpoint_entry", "checkpoint_spec", "differences", "load_from_checkpoint", "restore_plan"]

KEY = "lq"
VERSION = 1
_Module = TypeVar("_Module", bound=nn.Module)


def checkpoint_entry(model: nn.Module, spec: QuantSpec) -> dict[str, Any]:
    """What a checkpoint says about its quantization, in plain Python values.

    Args:
        model: the quantized model.
        spec: the spec it was quantized with.

    Returns:
        Version, spec, the spec of every layer, and which parts a search may have added: caps and biases.
    """
    layers = {path: layer.to_dict() for path, layer in layer_specs(model).items()}
    names = {f.name for f in fields(QuantSpec)}
    plain = {name: value for name, value in spec.to_dict().items() if name in names}
    caps, biases = caps_and_biases(model)
    return {"version": VERSION, "spec": plain, "layers": layers, "caps": caps, "biases": biases}


def restore_plan(model: nn.Module, checkpoint: Mapping[str, Any], spec: QuantSpec) -> None:
    """Make a quantized model ready for the weights of a checkpoint: the same widths in the same layers.

    Args:
        model: quantized with ``spec``.
        checkpoint: as read from the file, before its weights are loaded.
        spec: of the model.

    Raises:
        ValueError: for a checkpoint of a float model, of another spec, or with other layers, saying what differs.
    """
    entry = _entry(checkpoint)
    saved, present = checkpoint_spec(checkpoint).to_dict(), spec.to_dict()
    if "auto" in (saved["grid"], present["grid"]) and _same_grids(entry, model):
        saved["grid"] = present["grid"]
    if changes := differences(saved, present):
        raise ValueError(
            "the checkpoint must be of the same QuantSpec as the callback, they differ in "
            f"{changes}. Give the callback the checkpoint's values, or start anew without ckpt_path"
        )
    _restore_layers(model, entry)
    restore_parts(model, entry.get("caps", {}), entry.get("biases", ()))


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """Settings of a callback that are not those of a checkpoint, in words.

    Args:
        saved: those of the checkpoint.
        present: those of the callback; what it does not have is passed over.

    Returns:
        The words, empty where they agree.

    >>> differences({"bits": 3, "levels": None}, {"bits": 4, "levels": None})
    'bits: checkpoint 3, callback 4'
    """
    changed = [name for name in saved if name in present and saved[name] != present[name]]
    return "; ".join(f"{name}: checkpoint {saved[name]!r}, callback {present[name]!r}" for name in changed)


def checkpoint_spec(checkpoint: Mapping[str, Any]) -> QuantSpec:
    """The spec that a checkpoint's network was quantized with.

    Args:
        checkpoint: as read from the file.

    Returns:
        The spec.

    Raises:
        ValueError: for a checkpoint of a float model.
    """
    return QuantSpec.from_dict(_entry(checkpoint)["spec"])


def _entry(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    entry = checkpoint.get(KEY)
    if entry is None:
        raise ValueError(
            "the checkpoint must be one that LearnedQuantization wrote, got one of a float model: load its "
            "weights before training, module.load_state_dict(torch.load(path, weights_only=True)['state_dict']), "
            "and pass no ckpt_path"
        )
    if entry["version"] > VERSION:
        raise ValueError(f"the checkpoint's lq version must be at most {VERSION}, got {entry['version']}: upgrade lq")
    return entry


def _same_grids(entry: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether "auto" means in every layer what the other side names."""
    saved = {path: LayerSpec(**values).weight_grid for path, values in entry["layers"].items()}
    return saved == {path: spec.weight_grid for path, spec in layer_specs(model).items()}


def _restore_layers(model: nn.Module, entry: Mapping[str, Any]) -> None:
    saved = {path: LayerSpec(**values) for path, values in entry["layers"].items()}
    present = layer_specs(model)
    if saved.keys() != present.keys():
        extra, missing = sorted(present.keys() - saved.keys()), sorted(saved.keys() - present.keys())
        raise ValueError(
            f"the checkpoint must have the model's quantized layers, got others: only in the model {extra}, only in "
            f"the checkpoint {missing}. Build the same model, or start anew without ckpt_path"
        )
    set_widths(model, saved, calibrate=False)


def load_from_checkpoint(
    module_class: type[_Module],
    path: str | Path,
    *,
    map_location: Any = None,
    strict: bool | None = None,
    **kwargs: Any,
) -> _Module:
    """Load a LightningModule that `LearnedQuantization` trained, quantized layers and all, without a trainer.

    Args:
        module_class: class of the LightningModule; it builds its network in ``__init__`` or ``configure_model``.
        path: of the checkpoint.
        map_location: device, as for `torch.load`.
        strict: whether the keys must match, as for Lightning's own method.
        **kwargs: constructor arguments that the checkpoint does not hold, or that shall differ.

    Returns:
        The module, in evaluation mode: hard quantization.

    Raises:
        ValueError: for a checkpoint without quantization, naming the fix.
    """
    load = module_class.on_load_checkpoint  # type: ignore[attr-defined]

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        load(self, checkpoint)
        entry = _entry(checkpoint)
        layers = {path: LayerSpec(**values) for path, values in entry["layers"].items()}
        rebuild(self, layers, caps=entry.get("caps"), biases=entry.get("biases", ()))

    # Lightning calls this hook of the class it is given between building the module and loading the weights
    loader = type(module_class.__name__, (module_class,), {"on_load_checkpoint": on_load_checkpoint})
    with torch.random.fork_rng(devices=[]):
        module = loader.load_from_checkpoint(  # type: ignore[attr-defined]
            path, map_location=map_location, strict=strict, weights_only=True, **kwargs
        )
    module.__class__ = module_class
    return module.eval()
