"""The integer engine: a quantized network from input codes to logits without a floating point operation."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.exporting.graph import UnsupportedError, in_float32, trace
from lq.exporting.lower import InputCodes, LayerPlan, Step, lower
from lq.functional.fixed_point import requantize, rounding_shift, wrap
from lq.functional.layout import positive
from lq.functional.lookup import count_reached
from lq.functional.shift_add import integer_conv, shift_add_conv
from lq.quantizers import LSQPlusQuantizer, PointQuantizer

__all__ = ["IntegerNetwork"]

Record = Callable[[str, str, Tensor], object]
_INT32 = 2**31 - 1


class IntegerNetwork(nn.Module):
    """A quantized convolutional network in integers: decoder, shifters or multipliers, accumulators, requantization.

    Between layers real values are 32-bit integers with an exponent of their own, chosen from proven bounds: additions
    and pooling act on those, and every layer turns them into the codes that its input quantizer would give.

    Args:
        model: a quantized model whose weights and inputs both have codes; evaluated as it is when this is built.
        shape: of one input, ``(C, H, W)``.
        shift_only: requantize by shifts alone: every factor between layers is rounded to a power of two.
        accumulator_bits: width of the accumulators, 32 or less; what does not fit wraps around as it would in hardware.

    Raises:
        UnsupportedError: for a network that has no integer form, naming the layer and the alternatives.

    >>> import lq
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 3))
    >>> report = lq.quantize_model(model)
    >>> calibrated = lq.calibrate(model, [torch.rand(8, 1, 3, 3)])
    >>> network, x = IntegerNetwork(model, (1, 3, 3)), torch.rand(5, 1, 3, 3)
    >>> torch.equal(network(x).argmax(1), model.eval()(x).argmax(1))
    True
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], *, shift_only: bool = False, accumulator_bits: int = 32
    ) -> None:
        """Trace, fold, and turn every constant into integers."""
        super().__init__()
        model, was_training = in_float32(model), model.training
        model.eval()
        try:
            nodes = trace(model, shape)
            self.steps = lower(model, nodes, shift_only=shift_only)
        finally:
            model.train(was_training)
        self.shape, self.accumulator_bits = tuple(shape), accumulator_bits
        first = [step for step in self.steps if step.layer and step.node.inputs[0] == self.steps[0].node.name]
        if len(first) != 1:
            raise UnsupportedError(f"the network's input must go to one quantized layer, got {len(first)}")
        object.__setattr__(self, "_encoder", model.get_submodule(first[0].node.path).input_quantizer)
        self.observed: dict[str, int] = {}
        for step in self.layers:
            low, high = step.bounds.min(), step.bounds.max()
            if max(-int(low), int(high)) > _INT32:
                raise UnsupportedError(f"{step.path}: its sums can pass 32 bits: use fewer bits or fewer inputs")

    @property
    def layers(self) -> list[LayerPlan]:
        """Every layer, in the order they run."""
        return [step.layer for step in self.steps if step.layer is not None]

    @property
    def input_codes(self) -> dict[str, Any]:
        """What an input looks like: shape, scale, smallest and largest code, and points where levels are not even."""
        quantizer: Any = self._encoder.quantizer  # type: ignore[union-attr]
        scale, (lo, hi, _) = float(positive(quantizer.scale.detach())), quantizer.codes
        points = quantizer.points.tolist() if isinstance(quantizer, PointQuantizer) else None
        if isinstance(quantizer, LSQPlusQuantizer):
            points = (quantizer.level_values() / scale).tolist()
        return {"shape": list(self.shape), "scale": scale, "lo": lo, "hi": hi, "points": points}

    def encode(self, x: Tensor) -> Tensor:
        """Input codes of real inputs, the one step that is not integers.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            int32, shape of ``x``.
        """
        return self._encoder.quantizer.encode(x).to("cpu", torch.int32)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of real inputs.

        Args:
            x: ``(N, C, H, W)``.

        Returns:
            float64 ``(N, classes)``: integers times a power of two.
        """
        return torch.ldexp(self.run(self.encode(x)).double(), torch.tensor(-self.steps[-1].exponent))

    @torch.no_grad()
    def run(self, codes: Tensor, record: Record | None = None) -> Tensor:
        """Integer logits of input codes.

        Args:
            codes: from `encode`.
            record: shown the name of a layer, "codes", "inputs" (the integers that the codes stand for) or
                "accumulators", and the tensor.

        Returns:
            int64 ``(N, classes)``, in steps of ``2^-exponent`` of the last step.
        """
        values: dict[str, Tensor] = {self.steps[0].node.name: codes}
        for step in self.steps[1:]:
            given = [values[name] for name in step.node.inputs]
            if step.layer is None:
                values[step.node.name] = _simple(step, given)
                continue
            real = step.node.inputs[0] == self.steps[0].node.name
            values[step.node.name] = self._layer(step, given[0], real, record)
        return values[self.steps[-1].node.name]

    def _layer(self, step: Step, x: Tensor, real: bool, record: Record | None) -> Tensor:
        plan = step.layer
        assert plan is not None
        codes = x if real else to_codes(x, plan.takes)
        integers = codes if plan.takes.points is None else plan.takes.points[codes.long()]
        acc = accumulate(integers.to(torch.int32), plan)
        self.observed[plan.path] = max(self.observed.get(plan.path, 0), int(acc.abs().max()))
        if record is not None:
            for what, tensor in (("codes", codes), ("inputs", integers), ("accumulators", acc)):
                record(plan.path, what, tensor)
        if self.accumulator_bits < 32:
            acc = wrap(acc, self.accumulator_bits)
        return requantize(acc, plan.by).reshape(len(x), *step.node.shape)


def accumulate(integers: Tensor, plan: LayerPlan) -> Tensor:
    """Accumulators of a layer.

    Args:
        integers: that the input codes stand for, int32 ``(N, C, H, W)`` or ``(N, C)``.
        plan: of the layer.

    Returns:
        int32 ``(N, O, H', W')``.
    """
    x = integers.reshape(len(integers), -1, 1, 1) if plan.codes.shape[1] == integers[0].numel() else integers
    x, conv = F.pad(x, plan.conv["padding"]), {k: v for k, v in plan.conv.items() if k != "padding"}
    if plan.shift_add:
        return shift_add_conv(x, plan.codes, plan.table, **conv)
    return integer_conv(x, plan.weight, **conv)


def to_codes(wide: Tensor, takes: InputCodes) -> Tensor:
    """Codes of wide integers.

    Args:
        wide: int64.
        takes: what the layer takes.

    Returns:
        int32, shape of ``wide``.
    """
    if takes.thresholds is not None:
        return count_reached(wide, takes.thresholds).to(torch.int32)
    assert takes.by is not None
    return requantize(wide, takes.by).clamp_(takes.lo, takes.hi).to(torch.int32)


def _simple(step: Step, given: list[Tensor]) -> Tensor:
    node, x = step.node, given[0]
    settings: dict[str, Any] = node.settings
    if node.kind == "relu":
        x = x.clamp_min(0)
        return x if step.cap is None else torch.minimum(x, step.cap.reshape(-1, *[1] * (x.dim() - 2)))
    if node.kind == "add":
        return sum((rounding_shift(t, s) for t, s in zip(given, step.shifts, strict=True)), torch.tensor(0))
    if node.kind == "slice":
        rows, columns = settings["stride"]
        return x[:, :, ::rows, ::columns]
    if node.kind == "pad_channels":
        return F.pad(x, (0, 0, 0, 0, settings["before"], settings["after"]))
    if node.kind == "flatten":
        return x.flatten(1)
    windows = _windows(x, node.kind, settings)
    if node.kind == "max":
        return windows.amax((-1, -2))
    assert step.by is not None
    return requantize(windows.sum((-1, -2)), step.by)


def _windows(x: Tensor, kind: str, settings: dict[str, Any]) -> Tensor:
    rows, columns = settings["padding"]
    x = F.pad(x, (columns, columns, rows, rows), value=-_INT32 if kind == "max" else 0)
    (height, width), (down, right) = settings["kernel"], settings["stride"]
    return x.unfold(2, height, down).unfold(3, width, right)
