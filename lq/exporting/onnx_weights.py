"""A layer's weight as an ONNX file stores it: codes, what they stand for, and the integers that runtimes multiply."""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lq.functional.layout import positive
from lq.functional.points import code_table
from lq.functional.shift_add import integer_points
from lq.nn import QuantLayer
from lq.quantizers import PointQuantizer

__all__ = ["StoredWeight", "along", "stored_weight"]

_LARGEST = 127  # of an 8-bit integer weight
_HALF = 64  # up to which 2 * 255 of them fit in 16 bits


@dataclass(frozen=True)
class StoredWeight:
    """A weight: ``level[code] * scale``, or values that have no codes of their own.

    Where a runtime computes in integers, levels are multiplied by an integer factor first: the steps of the accumulator
    are that much finer, and less of the bias is rounded away.

    Args:
        codes: int8 or uint8, or the values in float; linear layers ``(K, N)``, which runtimes fuse with the product.
        scale: float32, scalar or one per channel; negative where the gain of a batch norm is.
        axis: of the channels.
        table: level of each code, float32; None where the codes are the levels.
        factor: of the levels of each channel, from -127 to 127; None where no runtime computes in integers.
        integer_scale: positive, with ``factor * integer_scale = scale``; None without a factor.
    """

    codes: Tensor
    scale: Tensor
    axis: int
    table: Tensor | None = None
    factor: Tensor | None = None
    integer_scale: Tensor | None = None

    @property
    def has_codes(self) -> bool:
        """Whether there are codes, or values alone."""
        return not self.codes.is_floating_point()

    @property
    def saturates(self) -> bool:
        """Whether processors that add two products in 16 bits could overflow: 255 times two of the integers."""
        return bool((self.largest * (1 if self.factor is None else self.factor.abs()) > _HALF).any())

    @property
    def whole(self) -> bool:
        """Whether levels are integers of 8 bits."""
        real = not self.has_codes or (self.table is not None and bool((self.table != self.table.round()).any()))
        return not real and bool((self.largest <= _LARGEST).all())

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of a level in each channel."""
        levels = self.codes.float() if self.table is None else self.table[self.codes.long()]
        return levels.movedim(self.axis, 0).flatten(1).abs().amax(1)

    @property
    def narrow(self) -> bool:
        """Whether four bits hold a code."""
        low, high = (int(end) for end in self.codes.aminmax())
        return self.has_codes and (high < 16 if self.codes.dtype == torch.uint8 else low >= -8 and high < 8)


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Values that lie along one axis, in the shape that broadcasts to a tensor of that rank; one number stays one.

    Args:
        values: shape ``(C,)`` or a scalar.
        axis: where they belong.
        rank: of the tensor.

    Returns:
        The values.

    >>> along(torch.ones(3), 1, 2).shape
    torch.Size([1, 3])
    """
    return values.reshape([-1 if i == axis else 1 for i in range(rank)]) if values.dim() else values


def stored_weight(layer: QuantLayer, gain: Tensor | None, *, fold_points: bool, integers: bool) -> StoredWeight:
    """What to store of a layer.

    Args:
        layer: quantized.
        gain: of the batch norm that was folded, per output channel, or None.
        fold_points: whether weights of points become values.
        integers: whether a runtime may compute in integers.

    Returns:
        The weight, gain included; of transposed convolutions with a scale per channel, whose channels lie along two
        axes with groups, values.
    """
    linear = isinstance(layer, nn.Linear)
    codes, scale, table = _codes(layer, fold_points)
    if gain is not None:
        scale = scale * gain.to(scale)
    if linear and table is None and bool((scale <= 0).any()):  # DequantizeLinear wants positive scales
        codes, scale = codes * scale.reshape(-1, 1), scale.new_ones(1)
    codes = codes.t().contiguous() if linear else codes
    stored = StoredWeight(codes, scale.float() if scale.numel() > 1 else scale.float().reshape(()), int(linear), table)
    return _with_factor(layer, stored) if integers and stored.has_codes and not linear else stored


def _codes(layer: QuantLayer, fold_points: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes or values, scale, and the table of the codes."""
    quantizer, weight = layer.weight_quantizer, layer.float_weight().detach()
    codes, scale = quantizer.encode(weight), positive(quantizer.scale.detach())
    if quantizer.layout.scales > 1 and quantizer.layout.axes != (0,):
        return quantizer.decode(codes), scale.new_ones(1), None
    if isinstance(quantizer, PointQuantizer):
        if fold_points or quantizer.points.dim() > 1:  # a table per channel has no operator
            return quantizer.decode(codes), scale.new_ones(1), None
        points = quantizer.points
        if quantizer.shiftable:
            points, places = integer_points(points)
            scale = scale * 2.0**-places
        return codes, scale, code_table(points.float(), bits=quantizer.codes.bits, signed=quantizer.signed)
    if not quantizer.codes.offset:
        return codes.to(torch.int8) if int(codes.max()) < 128 else codes, scale, None
    lo, hi, _ = quantizer.codes  # no integer zero point: odd levels with half the scale
    odd = 2 * torch.arange(lo, hi + 1) + 1
    if hi < 4:
        return odd.to(codes)[codes.long() - lo], scale / 2, None
    return (codes.to(torch.int16) - lo).to(torch.uint8), scale / 2, odd.float()


def _with_factor(layer: QuantLayer, stored: StoredWeight) -> StoredWeight:
    """Per channel, the factor that keeps levels in 8 bits and puts the bias nearest to a step of the accumulator."""
    inputs, bias = layer.input_quantizer, cast(Tensor | None, layer.bias)
    if inputs is None or not inputs.is_calibrated or not stored.whole:
        return stored
    if isinstance(layer, nn.ConvTranspose2d):
        return stored
    largest = stored.largest.double().clamp_min(1)
    scale = stored.scale.double().expand(len(largest))
    added = torch.zeros_like(scale) if bias is None else bias.detach().double()
    step = positive(inputs.quantizer.scale.detach()).double()
    end = _HALF if bool((largest <= _HALF).all()) else _LARGEST  # signed numbers are faster where they are right
    tried = torch.arange(1, end + 1, dtype=torch.float64).reshape(-1, 1)
    target = added / (step * scale.abs()).clamp_min(1e-300) * tried  # the bias in steps of the accumulator
    allowed = (tried * largest <= end) & (2 * tried * largest >= end - largest) & (target.abs() < 2**30)
    miss = ((target - target.round()).abs() / tried).masked_fill(~allowed, torch.inf)
    dead = ~allowed.any(0)  # weights that are nothing beside the bias, which alone decides on the steps
    factor = torch.where(dead, torch.zeros_like(scale), tried[miss.argmin(0), 0] * scale.sign())
    fine = (added.abs() / step / 2**20).clamp_min(1e-30)
    integer_scale = torch.where(dead, fine, scale / torch.where(dead, torch.ones_like(factor), factor))
    return replace(stored, factor=factor.float(), integer_scale=integer_scale.float())
