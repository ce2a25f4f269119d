"""nuLSQ: every distance between two neighbouring levels is learned."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.functional.layout import damped
from lq.functional.learned_steps import learned_step_points, learned_step_quantize
from lq.functional.levels import CodeRange
from lq.functional.scale import initial_scale
from lq.functional.soft_points import PointSet
from lq.quantizers.points import PointQuantizer

__all__ = ["InputLearnedStepsQuantizer", "LearnedStepsQuantizer"]


class LearnedStepsQuantizer(PointQuantizer):
    """``2^b`` levels with zero among them, at learned steps from each other; see `learned_step_quantize`.

    There is one level more below zero than above, as in the paper. The scales are not learned: they say how large rows
    are relative to each other, where scales are per channel. The authors begin with even steps from a table for
    Gaussian weights, and train steps by AdamW with weight decay; here they begin with even steps of least squares, and
    learn as scales do, with LSQ's gradient scale and without decay.

    Args:
        bits: width of a code.
        **common: arguments of `Quantizer`.

    Source: Gongyo et al., Learning Non-uniform Step Sizes for Neural Network Quantization (nuLSQ), ACCV 2024.

    >>> quantizer = LearnedStepsQuantizer(2)
    >>> quantizer.calibrate_(torch.tensor([-2.0, -1.0, 0.0, 1.0]))
    >>> quantizer.eval()(torch.tensor([0.4, -1.6, 9.0])).tolist()
    [0.0, -2.0, 1.0]
    """

    softens = False

    def __init__(self, bits: int, **common: Any) -> None:
        """Steps of 1."""
        super().__init__(bits, signed=True, **common)
        self.steps = nn.Parameter(torch.ones(2**bits - 1))
        self.scale.requires_grad_(False)
        self._follow()
        self.register_state_dict_pre_hook(_follow_first)

    @property
    def shiftable(self) -> bool:
        """Levels are real numbers."""
        return False

    @property
    def below(self) -> int:
        """Levels below zero."""
        return self._half()

    def _half(self) -> int:  # a method: torch.compile does not trace super().below
        return len(self.steps) // 2 + 1

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels with straight-through gradient; the steps learn.

        Args:
            x: rows, one per scale.
            scale: relative size of each row, shape ``(C,)``.
            gradient_scale: factor on the gradients of the steps.

        Returns:
            Levels.
        """
        column = scale.reshape(-1, 1)
        steps = damped(self.steps, gradient_scale / self.layout.scales**0.5)  # all rows share them
        return learned_step_quantize(x / column, steps.to(x.dtype), self.below) * column

    @torch.no_grad()
    def _follow(self) -> None:
        """Points are where the steps lead."""
        self.points.copy_(learned_step_points(self.steps, self.below))

    def _largest(self) -> float:
        return float(max(self.below - 1, len(self.steps) - self.below))

    def _straight_through(self, view: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        return self.fake_quantize(view, scale, gradient_scale)

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._follow()  # an optimizer may have moved the steps since
        return super()._prepare(x)

    @property
    def point_set(self) -> PointSet:
        """The points and how their codes are made."""
        self._follow()
        return PointSet(self.points, self.codes.bits, self.signed)  # torch.compile does not trace super().point_set

    def _choose_(self, rows: Tensor, importance: Tensor | None, power: int) -> None:
        codes = CodeRange(-self.below, len(self.steps) - self.below, 0.0)
        each = initial_scale(rows, codes, "mse")
        size = each.mean()
        self.steps.copy_(size.expand(self.steps.shape))
        self.scale.copy_(each / size)
        self._follow()


def _follow_first(quantizer: nn.Module, *_: Any) -> None:
    assert isinstance(quantizer, LearnedStepsQuantizer)
    quantizer._follow()


class InputLearnedStepsQuantizer(LearnedStepsQuantizer):
    """The same for a layer's input, whose sign is decided when data are seen.

    Args:
        codes: code range, which says the width and, once calibrated, the sign.
        **common: arguments of `Quantizer`.

    >>> quantizer = InputLearnedStepsQuantizer(CodeRange(0, 3, 0.0))
    >>> quantizer.calibrate_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    >>> quantizer.eval()(torch.tensor([0.4, 1.6, 9.0])).tolist()
    [0.0, 2.0, 3.0]
    """

    def __init__(self, codes: CodeRange, **common: Any) -> None:
        """Remember the width."""
        super().__init__(codes.bits, **common)
        self.codes = codes
        self._follow()

    @property
    def below(self) -> int:
        """Levels below zero."""
        return self._half() if self.codes.lo < 0 else 0
