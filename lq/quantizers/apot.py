"""APoT: fixed levels that are sums of powers of two, and a learned clipping threshold."""

from typing import Any

from torch import Tensor

from lq.functional.levels import CodeRange
from lq.quantizers.subset import InputSubsetQuantizer, SubsetQuantizer

__all__ = ["APoTQuantizer", "InputAPoTQuantizer"]


class APoTQuantizer(SubsetQuantizer):
    """Additive powers of two with the gradients of the reparameterized clipping function::

        Q = alpha * P(clip(w / alpha, -t, t)),  P the nearest of the points, t the largest        dQ/dw = 1 everywhere
        dQ/dalpha = Q/alpha - w/alpha inside, t sign(w) outside

    The authors quantize weights of mean 0 and a fixed spread: `lq.LayerSpec.normalize` does that by default. They begin
    with alpha 3 for weights and 6 or 8 for inputs, whatever the width, and decay it; here it begins with least squares,
    learns with LSQ's gradient scale and does not decay.

    Args:
        bits: width of a code, sign included; 2 bits are ternary.
        **common: arguments of `PointQuantizer`.

    Source: Li et al., Additive Powers-of-Two Quantization, ICLR 2020, equations 5 and 8; weights' gradients unclipped
        as in the authors' code for CIFAR-10.

    >>> import torch
    >>> quantizer = APoTQuantizer(3)
    >>> quantizer.calibrate_(torch.tensor([-1.0, -0.5, 0.25, 0.0]))
    >>> quantizer.eval()(torch.tensor([-0.3, 0.9])).tolist()
    [-0.25, 1.0]
    """

    softens = False

    def __init__(self, bits: int, **common: Any) -> None:
        """Take every candidate: only the scale is left to choose."""
        super().__init__(bits, candidates="apot", **common)

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels with straight-through gradient.

        Args:
            x: rows, one per scale.
            scale: alpha, shape ``(C,)``.
            gradient_scale: factor on the gradient of alpha.

        Returns:
            Levels.
        """
        y = self._straight_through(x.detach(), scale.to(x.dtype), gradient_scale)
        return y + (x - x.detach())


class InputAPoTQuantizer(InputSubsetQuantizer):
    """The same for activations, whose gradient is clipped; 2^b magnitudes where they are unsigned.

    Args:
        codes: code range, which says the width and, once calibrated, the sign.
        **common: arguments of `PointQuantizer`.

    >>> import torch
    >>> quantizer = InputAPoTQuantizer(CodeRange(0, 3, 0.0))
    >>> quantizer.calibrate_(torch.tensor([0.0, 0.25, 1.0, 0.5]))
    >>> quantizer.point_set.points.tolist()
    [0.0, 0.25, 0.5, 1.0]
    """

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Take every candidate."""
        super().__init__(codes, candidates="apot", hard=True, **common)
