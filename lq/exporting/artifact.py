"""The artifact: a quantized network as one file, its weights packed at exactly their widths, and back."""

import copy
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.exporting.architecture import architecture_of, build, network_of
from lq.exporting.files import ArtifactError, read_artifact, write_artifact
from lq.exporting.state import holds_all_in_state, key_of, loose_dtypes, shared_parameters, tie
from lq.functional.packing import pack, packed_bytes, unpack
from lq.network import distinct_weights
from lq.nn import QuantLayer, named_quantized_layers, weight_key
from lq.spec import LayerSpec
from lq.surgery import caps_and_biases, layer_specs, rebuild

__all__ = ["load", "load_with_header", "read_header", "save"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_UNSAID = {"grid": "mid_tread"}  # what a header means that does not say it, whatever the defaults are today


@torch.no_grad()
def save(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: Mapping[str, Any] | None = None,
    input: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Store a quantized network as one safetensors file, written whole or not at all.

    Every quantized weight becomes its codes, packed at exactly their width; everything else the network holds is kept
    as it is, batch norms unfolded.

    Args:
        model: a quantized model, or a LightningModule that keeps one as ``model``.
        path: of the file, by custom ending in ".lq.safetensors".
        architecture: how to build the float network: a timm name with arguments, ``{"name": "resnet18",
            "num_classes": 10}``, or a function, ``{"import_path": "package.module:function", "arguments": {}}``, which
            whoever loads the file must allow. None asks the model.
        input: what the network takes, such as ``{"shape": [3, 32, 32], "mean": [...], "std": [...]}``: images from 0 to
            1 are normalised by ``(x - mean) / std``.
        metrics: measured of this network, such as ``{"val/acc": 0.9}``.
        provenance: where it comes from, such as a run id; versions of the libraries are added.

    Returns:
        The path.

    Raises:
        ValueError: for a model without quantized layers, or whose architecture builds another network.

    >>> import lq, tempfile
    >>> model = lq.models.create_model("cifar_resnet8")
    >>> report = lq.quantize_model(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(model, folder + "/net.lq.safetensors", architecture={"name": "cifar_resnet8"})
    ...     loaded = load(path)
    >>> torch.equal(loaded.conv1.quantized_weight(), model.conv1.quantized_weight())
    True
    """
    architecture = dict(architecture or architecture_of(model))
    network = network_of(model)
    if not named_quantized_layers(network):
        raise ValueError("model must have quantized layers, got none: call lq.quantize_model or use the callback")
    tensors, layers = _pack(network)
    caps, biases = caps_and_biases(network)
    header = {
        "architecture": architecture,
        "layers": layers,
        "caps": caps,
        "biases": biases,
        "fixed": [path for path, layer in named_quantized_layers(network).items() if layer.computes_weight],
        "input": dict(input or {}),
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        "provenance": {**versions(), **(provenance or {})},
    }
    if loose := loose_dtypes(network):
        header["buffers"] = loose
    _check_architecture(header, tensors)
    return write_artifact(path, tensors, header)


def load(path: str | Path, *, allow: Collection[str] = ()) -> nn.Module:
    """Load a stored network, ready to evaluate, to export or to train on.

    Args:
        path: of the file.
        allow: import paths of functions that may be called to build the network, where it is not one of timm's.

    Returns:
        The network, in evaluation mode: quantized layers whose weights lie on their levels.

    Raises:
        FileNotFoundError: where there is no file.
        ArtifactError: for a file that is not sound, or needs a function that is not allowed.
    """
    return load_with_header(path, allow)[0]


def load_with_header(path: str | Path, allow: Collection[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """`load`, and what the file says of itself.

    Args:
        path: of the file.
        allow: as there.

    Returns:
        The network, and the header: architecture, layers, input, metrics, provenance.

    Raises:
        ArtifactError: as there.
    """
    tensors, header = read_artifact(path)
    with _sound(path):
        return _restore(tensors, header, allow), header


def read_header(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, LayerSpec]]:
    """What a file says of itself, checked, without building the network.

    Args:
        path: of the file.

    Returns:
        Its tensors, its header, and the spec of every quantized layer.

    Raises:
        ArtifactError: for a file that is not sound.
    """
    tensors, header = read_artifact(path)
    with _sound(path):
        return tensors, header, _specs(tensors, header)


@contextmanager
def _sound(path: str | Path) -> Iterator[None]:
    """Whatever an unsound header makes of the code that follows it is an error of the file."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{Path(path).name} cannot be restored: {type(error).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """Versions of what a network was made with."""
    import lq

    return {"lq": lq.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _pack(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a network with packed codes for weights, and what every layer's codes mean."""
    tensors, specs = dict(network.state_dict()), layer_specs(network)
    layers: dict[str, Any] = {}
    owners = {weight_key(layer): path for path, layer in reversed(list(distinct_weights(network)))}
    for path, layer in named_quantized_layers(network).items():
        for key in [k for k in tensors if k.startswith(key_of(path, "parametrizations.weight."))]:
            del tensors[key]
        tensors.pop(key_of(path, "weight"), None)
        for key in [k for k in tensors if k.startswith(key_of(path, "weight_normalizer."))]:
            del tensors[key]  # codes are of the weight that was normalized
        weight, quantizer = layer.float_weight(), layer.weight_quantizer
        settled = copy.deepcopy(quantizer)
        settled.settle_()
        tensors |= {key_of(path, f"weight_quantizer.{name}"): value for name, value in settled.state_dict().items()}
        layers[path] = {"shape": list(weight.shape), "spec": _changed(replace(specs[path], normalize=False))}
        owner = path if layer.computes_weight else owners[weight_key(layer)]
        if weight.dtype != torch.float32:
            layers[path]["dtype"] = str(weight.dtype).removeprefix("torch.")
        if owner != path:
            if network.get_submodule(owner).weight_quantizer is not quantizer:
                raise ValueError(
                    f"{path} and {owner} share a weight and must share its quantizer: give both one layout"
                )
            layers[path]["tied"] = owner
            continue
        codes = quantizer.encode(weight).to(torch.int16) - _lowest(layer)
        tensors[key_of(path, "weight")] = pack(codes, quantizer.codes.bits)
    return tensors, layers


def _restore(tensors: dict[str, Tensor], header: dict[str, Any], allow: Collection[str]) -> nn.Module:
    specs = _specs(tensors, header)
    network = _fitting(header, specs, tensors, allow)
    if not holds_all_in_state(network):
        network = _build(header, specs, allow, "cpu", len(tensors))
    layers, shared = named_quantized_layers(network), shared_parameters(network)
    rest = {name: tensor for name, tensor in tensors.items() if name not in {key_of(path, "weight") for path in layers}}
    network.load_state_dict(rest, strict=False, assign=True)  # their names and shapes were compared
    for path, layer in layers.items():
        entry, quantizer = header["layers"][path], layer.weight_quantizer
        shape, packed = torch.Size(entry["shape"]), tensors[key_of(entry.get("tied", path), "weight")]
        codes = unpack(packed, quantizer.codes.bits, shape.numel()).to(torch.int16) + _lowest(layer)
        with torch.no_grad():
            values = quantizer.decode(codes.reshape(shape)).to(_DTYPES[entry.get("dtype", "float32")])
        layer.weight = nn.Parameter(values)
    for names in shared:
        tie(network, names)
    for name, dtype in header.get("buffers", {}).items():
        path, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(path), attribute, network.get_buffer(name).to(_DTYPES[dtype]))
    return network.eval()


def _fitting(
    header: Mapping[str, Any], specs: Mapping[str, LayerSpec], tensors: Mapping[str, Tensor], allow: Collection[str]
) -> nn.Module:
    """The quantized network without memory, after a look at whether what is stored fits."""
    network = _build(header, specs, allow, "meta", len(tensors))
    expected, given = (
        {name: (tuple(value.shape), value.is_floating_point()) for name, value in found.items()}
        for found in (network.state_dict(), tensors)
    )
    for path, entry in header["layers"].items():
        given[key_of(path, "weight")] = tuple(entry["shape"]), True
    if expected != given:
        wrong = sorted(name for name in {*expected, *given} if expected.get(name) != given.get(name))
        raise ArtifactError(
            f"the architecture must build the network that was stored, it differs in {wrong[:5]}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    return network


def _build(
    header: Mapping[str, Any], specs: Mapping[str, LayerSpec], allow: Collection[str], device: str, tensors: int
) -> nn.Module:
    with torch.device(device):
        network = build(header["architecture"], allow, parts=len(header["layers"]) + tensors)
    rebuild(network, specs, caps=header["caps"], biases=header["biases"], fixed=header["fixed"])
    return network


def _check_architecture(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """That the file will load: better said now than to whoever gets it."""
    allow = [header["architecture"].get("import_path", "")]
    try:
        _fitting(header, _specs(tensors, header), tensors, allow)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"architecture must be that of the model, got {header['architecture']}: {error}") from error


def _specs(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """The layers' specs, after a look at whether the header makes sense of the tensors."""
    kinds = {"architecture": dict, "layers": dict, "caps": dict, "biases": list, "fixed": list}
    for name, kind in kinds.items():
        if not isinstance(header.get(name), kind):
            raise ArtifactError(f"the header's {name} must be {kind.__name__}, got {header.get(name)!r:.80}")
    for path, count in header["caps"].items():
        cap = tensors.get(key_of(path, "cap"))
        if cap is None or cap.shape != (count,):
            raise ArtifactError(f"the caps of {path!r} must be as many as stored, got {count!r:.80}")
    specs = {}
    for path, entry in header["layers"].items():
        specs[path] = LayerSpec(**{**_UNSAID, **entry["spec"]})
        shape, source = entry["shape"], entry.get("tied", path)
        if not isinstance(shape, list) or not all(isinstance(n, int) and 0 < n < 2**31 for n in shape):
            raise ArtifactError(f"the shape of {path!r} must be positive integers, got {shape!r:.80}")
        packed = tensors.get(key_of(source, "weight"))
        size = packed_bytes(torch.Size(shape).numel(), specs[path].weight_codes.bits)
        if packed is None or packed.dtype != torch.uint8 or packed.shape != (size,):
            raise ArtifactError(f"the codes of {path!r} must be {size} bytes, got {getattr(packed, 'shape', None)}")
    return specs


def _changed(spec: LayerSpec) -> dict[str, Any]:
    """The fields that differ from what is meant where a header does not say, and the width."""
    plain = {**LayerSpec().to_dict(), **_UNSAID}
    return {name: value for name, value in spec.to_dict().items() if value != plain[name] or name == "bits"}


def _lowest(layer: QuantLayer) -> int:
    return layer.weight_quantizer.codes.lo
