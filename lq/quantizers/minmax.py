"""Ranges from the largest values: of weights as they are now, of activations as a moving average."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lq.distributed import mean_
from lq.functional.levels import CodeRange
from lq.quantizers.computed_scale import ComputedScaleQuantizer

__all__ = ["MinMaxQuantizer", "MovingRangeQuantizer"]


class MinMaxQuantizer(ComputedScaleQuantizer):
    """Scale by which the largest weight is the largest level, at every step of training::

        s = max |w| / Q,        y = s * round(w / s)        dy/dw = 1

    Nothing is learned; evaluation takes the scale of the last step. At 8 bits codes are -127 to 127.

    Where ``folded``, the one scale of the tensor is that of the weight that the batch norm behind it is folded into,
    ``f w`` with ``f = |gamma| / sqrt(var + eps)`` of the running variance: ``s_c = max |f w| / Q / f_c`` for channel c
    of the weight as it is. So the batch norm itself stays, and its own statistics normalize what training sees.

    Args:
        codes: code range.
        folded: whether levels follow the batch norm that `follow` names; before, and without one, f is 1.
        **common: arguments of `Quantizer`.

    Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        CVPR 2018, section 3; folding as in section 3.2, with batch statistics in training as in Krishnamoorthi 2018,
        section 3.2.2.

    >>> import torch
    >>> quantizer = MinMaxQuantizer(CodeRange(-1, 1, 0.0))
    >>> quantizer(torch.tensor([-2.0, 0.9, 1.1])).tolist()
    [-2.0, 0.0, 2.0]
    """

    factor: Tensor

    def __init__(self, codes: CodeRange, *, folded: bool = False, **common: Any) -> None:
        """No batch norm is known yet."""
        super().__init__(codes, **common)
        self.folded = folded
        if folded:  # kept with the state, so that a network that was loaded has the ratios of its channels
            self.register_buffer("factor", torch.ones(self.layout.scales))
        self._norm: tuple[nn.Module, ...] = ()  # no part of this module: a tuple hides it from the state

    def follow(self, norm: nn.Module) -> None:
        """Take a batch norm's factors into account from now on.

        Args:
            norm: behind the layer.
        """
        self._norm = (norm,)

    @property
    def follows(self) -> bool:
        """Whether a batch norm is known."""
        return bool(self._norm)

    def compute_scale(self, rows: Tensor) -> Tensor:
        """Scale by which the largest value is the largest level.

        Args:
            rows: shape ``(C, N)``.

        Returns:
            Scales, shape ``(C,)``.
        """
        largest = rows.abs().amax(1) / self.codes.largest
        if not self.folded:
            return largest
        factor = self._factor(largest)
        return (largest * factor).amax() / factor

    def _factor(self, like: Tensor) -> Tensor:
        """What each channel is multiplied by when its batch norm is folded; channels switched off hardly count."""
        norm = cast(nn.BatchNorm2d, self._norm[0]) if self._norm else None
        if norm is not None and norm.running_var is not None and norm.num_features == like.numel():
            factor = (norm.running_var + norm.eps).rsqrt().to(like)
            if norm.weight is not None:
                factor = factor * norm.weight.detach().abs().to(like)
            self.factor.copy_(factor.clamp_min(1e-6 * factor.amax().clamp_min(torch.finfo(like.dtype).tiny)))
        return self.factor.to(like)


class MovingRangeQuantizer(MinMaxQuantizer):
    """The same for activations, whose range is a moving average over batches and processes::

        s <- m s + (1 - m) max x / Q        (max |x| where there are negative levels)

    Calibration sets it before the first step, in place of the authors' first steps without quantization.

    Args:
        codes: code range.
        momentum: m.
        **common: arguments of `Quantizer`.

    Source: Jacob et al., CVPR 2018, section 3.1; ranges symmetric about zero or from zero up.

    >>> import torch
    >>> quantizer = MovingRangeQuantizer(CodeRange(0, 3, 0.0), momentum=0.5)
    >>> y = quantizer(torch.tensor([0.0, 9.0]))
    >>> quantizer.scale.tolist()  # from 1 half of the way to 9/3
    [2.0]
    """

    def __init__(self, codes: CodeRange, *, momentum: float = 0.99, **common: Any) -> None:
        """Remember the momentum."""
        super().__init__(codes, **common)
        self.momentum = momentum

    def compute_scale(self, rows: Tensor) -> Tensor:
        """The same, without values that an unsigned range cannot hold.

        Args:
            rows: shape ``(C, N)``.

        Returns:
            Scales, shape ``(C,)``.
        """
        return super().compute_scale(rows if self.codes.lo else rows.clamp_min(0))

    def _follow(self, computed: Tensor) -> None:
        self.scale.lerp_(mean_(computed), 1 - self.momentum)
