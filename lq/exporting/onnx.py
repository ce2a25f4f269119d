"""ONNX of a quantized network: real integer weights behind DequantizeLinear or a table, quantized inputs between."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.exporting.folding import fold_away
from lq.exporting.graph import UnsupportedError
from lq.files import write_whole
from lq.functional.layout import positive
from lq.nn import QuantLayer, named_quantized_layers
from lq.quantizers import ActivationQuantizer, PointQuantizer

__all__ = ["write_onnx"]

_NEEDS = "target=onnx needs onnx, onnxscript and onnx-ir: pip install 'lq[onnx]'"


@torch.library.custom_op("lq::dequantize", mutates_args=())
def _dequantize(codes: Tensor, table: Tensor, scale: Tensor, axis: int, bits: int, gather: bool) -> Tensor:
    """Weights from codes; the exporter turns it into DequantizeLinear or Gather."""
    shape = [1] * codes.dim()
    shape[axis] = -1
    values = table[codes.long()] if gather else codes.to(scale.dtype)
    return values * (scale.reshape(shape) if scale.numel() > 1 else scale.reshape(()))


@_dequantize.register_fake
def _(codes: Tensor, table: Tensor, scale: Tensor, axis: int, bits: int, gather: bool) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("lq::quantize_input", mutates_args=())
def _quantize_input(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    """Inputs onto their levels; the exporter turns it into QuantizeLinear, Clip where needed, DequantizeLinear."""
    return (x / scale).round().clamp(lo, hi) * scale


@_quantize_input.register_fake
def _(x: Tensor, scale: Tensor, lo: int, hi: int) -> Tensor:
    return torch.empty_like(x)


class _Codes(nn.Module):
    """A weight as codes, so that the exporter sees them as an initializer."""

    codes: Tensor
    table: Tensor
    scale: Tensor

    def __init__(self, layer: QuantLayer, fold: bool, gain: Tensor | None) -> None:
        super().__init__()
        quantizer, weight = layer.weight_quantizer, layer.float_weight().detach()
        scale, bits = positive(quantizer.scale.detach()), quantizer.codes.bits
        if quantizer.layout.scales > 1 and quantizer.layout.axes != (0,):
            raise UnsupportedError("transposed convolutions with a scale per channel have no ONNX form here")
        self.axis, self.bits, self.gather = 0, bits, isinstance(quantizer, PointQuantizer)
        codes, table = quantizer.encode(weight), scale.new_zeros(1)
        if isinstance(quantizer, PointQuantizer):
            if quantizer.points.dim() > 1 or fold:  # a table per channel, or one that shall not be seen: values
                self.gather, self.bits = False, 32
                codes, scale = quantizer.decode(codes), scale.new_ones(1)
            else:
                table = quantizer.points.float()
                if not quantizer.signed:
                    table = F.pad(table, (0, 2 ** (bits - 1) - len(table)))
                    table = torch.cat([table, -table])
        elif quantizer.codes.offset:  # no integer zero point: odd codes with half the scale, one bit wider
            codes, scale, self.bits = 2 * codes.to(torch.int16) + 1, scale / 2, bits + 1
        if gain is not None:  # of the batch norm that was folded
            negative = (gain < 0).reshape(-1, *[1] * (codes.dim() - 1)).to(codes.device)
            flip = not self.gather and not codes.is_floating_point()  # DequantizeLinear wants positive scales
            codes = torch.where(negative, -codes, codes) if flip else codes
            dead = gain.abs() <= 1e-8 * gain.abs().max()  # a scale of 0 would take the bias with it
            if flip and bool(dead.any()):
                codes = torch.where(dead.reshape(negative.shape), torch.zeros_like(codes), codes)
                gain = torch.where(dead, torch.ones_like(gain), gain)
            scale = scale * (gain.abs() if flip else gain).to(scale)
        self.linear = isinstance(layer, nn.Linear)
        if self.linear:  # (K, N), which runtimes fuse with the product
            codes, self.axis = codes.t().contiguous(), 1
        if self.bits == 9:  # odd codes of 8 bits do not fit in a byte
            codes, self.bits = codes.float(), 32
        self.register_buffer("codes", codes if codes.is_floating_point() else codes.to(_storage(codes)))
        self.register_buffer("table", table)
        self.register_buffer("scale", scale.float() if scale.numel() > 1 else scale.float().reshape(()))

    def forward(self) -> Tensor:
        if self.bits == 32:
            return self.codes * self.scale if self.scale.numel() == 1 else self.codes * self._broadcast()
        return _dequantize(self.codes, self.table, self.scale, self.axis, self.bits, self.gather)

    def _broadcast(self) -> Tensor:
        shape = [1] * self.codes.dim()
        shape[self.axis] = -1
        return self.scale.reshape(shape)


def _storage(codes: Tensor) -> torch.dtype:
    return (
        torch.uint8 if (int(codes.min()) >= 0 and int(codes.max()) > 127) or codes.dtype == torch.uint8 else torch.int8
    )


def write_onnx(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int],
    *,
    fold_points: bool = False,
    opset: int = 21,
) -> Path:
    """Write a quantized network as ONNX: quantized weights as integers, inputs through QuantizeLinear.

    Weights of uniform levels are INT4, UINT4, INT8 or UINT8 initializers behind DequantizeLinear; a convolution whose
    input is quantized takes INT8, because runtimes have no narrower one. Mid-rise levels are odd integers with half the
    scale. Points are codes behind a table and Gather.

    Args:
        model: a quantized model.
        path: of the file.
        shape: of one input, such as ``(3, 32, 32)``; the batch may have any size.
        fold_points: write weights of points as floating point constants instead of codes and a table.
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
    from lq.exporting.onnx_nodes import finish, translations

    model = copy.deepcopy(model).cpu().eval()
    gains = fold_away(model)
    try:
        with _exportable(model, fold_points, gains) as names:
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
    proto = finish(program.model_proto, names)
    onnx.checker.check_model(proto, full_check=True)
    return write_whole(path, lambda partial: onnx.save(proto, str(partial)))


