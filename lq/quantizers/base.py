"""What all uniform quantizers share: a learned scale, a code range, and hard quantization whenever not training."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.hard import dequantize, hard_quantize, lsq_gradient_scale, lsq_quantize, quantize
from lq.functional.layout import ScaleLayout, positive
from lq.functional.levels import CodeRange, level_values
from lq.functional.regularizer import level_regularizer
from lq.functional.scale import initial_scale
from lq.functional.scale_search import best_step
from lq.functional.statistics import LevelStatistics, level_statistics
from lq.layer_spec import LayerSpec
from lq.quantizers.hooks import QuantizerHooks

__all__ = ["Quantizer"]


class Quantizer(QuantizerHooks):
    """Uniform quantizer with a learned scale; a subclass says what training sees in `fake_quantize`.

    Args:
        codes: code range.
        layout: which values share a scale; the default is one scale for all.
        count: values that share one scale, for LSQ's gradient scale; 0 takes the features of one sample at run time.
        gradient_scale: whether the gradient of the scale is multiplied by LSQ's ``1/sqrt(N Q)``.

    Shape:
        any floating point tensor to the same shape; half precision is computed in float32 and cast back.
    """

    def __init__(
        self, codes: CodeRange, *, layout: ScaleLayout | None = None, count: int = 0, gradient_scale: bool = True
    ) -> None:
        """Allocate the scale at its final shape; `calibrate_` fills it from data."""
        super().__init__()
        self.codes = codes
        self.layout = layout or ScaleLayout()
        self.count = count
        self.gradient_scale = gradient_scale
        self.scale = nn.Parameter(torch.ones(self.layout.scales))

    @abstractmethod
    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """What training sees: levels or a soft version of them, differentiable in ``x`` and ``scale``.

        Args:
            x: values, at least float32 unless ``takes_half``, in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: factor on the gradient of the scale.

        Returns:
            Quantized values, shape of ``x``.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Quantize: `fake_quantize` in training, the nearest level in evaluation.

        In evaluation gradients pass straight through, so that parts of a network that train in evaluation mode (as with
        frozen batch norms) still learn.

        Args:
            x: any shape, floating point.

        Returns:
            Quantized values, shape and dtype of ``x``.
        """
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if not self.training and not learns:
            return self.hard(x)
        view, scale = self._as_it_is(x) if self.takes_half else self._prepare(x)
        factor = 1.0
        if self.gradient_scale:
            factor = lsq_gradient_scale(self.count or x.numel() // max(x.shape[0], 1), self._largest())
            scale = self._restrained(view, scale)
        quantized = self.fake_quantize if self.training else self._straight_through
        return self._restore(quantized(view, scale, factor), x.shape).to(x.dtype)

    def hard(self, x: Tensor) -> Tensor:
        """Nearest level, whatever the mode.

        Args:
            x: any shape, floating point.

        Returns:
            Levels, shape and dtype of ``x``.
        """
        view, scale = self._prepare(x)
        return self._restore(self._nearest(view, positive(scale)), x.shape).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of the nearest levels.

        Args:
            x: any shape.

        Returns:
            Codes, shape of ``x``, int8 (uint8 for unsigned ranges and for points, the sign in the top bit of ``b``).
        """
        view, scale = self._prepare(x)
        return self._restore(self._encode(view, positive(scale)), x.shape)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes; `decode` of `encode` equals `hard` bit for bit.

        Args:
            codes: integer codes, shape of the tensor they came from.

        Returns:
            Levels, dtype of the scale.
        """
        view, scale = self._prepare(codes)
        return self._restore(self._decode(view, positive(scale)), codes.shape)

    def hold(self, codes: Tensor) -> Tensor:
        """Values that stay at these codes: their levels, where a level is its own hard value.

        Args:
            codes: from `encode`.

        Returns:
            Values, dtype of the scale.
        """
        return self.decode(codes)

    def rank(self, codes: Tensor) -> Tensor:
        """Codes in the order of their levels: neighbours differ by 1.

        Args:
            codes: from `encode`.

        Returns:
            Ranks, int16, shape of the codes.
        """
        return codes.to(torch.int16)

    def unrank(self, ranks: Tensor) -> Tensor:
        """Inverse of `rank`.

        Args:
            ranks: whole numbers.

        Returns:
            Codes, int16, for `decode`.
        """
        return ranks.to(torch.int16)

    def level_values(self) -> Tensor:
        """All levels, ascending.

        Returns:
            Shape ``(L,)``, or ``(C, L)`` per channel.
        """
        return level_values(self.codes, positive(self.scale.detach()))

    @torch.no_grad()
    def calibrate_(self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int = 2) -> None:
        """Set the scale from data, in place.

        Args:
            x: the weight, or a sample of activations.
            method: see `lq.functional.initial_scale`.
            importance: of each value, broadcastable to ``x``; with it, or with another power than 2, "mse" searches
                the scale over all values as `lq.search_subset` does.
            power: of the quantization loss, 2 or 4.
        """
        rows = self.layout.rows(x.detach()).to(torch.promote_types(x.dtype, torch.float32))
        if method != "mse" or (importance is None and power == 2):
            self.scale.copy_(initial_scale(rows, self.codes, method).to(self.scale))
            return
        self.scale.copy_(best_step(rows, self.layout.importance_rows(importance, x), self.codes, power))

    @torch.no_grad()
    def coarsen_(self, factor: Tensor) -> None:
        """Widen the levels, and the ranges of values that lead to them, in place: codes are smaller by the factor.

        Args:
            factor: above 0, shape of the scale or ``(1,)``.
        """
        self.scale.mul_(factor)

    def adopt_(self, spec: LayerSpec) -> None:
        """Take over the code range of another spec, in place.

        Args:
            spec: the layer's new spec.
        """
        self.codes = spec.weight_codes

    def regularizer(self, x: Tensor, *, kind: str, on: str = "latent", scale_gradient: bool = False) -> Tensor:
        """Scale regularizer of this tensor: `lq.functional.level_regularizer`, or `point_regularizer`.

        Args:
            x: weight.
            kind: "nearest", "l1" or "sine"; of a latent weight always "nearest" where its level is not the nearest one.
            on: "latent" (the weight) or "quantized" (what training sees of it, or would see if it did not round).
            scale_gradient: whether the scale learns from this term.

        Returns:
            Scalar.
        """
        view, scale = self._prepare(x)
        if on == "latent":
            return self._pull_latent(view, scale, kind, scale_gradient)
        view = self._softened(view, scale if scale_gradient else scale.detach())
        return self._pull(view, scale, kind, scale_gradient)

    @torch.no_grad()
    def statistics(self, x: Tensor, *, soft: bool = False, power: int = 2) -> LevelStatistics:
        """Sums that describe how ``x`` sits on its levels.

        Args:
            x: weight or activations.
            soft: describe what training sees of ``x``, or would see if it did not round, instead of ``x``.
            power: 2 or 4.

        Returns:
            `lq.functional.LevelStatistics`.
        """
        view, scale = self._prepare(x)
        if soft:
            return self._sums(self._softened(view, scale), positive(scale), power)
        return self._sums_latent(view, positive(scale), power)

    # What depends on where the levels lie; quantizers whose levels are not evenly spaced replace these.

    def _softened(self, view: Tensor, scale: Tensor) -> Tensor:
        """What training sees, or would see if it did not round."""
        return self.fake_quantize(view, scale, 1.0)

    def _restrained(self, view: Tensor, scale: Tensor) -> Tensor:
        """The scale, its gradient damped by more than LSQ's factor where a method needs that."""
        return scale

    def _largest(self) -> float:
        return self.codes.largest

    def _rounding(self) -> dict[str, Any]:
        """How values become codes: arguments of `lq.functional.quantize`."""
        return self.codes._asdict()

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        return lsq_quantize(view, scale, gradient_scale=gradient_scale, **self._rounding())

    def _nearest(self, view: Tensor, scale: Tensor) -> Tensor:
        return hard_quantize(view, scale, **self._rounding())

    def _encode(self, view: Tensor, scale: Tensor) -> Tensor:
        dtype = torch.uint8 if self.codes.lo >= 0 else torch.int8
        return quantize(view, scale, **self._rounding()).to(dtype)

    def _decode(self, view: Tensor, scale: Tensor) -> Tensor:
        return dequantize(view, scale, offset=self.codes.offset)

    def _pull(self, view: Tensor, scale: Tensor, kind: str, scale_gradient: bool) -> Tensor:
        return level_regularizer(view, scale, kind=kind, scale_gradient=scale_gradient, **self.codes._asdict())

    def _sums(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return level_statistics(view, scale, self.codes, power)

    # Nearest levels are those of what is quantized already; a weight may have another, as where it is rounded to zero.

    def _pull_latent(self, view: Tensor, scale: Tensor, kind: str, scale_gradient: bool) -> Tensor:
        return self._pull(view, scale, kind, scale_gradient)

    def _sums_latent(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return self._sums(view, scale, power)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor in the layout's view, in at least float32, and the scale broadcastable to it."""
        return self._as_it_is(x.to(self._precision(x)))

    def _as_it_is(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, of a tensor that keeps its dtype."""
        return self.layout.view(x), self.layout.broadcast(self.scale.to(self._precision(x)))

    def _precision(self, x: Tensor) -> torch.dtype:
        """That of the values, or where they are codes of the scale, and at least float32."""
        return torch.promote_types(x.dtype if x.is_floating_point() else self.scale.dtype, torch.float32)

    def _restore(self, view: Tensor, shape: torch.Size) -> Tensor:
        """From the layout's view back to the shape of the tensor."""
        return view.reshape(shape)

    def extra_repr(self) -> str:
        """Bits, levels and number of scales.

        Returns:
            One line for ``print(module)``.
        """
        symmetric = self.codes.lo == -self.codes.hi or self.codes.lo == 0
        grid = "mid_rise" if self.codes.offset else "mid_tread" if symmetric else "full_range"
        return f"bits={self.codes.bits}, levels={self.codes.levels}, grid={grid}, scales={self.layout.scales}"
