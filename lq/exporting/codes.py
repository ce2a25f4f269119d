"""Codes and scales of a quantized network as one safetensors file."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from lq.functional.layout import positive
from lq.network import distinct_weights
from lq.quantizers import PointQuantizer

__all__ = ["save_codes"]


def save_codes(model: nn.Module, path: str | Path) -> Path:
    """Store the integer codes and the scales of every quantized layer; written whole or not at all.

    Args:
        model: a quantized model.
        path: of the file; tensors ``<layer>.codes`` (int8 or uint8, shape of the weight) and ``<layer>.scale``, and a
            metadata entry "lq" in JSON with the code range and offset of each layer; layers with points of their own
            have ``<layer>.points`` and codes as in `lq.functional.encode_points`.

    Returns:
        The path.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    for name, layer in distinct_weights(model):
        quantizer = layer.weight_quantizer
        tensors[f"{name}.codes"] = quantizer.encode(layer.float_weight()).cpu().contiguous()
        tensors[f"{name}.scale"] = positive(quantizer.scale.detach()).cpu().contiguous()
        codes = quantizer.codes
        if isinstance(quantizer, PointQuantizer):
            tensors[f"{name}.points"] = quantizer.points.cpu().contiguous()
            layers[name] = {"bits": codes.bits, "points": "signed" if quantizer.signed else "sign_magnitude"}
            continue
        layers[name] = {"bits": codes.bits, "lo": codes.lo, "hi": codes.hi, "offset": codes.offset}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"lq": json.dumps({"format_version": 0, "layers": layers})})
    os.replace(partial, path)
    return path