@contextmanager
def _exportable(model: nn.Module, fold: bool, gains: Mapping[str, Tensor]) -> Iterator[dict[str, int]]:
    """Let quantized layers compute from codes meanwhile; yields the name of each buffer of codes and its width."""
    layers, parts, inputs = named_quantized_layers(model), {}, {}
    for path, layer in layers.items():
        try:
            parts[path] = _Codes(layer, fold, gains.get(path))
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from error
    widths = {}
    for path, layer in layers.items():
        held, quantizer = parts[path], layer.input_quantizer
        layer.add_module("lq_codes", held)
        # runtimes have no convolution of narrow integers: they would dequantize the weight at every run
        narrow = held.bits <= 4 and (held.gather or quantizer is None or held.linear)
        widths[f"{path}.lq_codes.codes" if path else "lq_codes.codes"] = 4 if narrow else 8
        inputs[path] = (layer.weight_quantizer, quantizer)
        layer.weight_quantizer = _Fixed(held)  # type: ignore[assignment]
        if quantizer is not None and quantizer.is_calibrated:
            layer.input_quantizer = _Inputs(quantizer)  # type: ignore[assignment]
    try:
        yield widths
    finally:
        for path, layer in layers.items():
            layer.weight_quantizer, layer.input_quantizer = inputs[path]
            delattr(layer, "lq_codes")


class _Fixed(nn.Module):
    """Stands in for a weight quantizer: whatever arrives, the weight from its codes leaves."""

    def __init__(self, held: _Codes) -> None:
        super().__init__()
        object.__setattr__(self, "held", held)

    def forward(self, weight: Tensor) -> Tensor:
        values = self.held()  # type: ignore[operator]
        return values.t() if self.held.linear else values  # type: ignore[union-attr]


class _Inputs(nn.Module):
    """Stands in for an input quantizer."""

    scale: Tensor
    levels: Tensor
    limits: Tensor

    def __init__(self, inputs: ActivationQuantizer) -> None:
        super().__init__()
        quantizer: Any = inputs.quantizer
        self.lo, self.hi, _ = quantizer.codes
        self.points = isinstance(quantizer, PointQuantizer)
        scale = positive(quantizer.scale.detach()).float()
        self.register_buffer("scale", scale.reshape(()))
        if self.points:
            levels = quantizer.points.float()
            self.register_buffer("levels", levels * scale)
            self.register_buffer("limits", (levels[1:] + levels[:-1]) / 2 * scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.points:  # the number of thresholds reached selects the level
            reached = (x.unsqueeze(-1) >= self.limits).sum(-1)
            return self.levels[reached]
        return _quantize_input(x, self.scale, self.lo, self.hi)
