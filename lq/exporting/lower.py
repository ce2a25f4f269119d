"""From operations on real numbers to operations on integers: tables, multipliers, shifts, and proven bounds."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lq.exporting.folding import affine
from lq.exporting.graph import Node, UnsupportedError
from lq.functional.fixed_point import Multiplier, multiplier, wide_exponent
from lq.functional.layout import positive
from lq.functional.points import decode_points
from lq.functional.shift_add import Decoder, integer_points, make_decoder
from lq.nn import QuantLayer
from lq.quantizers import LSQPlusQuantizer, PointQuantizer, Quantizer, SigmoidSumQuantizer
from lq.spec import LayerSpec

__all__ = ["InputCodes", "LayerPlan", "Step", "accumulator_bounds", "layer_weights", "lower"]

_INT16, _INT32 = 2**15 - 1, 2**31 - 1


@dataclass(frozen=True)
class InputCodes:
    """How a layer's input becomes codes, and which integers they stand for.

    Args:
        lo: smallest code.
        hi: largest code.
        by: turns wide integers into codes of uniform levels; None for points.
        thresholds: of wide integers between neighbouring points, int64 ``(L-1,)``.
        points: integer of each code, int32 ``(L,)``; None where the code is the integer.
        lost: by how much more than these integers the codes stand for.
    """

    lo: int
    hi: int
    by: Multiplier | None = None
    thresholds: Tensor | None = None
    points: Tensor | None = None
    lost: float = 0.0

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return (self.lo, self.hi) if self.points is None else (int(self.points.min()), int(self.points.max()))


@dataclass(frozen=True)
class LayerPlan:
    """A convolution, or a linear layer as one of a single position.

    Args:
        path: of the module.
        codes: of the weights, uint8 ``(O, I/g, kh, kw)``, selecting from ``table``.
        bits: width of a code.
        table: integer of each code.
        shift_add: whether points are multiplied by shifters; otherwise by a multiplier.
        takes: how its input becomes codes.
        by: turns accumulators into wide integers, batch norm and bias included.
        bounds: smallest and largest value an accumulator can take, int64 ``(2, O)``.
        conv: ``padding``, ``stride``, ``dilation``, ``groups``.
    """

    path: str
    codes: Tensor
    bits: int
    table: Decoder
    shift_add: bool
    takes: InputCodes
    by: Multiplier
    bounds: Tensor
    conv: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """Integer weights, int32."""
        return self.table.value[self.codes.long()]


@dataclass(frozen=True)
class Step:
    """One operation on wide integers, which stand for ``w * 2^-exponent``.

    Args:
        node: what it does.
        exponent: of its result.
        shifts: of what it takes, by how many places to the right first.
        layer: what a layer does.
        cap: upper end of a ReLU in wide integers, per channel or one.
        by: multiplier of an average.
    """

    node: Node
    exponent: int
    shifts: tuple[int, ...] = ()
    layer: LayerPlan | None = None
    cap: Tensor | None = None
    by: Multiplier | None = None


@torch.no_grad()
def lower(model: nn.Module, nodes: list[Node], *, shift_only: bool = False) -> list[Step]:
    """Plan the integer network.

    Args:
        model: the quantized model that was traced.
        nodes: from `lq.exporting.graph.trace`.
        shift_only: requantize by shifts alone, which rounds every factor between layers to a power of two.

    Returns:
        The steps.

    Raises:
        UnsupportedError: for layers whose input or weight has no integers, naming them.
    """
    steps: dict[str, Step] = {}
    bounds: dict[str, float] = {}
    for node in nodes:
        exponents = tuple(steps[name].exponent for name in node.inputs)
        given = [bounds[name] for name in node.inputs]
        if node.kind == "input":
            steps[node.name], bounds[node.name] = Step(node, 0), 0.0
        elif node.kind == "layer":
            real = steps[node.inputs[0]].node.kind == "input"
            steps[node.name], bounds[node.name] = _layer(model, node, None if real else exponents[0], shift_only)
        elif not exponents or any(steps[name].node.kind == "input" for name in node.inputs):
            raise UnsupportedError(f"{node.path}: the network's input must go to quantized layers alone")
        elif node.kind == "add":
            bounds[node.name] = sum(given)
            exponent = min(wide_exponent(bounds[node.name]), *exponents)
            steps[node.name] = Step(node, exponent, tuple(e - exponent for e in exponents))
        else:
            bounds[node.name] = given[0]
            steps[node.name] = _simple(node, exponents[0], shift_only)
    return list(steps.values())


def _simple(node: Node, exponent: int, shift_only: bool) -> Step:
    if node.kind == "relu" and bool(node.settings["cap"].isfinite().all()):
        cap = torch.round(torch.ldexp(node.settings["cap"].double().cpu(), torch.tensor(exponent))).long()
        return Step(node, exponent, cap=cap.clamp_max(_INT32))
    if node.kind == "average":
        rows, columns = node.settings["kernel"]
        count, none = rows * columns, torch.zeros(1, dtype=torch.float64)
        largest = none + 2.0**31 * count
        return Step(node, exponent, by=multiplier(none + 1 / count, none, largest, shift_only=shift_only))
    return Step(node, exponent)


def _layer(model: nn.Module, node: Node, exponent: int | None, shift_only: bool) -> tuple[Step, float]:
    layer = model.get_submodule(node.path)
    assert isinstance(layer, QuantLayer)
    codes, table, unit = layer_weights(layer, node.path)
    weights = table.value[codes.long()]
    takes, step = _takes(layer, node.path, exponent, shift_only, weights)
    norm = None if node.norm is None else model.get_submodule(node.norm)
    gain, shift = affine(layer, norm)
    factor, added = (gain * unit * step).expand(len(codes)), shift.expand(len(codes))
    added = added + factor * takes.lost * weights.flatten(1).sum(1)  # but where padding inserts zeros
    bounds = accumulator_bounds(weights, takes.range)
    largest = bounds.abs().amax(0).double()
    bound = float((largest * factor.abs() + added.abs()).max())
    out = wide_exponent(bound)
    scaled = [torch.ldexp(part, torch.tensor(out)) for part in (factor, added)]
    plan = LayerPlan(
        path=node.path,
        codes=codes,
        bits=max(layer.weight_quantizer.codes.bits, (len(table.value) - 1).bit_length()),  # points per channel are more
        table=table,
        shift_add=isinstance(layer.weight_quantizer, PointQuantizer),
        takes=takes,
        by=multiplier(scaled[0], scaled[1], largest, shift_only=shift_only),
        bounds=bounds,
        conv=node.settings or {"padding": (0, 0, 0, 0), "stride": (1, 1), "dilation": (1, 1), "groups": 1},
    )
    return Step(node, out, layer=plan), bound


def layer_weights(layer: QuantLayer, path: str) -> tuple[Tensor, Decoder, Tensor]:
    """Integers of a layer's weights.

    Args:
        layer: the layer.
        path: of the layer, for errors.

    Returns:
        Codes, uint8 ``(O, I/g, kh, kw)``; the table they select from; the real value of the integer 1, float64 ``(O,)``
        or ``(1,)``.

    Raises:
        UnsupportedError: for levels that are real numbers.
    """
    quantizer, weight = layer.weight_quantizer, layer.float_weight().detach()
    scale = positive(quantizer.scale.detach()).double().cpu()
    codes = quantizer.encode(weight).cpu()
    if isinstance(quantizer, PointQuantizer) and not quantizer.shiftable:
        kind = cast(LayerSpec, layer.layer_spec).quantizer
        raise UnsupportedError(
            f"{path}: the levels of quantizer={kind} are not sums of powers of two, or too far apart for 32 bits: use "
            "quantizer=subset with candidates that are, or a uniform one, or export target=onnx"
        )
    if isinstance(quantizer, PointQuantizer):
        integers, k = integer_points(quantizer.points.cpu())
        rows = quantizer.layout.rows(codes)
        values = decode_points(
            rows, integers.double(), torch.ones(1).double(), bits=quantizer.codes.bits, signed=quantizer.signed
        )
        distinct, index = quantizer.layout.unrows(values, weight.shape).unique(return_inverse=True)
        codes, table, scale = index.to(torch.uint8), distinct.to(torch.int32), scale * 2.0**-k
    else:
        lo, hi, offset = quantizer.codes
        table = torch.arange(lo, hi + 1, dtype=torch.int32)
        codes = (codes.to(torch.int16) - lo).to(torch.uint8)
        if offset:
            table, scale = 2 * table + round(2 * offset), scale / 2
    shape = (*codes.shape, 1, 1) if codes.dim() == 2 else codes.shape
    return codes.reshape(shape), make_decoder(table), scale


def _takes(
    layer: QuantLayer, path: str, exponent: int | None, shift_only: bool, weights: Tensor
) -> tuple[InputCodes, float]:
    """How the input becomes codes, and the real value of the integer 1."""
    inputs = layer.input_quantizer
    if inputs is None or not inputs.is_calibrated:
        raise UnsupportedError(
            f"{path}: its input is not quantized, so there are no integers to compute with. Train or search with "
            "activation=auto and activation_bits, or calibrate; a network of quantized weights alone exports to an "
            "artifact or with target=onnx"
        )
    quantizer = cast(Quantizer, inputs.quantizer)
    lo, hi, _ = quantizer.codes
    scale = float(positive(quantizer.scale.detach()).double())
    if isinstance(quantizer, PointQuantizer | SigmoidSumQuantizer | LSQPlusQuantizer):
        integers, k, lost = _input_points(quantizer, path, exponent, weights)
        limits = None
        if exponent is not None:
            limits = torch.ceil(torch.ldexp(quantizer.limits().double().cpu(), torch.tensor(exponent))).long()
        return InputCodes(0, len(integers) - 1, None, limits, integers, lost), scale * 2.0**-k
    if exponent is None:
        return InputCodes(lo, hi), scale
    none = torch.zeros(1, dtype=torch.float64)
    by = multiplier(none + 2.0**-exponent / scale, none, none + 2.0**31, shift_only=shift_only)
    return InputCodes(lo, hi, by), scale


def _input_points(
    quantizer: PointQuantizer | SigmoidSumQuantizer | LSQPlusQuantizer, path: str, exponent: int | None, weights: Tensor
) -> tuple[Tensor, int, float]:
    """Integers over a common power of two that input codes stand for where they are none themselves; what they lose."""
    lo, hi, _ = quantizer.codes
    codes = torch.arange(lo, hi + 1, dtype=torch.int32)
    if isinstance(quantizer, PointQuantizer):
        return *integer_points(quantizer.points.cpu()), 0.0
    if isinstance(quantizer, SigmoidSumQuantizer):
        if exponent is None:
            raise UnsupportedError(f"{path}: inputs of the network must be uniform: leave first_last_bits=8")
        return codes, 0, 0.0
    # zero stays zero, the offset is rounded to 2^-k of a step, as little as 16 bits and accumulators of 32 allow
    offset = float(quantizer.offset.detach().double() / positive(quantizer.scale.detach()).double())
    largest = max(abs(lo + offset), abs(hi + offset)) + 1
    taken = largest * int(weights.abs().flatten(1).sum(1).max())
    k = max(0, math.floor(math.log2(min(_INT16 / largest, _INT32 / max(1.0, taken)))))
    steps = offset * 2**k
    return codes * 2**k + round(steps), k, steps - round(steps)


def accumulator_bounds(weight: Tensor, reach: tuple[int, int]) -> Tensor:
    """Smallest and largest accumulator of each output channel, over all inputs.

    Args:
        weight: integers, ``(O, ...)``.
        reach: smallest and largest integer of an input.

    Returns:
        int64 ``(2, O)``.
    """
    rows = weight.flatten(1).long()
    plus, minus = rows.clamp_min(0).sum(1), rows.clamp_max(0).sum(1)
    lo, hi = min(reach[0], 0), max(reach[1], 0)  # padding inserts zeros
    return torch.stack([plus * lo + minus * hi, plus * hi + minus * lo])
