"""LSQ: hard levels, straight-through gradient, learned step."""

from torch import Tensor

from lq.functional.hard import lsq_quantize
from lq.quantizers.base import Quantizer

__all__ = ["LSQQuantizer"]


class LSQQuantizer(Quantizer):
    """Learned step size quantization; see `lq.functional.lsq_quantize`.

    The levels are symmetric about zero, as everywhere in `lq`; the paper's weights have one negative level more.
    The paper's first scales are those of ``scale_init="lsq"``; by default all methods of `lq` begin with the scale of
    least squares. Where ``count`` is 0 the gradient scale counts the features of one sample, the paper's N_F.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020.

    >>> import torch
    >>> from lq.functional import code_range
    >>> LSQQuantizer(code_range(2))(torch.tensor([0.2, 0.9, 3.0])).tolist()
    [0.0, 1.0, 1.0]
    """

    takes_half = True

    def __init_subclass__(cls) -> None:
        """Values in at least float32 for a subclass that quantizes in its own way, unless it says otherwise."""
        super().__init_subclass__()
        if "fake_quantize" in cls.__dict__ and "takes_half" not in cls.__dict__:
            cls.takes_half = False

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels with straight-through gradient.

        Args:
            x: values in the layout's view.
            scale: learned scale, broadcastable to ``x``.
            gradient_scale: factor on the gradient of the scale.

        Returns:
            Levels.
        """
        return lsq_quantize(x, scale, gradient_scale=gradient_scale, **self._rounding())
