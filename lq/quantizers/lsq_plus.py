"""LSQ+: LSQ whose levels begin at a learned offset."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.affine import best_affine
from lq.functional.layout import damped
from lq.functional.levels import CodeRange
from lq.functional.statistics import LevelStatistics
from lq.quantizers.lsq import LSQQuantizer

__all__ = ["LSQPlusQuantizer"]


class LSQPlusQuantizer(LSQQuantizer):
    """Activations with a learned step and a learned offset, for inputs that are negative on one side, as after Swish::

        y     = s * round(clip((x - b)/s, 0, Q)) + b
        dy/db = 0 inside the range, 1 outside                    (times LSQ's gradient scale)

    and the other gradients as LSQ's of ``x - b``. The codes are unsigned whatever the values. Zero need not be a level;
    what padding inserts is zero nevertheless. In integers every level has its own, the offset rounded to a small part
    of a step.

    Args:
        codes: code range, unsigned.
        **common: arguments of `Quantizer`.

    Source: Bhalgat et al., LSQ+: Improving low-bit quantization through learnable offsets and better initialization,
        CVPR Workshops 2020; weights as LSQ's, whose first scale is the spec's ``scale_init``, not the authors'
        ``max |mean +- 3 sigma| / 2^(b-1)``.

    >>> quantizer = LSQPlusQuantizer(CodeRange(0, 3, 0.0))
    >>> quantizer.calibrate_(torch.tensor([-0.5, 0.5, 1.5, 2.5]))
    >>> [round(y, 3) for y in quantizer.eval()(torch.tensor([-9.0, 0.0, 0.6, 9.0])).tolist()]
    [-0.5, -0.5, 0.5, 2.5]
    """

    shifts = True

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Begin at zero."""
        super().__init__(codes, **common)
        self.offset = nn.Parameter(torch.zeros(1))

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels with straight-through gradient.

        Args:
            x: values.
            scale: learned scale.
            gradient_scale: factor on the gradients of scale and offset.

        Returns:
            Levels.
        """
        offset = damped(self.offset.to(x.dtype), gradient_scale)
        return super().fake_quantize(x - offset, scale, gradient_scale) + offset

    def level_values(self) -> Tensor:
        """All levels, ascending.

        Returns:
            Shape ``(L,)``.
        """
        return super().level_values() + self.offset.detach()

    def limits(self) -> Tensor:
        """Values halfway between neighbouring levels, ascending, shape ``(L-1,)``."""
        levels = self.level_values()
        return (levels[1:] + levels[:-1]) / 2

    @torch.no_grad()
    def calibrate_(self, x: Tensor, method: str = "mse", *, importance: Tensor | None = None, power: int = 2) -> None:
        """Set scale and offset by least squares, in place.

        Args:
            x: a sample of activations.
            method: has no meaning here.
            importance: of each value, broadcastable to ``x``.
            power: has no meaning here.
        """
        values = x.detach().reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
        weights = None if importance is None else importance.expand(x.shape).reshape(-1)
        scale, offset = best_affine(values, self.codes, weights)
        self.scale.copy_(scale)
        self.offset.copy_(offset)

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        return self.fake_quantize(view, scale, gradient_scale)

    def _nearest(self, view: Tensor, scale: Tensor) -> Tensor:
        return super()._nearest(view - self.offset.to(view.dtype), scale) + self.offset.to(view.dtype)

    def _encode(self, view: Tensor, scale: Tensor) -> Tensor:
        return super()._encode(view - self.offset.to(view.dtype), scale)

    def _decode(self, view: Tensor, scale: Tensor) -> Tensor:
        return super()._decode(view, scale) + self.offset.to(scale.dtype)

    def _sums(self, view: Tensor, scale: Tensor, power: int) -> LevelStatistics:
        return super()._sums(view - self.offset.to(view.dtype), scale, power)
