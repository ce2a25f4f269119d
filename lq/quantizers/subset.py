"""Points chosen from data: the best subset of candidates, or a free codebook."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lq.functional.codebook import codebook_rows
from lq.functional.levels import CodeRange
from lq.functional.points import signed_levels
from lq.functional.scale_search import candidate_problem, search_rows, shared_subset
from lq.quantizers.points import PointQuantizer

__all__ = ["CodebookQuantizer", "InputSubsetQuantizer", "SubsetQuantizer"]


class SubsetQuantizer(PointQuantizer):
    """Points are the best subset of candidates for the weights it is calibrated on; see `lq.search_subset`.

    Args:
        bits: width of a code.
        candidates: name or magnitudes, see `lq.functional.candidate_points`.
        power: of the quantization loss, 2 or 4.
        zero: force (True) or forbid (False) a zero point.
        **common: arguments of `PointQuantizer`.

    Source: Oh et al., Non-Uniform Step Size Quantization for Accurate Post-Training Quantization, ECCV 2022.

    >>> quantizer = SubsetQuantizer(3)
    >>> quantizer.calibrate_(torch.tensor([0.125, -0.25, 0.5, 1.0]))
    >>> quantizer.eval()(torch.tensor([-0.3, 0.9])).tolist()
    [-0.25, 1.0]
    """

    def __init__(
        self,
        bits: int,
        *,
        candidates: str | Sequence[float] = "two_words",
        power: int = 2,
        zero: bool | None = None,
        **common: Any,
    ) -> None:
        """Remember what to choose from."""
        super().__init__(bits, power=power, **common)
        self.candidates, self.zero = candidates, zero
        candidate_problem(candidates, bits, power=power, signed=self.signed, zero=zero)  # complains early

    def _choose_(self, rows: Tensor, importance: Tensor | None, power: int) -> None:
        problem = candidate_problem(self.candidates, self.codes.bits, power=power, signed=self.signed, zero=self.zero)
        shared = self.layout.scales > 1 and self.points.dim() == 1
        search = shared_subset if shared else search_rows
        points, scale, _ = search(rows, importance, problem.to(rows.device), self.points.shape[-1])
        self.set_points_(points.reshape(self.points.shape), scale)


class CodebookQuantizer(PointQuantizer):
    """Points are free: the optimum of weighted k-means; see `lq.functional.fit_codebook`.

    Args:
        bits: width of a code.
        **common: arguments of `PointQuantizer`.

    Source: Choi et al., Towards the Limit of Network Quantization, ICLR 2017.

    >>> quantizer = CodebookQuantizer(2)
    >>> quantizer.calibrate_(torch.tensor([0.1, -0.1, 0.7]))
    >>> quantizer.eval()(torch.tensor([-0.3, 0.9])).tolist()
    [-0.10000000149011612, 0.699999988079071]
    """

    @property
    def shiftable(self) -> bool:
        """Levels are real numbers."""
        return False

    def _choose_(self, rows: Tensor, importance: Tensor | None, power: int) -> None:
        count, h = self.points.shape[-1], importance
        scales = torch.ones(1, dtype=torch.float64, device=rows.device)
        if self.layout.scales > 1:
            scales = rows.abs().amax(dim=1).double()
        if self.points.dim() == 1:  # one codebook, of the rows brought to one scale where there are several
            unit = torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
            weight = None if h is None and len(unit) == 1 else (1.0 if h is None else h) * scales[:, None] ** power
            weight = None if weight is None else weight.expand(rows.shape).reshape(1, -1)
            levels, _ = codebook_rows((rows / unit).to(rows.dtype).reshape(1, -1), weight, count, power)
        else:
            levels, _ = codebook_rows(rows, h, count, power)
            scales = torch.ones_like(scales)
        largest = levels.abs().amax(dim=1)
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        self.set_points_((levels / unit[:, None]).reshape(self.points.shape), scales * largest)


class InputSubsetQuantizer(PointQuantizer):
    """Points of a layer's input: 2^b magnitudes where it is unsigned, else 2^(b-1) magnitudes and their negatives.

    They are kept as signed points in both cases, so that the sign may be decided when data are seen.

    Args:
        codes: code range, which says the width and, once calibrated, the sign.
        candidates: name or magnitudes, see `lq.functional.candidate_points`.
        power: of the quantization loss, 2 or 4.
        **common: arguments of `PointQuantizer`.

    >>> quantizer = InputSubsetQuantizer(CodeRange(0, 3, 0.0), candidates=[0, 0.25, 0.5, 0.75, 1])
    >>> quantizer.calibrate_(torch.tensor([0.0, 0.25, 1.0, 0.5]))
    >>> quantizer.point_set.points.tolist()
    [0.0, 0.25, 0.5, 1.0]
    """

    def __init__(self, codes: CodeRange, *, candidates: str | Sequence[float], power: int = 2, **common: Any) -> None:
        """Remember what to choose from."""
        super().__init__(codes.bits, signed=True, power=power, **common)
        self.candidates = candidates
        self.codes = codes

    def fake_quantize(self, x: Tensor, scale: Tensor, gradient_scale: float) -> Tensor:
        """Nearest levels with straight-through gradient, or the staircase where the forward pass is soft.

        Args:
            x: the input.
            scale: learned scale, shape ``(1,)``.
            gradient_scale: factor on the gradient of the scale.

        Returns:
            Levels, or softly quantized values.
        """
        how = self._straight_through if self.hard_forward else super().fake_quantize
        return how(x, scale, gradient_scale)

    def _choose_(self, rows: Tensor, importance: Tensor | None, power: int) -> None:
        signed, count = self.codes.lo < 0, self.points.shape[-1]
        # magnitudes with a sign bit number half of the codes: unsigned inputs count as having one bit more
        problem = candidate_problem(self.candidates, self.codes.bits + (not signed), power=power)
        magnitudes = rows.abs() if signed else rows.clamp_min(0)
        points, scale, _ = search_rows(magnitudes, importance, problem.to(rows.device), count // 2 if signed else count)
        self.set_points_(signed_levels(points[0], signed=not signed), scale)
