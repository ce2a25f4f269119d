"""ONNX of a quantized network: real integer weights, quantized inputs between, batch norms folded."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.exporting.folding import fold_away
from lq.exporting.graph import UnsupportedError
from lq.exporting.onnx_weights import StoredWeight, along, stored_weight
from lq.files import write_whole
from lq.functional.layout import positive
from lq.nn import named_quantized_layers
from lq.quantizers import ActivationQuantizer, PointQuantizer, SigmoidSumQuantizer

__all__ = ["write_onnx"]

_NEEDS = "target=onnx needs onnx, onnxscript and onnx-ir: pip install 'lq[onnx]'"


@torch.library.custom_op("lq::dequantize", mutates_args=())
def _dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Weights from codes; the exporter turns it into DequantizeLinear."""
    return codes.to(scale.dtype) * along(scale, axis, codes.dim())


@_dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("lq::quantize_input", mutates_args=())
def _quantize_input(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """Inputs onto their levels; the exporter turns it into QuantizeLinear, Clip where needed, DequantizeLinear."""
    return (x / scale).round().clamp(lo, hi) * scale


@_quantize_input.register_fake
def _(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    return torch.empty_like(x)


def write_onnx(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int],
    *,
    fold_points: bool = False,
    integers: bool | None = None,
    opset: int = 21,
) -> Path:
    """Write a quantized network as ONNX: quantized weights as integers, inputs through QuantizeLinear.

    Weights are INT4, UINT4, INT8 or UINT8 initializers, as narrow as their codes. A layer that runtimes compute in
    integers takes them as INT8, or as UINT8 where products of signed numbers could overflow, behind DequantizeLinear;
    any other one as float: runtimes turn the stored codes into either once, when they load the file. Linear layers of
    quantized inputs are products of integers, whose sums are exact, and a bias in float. Mid-rise levels are odd
    integers with half the scale. Points and wide mid-rise levels are codes behind a table and Gather.

    Args:
        model: a quantized model.
        path: of the file.
        shape: of one input, such as ``(3, 32, 32)``; the batch may have any size.
        fold_points: write weights of points as floating point constants instead of codes and a table.
        integers: whether runtimes may compute convolutions between quantized inputs in integers, which is fastest, but
            rounds their biases to the steps of the accumulator: coarse ones for narrow inputs. None allows it where
            inputs have 8 bits.
        opset: of the standard operators, 21 or more.

    Returns:
        The path.

    Raises:
        UnsupportedError: for a network that torch cannot export, with its reason.
        ImportError: without the packages that are needed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(_NEEDS) from error
    from lq.exporting.onnx_graph import finish
    from lq.exporting.onnx_nodes import translations

    model = copy.deepcopy(model).cpu().float().eval()
    weights = _replace_quantizers(model, fold_away(model, torch.rand(2, *shape)), fold_points, integers)
    try:
        program = torch.onnx.export(
            model,
            (torch.rand(2, *shape),),
            dynamo=True,
            opset_version=opset,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table=translations(opset),
            verbose=False,
            optimize=False,  # folding constants would turn codes back into numbers
        )
    except Exception as error:
        raise UnsupportedError(f"the network cannot be exported to ONNX: {type(error).__name__}: {error}") from error
    assert program is not None
    proto = finish(program.model_proto, weights)
    onnx.checker.check_model(proto, full_check=True)
    return write_whole(path, lambda partial: onnx.save(proto, str(partial)))


def _replace_quantizers(
    model: nn.Module, gains: Mapping[str, Tensor], fold_points: bool, integers: bool | None
) -> dict[str, StoredWeight]:
    """Have the layers compute from codes, in place; returns what the initializer of each name holds."""
    weights = {}
    for path, layer in named_quantized_layers(model).items():
        inputs = layer.input_quantizer
        whole = inputs is not None and inputs.quantizer.codes.bits == 8 if integers is None else integers
        weights[path] = stored_weight(layer, gains.get(path), fold_points=fold_points, integers=whole)
    for path, layer in named_quantized_layers(model).items():
        quantizer, stored = layer.input_quantizer, weights[path]
        layer.weight_quantizer = _FromCodes(stored)  # type: ignore[assignment]
        layer.weight_normalizer = None
        if quantizer is not None and quantizer.is_calibrated:
            layer.input_quantizer = _Inputs(quantizer)  # type: ignore[assignment]
    named = model.named_modules(remove_duplicate=False)  # the exporter may choose any name of a layer
    return {f"{path}.codes": module.stored for path, module in named if isinstance(module, _FromCodes)}


class _FromCodes(nn.Module):
    """Stands in for a weight quantizer: whatever arrives, the weight from its codes leaves."""

    codes: Tensor
    scale: Tensor

    def __init__(self, stored: StoredWeight) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scale", stored.scale)

    def forward(self, weight: Tensor) -> Tensor:
        if self.stored.has_codes:
            values = _dequantize(self.codes, self.scale, self.stored.axis)
        else:
            values = self.codes * along(self.scale, self.stored.axis, self.codes.dim())
        return values.t() if self.stored.axis else values


class _Inputs(nn.Module):
    """Stands in for an input quantizer."""

    scale: Tensor
    offset: Tensor
    levels: Tensor
    limits: Tensor

    def __init__(self, inputs: ActivationQuantizer) -> None:
        super().__init__()
        quantizer: Any = inputs.quantizer
        self.lo, self.hi, _ = quantizer.codes
        self.points = isinstance(quantizer, PointQuantizer | SigmoidSumQuantizer)
        scale = positive(quantizer.scale.detach()).float()
        self.register_buffer("scale", scale.reshape(()))
        self.shifts = quantizer.shifts
        if self.shifts:
            self.register_buffer("offset", quantizer.offset.detach().float())
        if self.points:
            self.register_buffer("levels", quantizer.level_values().float())
            self.register_buffer("limits", quantizer.limits().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.points:  # the number of thresholds reached selects the level
            reached = (x.unsqueeze(-1) >= self.limits).sum(-1)
            return self.levels[reached]
        if self.shifts:
            return _quantize_input(x - self.offset, self.scale, self.lo, self.hi) + self.offset
        return _quantize_input(x, self.scale, self.lo, self.hi)
