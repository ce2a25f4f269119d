"""Best subset of candidate points and best scale of a tensor, together: `search_subset`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lq.functional.candidates import candidate_points
from lq.functional.layout import ScaleLayout
from lq.functional.levels import MAX_BITS, MIN_BITS
from lq.functional.moments import SortedRows, sorted_moments
from lq.functional.points import decode_points, encode_points
from lq.functional.subset import PointProblem, best_subset, best_value, bin_moments, point_problem, refit

__all__ = ["SubsetResult", "scale_grid", "search_subset"]

SMALLEST_FACTOR, LARGEST_FACTOR, FACTORS = 0.02, 4.0, 200
_STARTS = 8
_POLISH = 50
_BATCH = 1 << 14  # pairs of channel and scale whose shortest paths are found together


class SubsetResult(NamedTuple):
    """What `search_subset` found.

    Args:
        points: chosen candidates, ascending, before scaling: magnitudes, or signed; shape ``(K,)`` or ``(C, K)``.
        scale: shape ``()`` or ``(C,)``; 0 for a channel of zeros.
        loss: least ``sum h |w - scale * point|^p``, float64, shape ``()`` or ``(C,)``.
        codes: uint8, shape of the weight; for magnitudes the sign is in the top bit of b.
        bits: b.
        signed: whether the points carry their sign.
        channel_axis: axis with points and scale of its own, or None.
    """

    points: Tensor
    scale: Tensor
    loss: Tensor
    codes: Tensor
    bits: int
    signed: bool
    channel_axis: int | None

    @property
    def zero_channels(self) -> Tensor:
        """Channels whose weights are all zero, found by their scale."""
        return (self.scale.reshape(-1) == 0).nonzero().flatten()

    def dequantize(self) -> Tensor:
        """Values of the codes.

        Returns:
            ``scale * point``, shape of the weight, dtype of the scale.
        """
        layout = _layout(self.codes.shape, self.channel_axis)
        values = decode_points(
            layout.rows(self.codes), self.points, self.scale.reshape(-1), bits=self.bits, signed=self.signed
        )
        return layout.unrows(values, self.codes.shape)


def scale_grid(factors: int = FACTORS, smallest: float = SMALLEST_FACTOR, largest: float = LARGEST_FACTOR) -> Tensor:
    """Logarithmic grid of scales in units of ``max|w|`` over the largest candidate.

    Args:
        factors: how many, at least 2.
        smallest: first factor.
        largest: last factor.

    Returns:
        Shape ``(factors,)``, float64.

    >>> scale_grid(3, 0.25, 4.0)
    tensor([0.2500, 1.0000, 4.0000], dtype=torch.float64)
    """
    steps = torch.arange(factors, dtype=torch.float64) / (factors - 1)
    return smallest * (largest / smallest) ** steps


def search_subset(
    weight: Tensor,
    bits: int = 4,
    candidates: str | Sequence[float] | Tensor | None = None,
    power: int = 2,
    importance: Tensor | None = None,
    signed: bool = False,
    zero: bool | None = None,
    channel_axis: int | None = None,
    scales: Tensor | None = None,
) -> SubsetResult:
    """Choose K candidate points and a scale so that quantizing to the nearest loses least::

        minimise  sum h |w - a * nearest_S(w / a)|^p   over subsets S of K candidates and scales a > 0

    For a given scale the subset is the exact optimum over all ``C(m, K)`` subsets, found as a shortest path; scales are
    tried on a grid, and subset and scale polished in turn from the best eight until nothing changes.

    Args:
        weight: any shape, any floating point dtype, any device, finite.
        bits: width b of a code, 2 to 8; K is ``2^(b-1)`` magnitudes with a sign bit, or ``2^b`` where ``signed``.
        candidates: magnitudes, or the name of a set, see `candidate_points`; None is `two_word_candidates`.
        power: p, 2 or 4.
        importance: h, not negative, broadcastable to the weight; None is 1. A channel without any is taken as 1.
        signed: choose from the candidates and their negatives, without a sign bit.
        zero: True makes zero one of the points, False keeps it out, None leaves it to the search.
        channel_axis: axis whose slices get points and a scale of their own; None for one of each.
        scales: scales to try instead of the grid, positive, shape ``(A,)``, without polish.

    Returns:
        The `SubsetResult`.

    Raises:
        ValueError: for more points than candidates, weights that are not finite or all zero, or a bad argument.

    Source: Oh et al., Non-Uniform Step Size Quantization for Accurate Post-Training Quantization, ECCV 2022, whose
    enumeration this replaces.

    >>> result = search_subset(torch.tensor([-1.0, -0.5, 0.25, 1.0, 0.5]), bits=3)
    >>> result.dequantize().tolist(), result.loss.item()
    ([-1.0, -0.5, 0.25, 1.0, 0.5], 0.0)
    """
    _check(weight, bits, power, importance, scales)
    problem = _problem(candidates, bits, power, signed, zero)
    layout = _layout(weight.shape, channel_axis)
    x = layout.rows(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
    h = None
    if importance is not None:
        h = layout.rows(importance.detach().to(x.device).expand(weight.shape)).double()
        h = torch.where(h.sum(1, keepdim=True) > 0, h, torch.ones_like(h))
    count = 2**bits if signed else 2 ** (bits - 1)
    points, scale = search_rows(x if signed else x.abs(), h, problem.to(x.device), count, scales)
    scale = scale.to(x.dtype)
    points = points.to(x.dtype)
    codes = encode_points(x, points, scale, bits=bits, signed=signed)
    error = decode_points(codes, points.double(), scale.double(), bits=bits, signed=signed).sub_(x).abs_().pow_(power)
    loss = (error if h is None else error.mul_(h)).sum(1)
    shared = channel_axis is None
    return SubsetResult(
        points=points[0] if shared else points,
        scale=scale[0] if shared else scale,
        loss=loss[0] if shared else loss,
        codes=layout.unrows(codes, weight.shape),
        bits=bits,
        signed=signed,
        channel_axis=channel_axis,
    )


def search_rows(
    x: Tensor, h: Tensor | None, problem: PointProblem, count: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best points and scale of each row.

    Args:
        x: shape ``(C, N)``; magnitudes unless the points are signed.
        h: importance, float64, shape of ``x``, or None.
        problem: from `point_problem`.
        count: K.
        scales: scales to try, without polish; None for the grid and the polish.

    Returns:
        Points, float64 ``(C, K)``, and scales, float64 ``(C,)``, 0 for rows of zeros.
    """
    peak = x.abs().amax(dim=1).double()
    base = torch.where(peak > 0, peak, torch.ones_like(peak)) / problem.points.abs().max()
    if scales is None:
        trials = base[:, None] * scale_grid().to(base)
    else:
        trials = scales.to(base).expand(len(base), -1)
    height = max(1, _BATCH // trials.shape[1])
    found = [
        _search(
            sorted_moments(x[i : i + height], None if h is None else h[i : i + height], problem.power),
            problem,
            count,
            trials[i : i + height],
            polish=scales is None,
        )
        for i in range(0, len(x), height)
    ]
    points, scale = torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
    return points, torch.where(peak > 0, scale, torch.zeros_like(scale))


def _search(
    rows: SortedRows, problem: PointProblem, count: int, trials: Tensor, polish: bool
) -> tuple[Tensor, Tensor]:
    value = best_value(problem, bin_moments(rows, problem, trials), count) * trials**problem.power
    starts = min(_STARTS, trials.shape[1]) if polish else 1
    scale = trials.gather(1, value.topk(starts, dim=1, largest=False).indices)
    moments = bin_moments(rows, problem, scale)
    loss, chosen = best_subset(problem, moments, count)
    loss = loss * scale**problem.power
    for _ in range(_POLISH if polish else 0):
        trial = scale * refit(problem, moments, chosen)
        moments = bin_moments(rows, problem, trial)
        new_loss, new_chosen = best_subset(problem, moments, count)
        new_loss = new_loss * trial**problem.power
        better = new_loss < loss * (1 - 1e-10)
        if not bool(better.any()):
            break
        scale, loss = torch.where(better, trial, scale), torch.where(better, new_loss, loss)
        chosen = torch.where(better[..., None], new_chosen, chosen)
    best = loss.argmin(dim=1, keepdim=True)
    chosen = chosen.gather(1, best[..., None].expand(-1, -1, count))[:, 0]
    return problem.points[chosen], scale.gather(1, best)[:, 0]


def _problem(candidates: object, bits: int, power: int, signed: bool, zero: bool | None) -> PointProblem:
    points = candidate_points(candidates, bits, signed=signed)  # type: ignore[arg-type]
    has_zero = bool((points == 0).any())
    if zero is True and not has_zero:
        raise ValueError(f"candidates must hold 0 where zero=True, got {points.tolist()}: add 0, or leave zero=None")
    if zero is False:
        points = points[points > 0]
    if signed:
        points = torch.cat([-points.flip(0), points]).unique()
    count = 2**bits if signed else 2 ** (bits - 1)
    if points.numel() < count:
        raise ValueError(
            f"candidates must be at least as many as the points chosen, got {points.numel()} for {count} points of "
            f"{bits} bits{' with signs' if signed else ''}: lower bits, or choose a larger set such as 'three_words'"
        )
    return _prepared(tuple(points.tolist()), power, zero)


@lru_cache(maxsize=16)
def _prepared(points: tuple[float, ...], power: int, zero: bool | None) -> PointProblem:
    return point_problem(torch.tensor(points, dtype=torch.float64), power, zero)


def _layout(shape: Sequence[int], channel_axis: int | None) -> ScaleLayout:
    if channel_axis is None:
        return ScaleLayout()
    if not -len(shape) <= channel_axis < len(shape):
        raise ValueError(f"channel_axis must be an axis of the weight, got {channel_axis} for shape {tuple(shape)}")
    axis = channel_axis % len(shape)
    return ScaleLayout(shape[axis], tuple(shape), (axis,))


def _check(weight: Tensor, bits: int, power: int, importance: Tensor | None, scales: Tensor | None) -> None:
    if not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight must hold floating point numbers, got {weight.dtype} of shape {tuple(weight.shape)}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}: choose one of those")
    if power not in (2, 4):
        raise ValueError(f"power must be 2 or 4, got {power!r}: choose one of those")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, got NaN or infinite values: load a sound checkpoint")
    if not bool((weight != 0).any()):
        raise ValueError("weight must not be all zero, got nothing to quantize: leave such a layer out")
    if importance is not None:
        if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
            raise ValueError("importance must be finite and not negative, got other values: square it, or clamp it")
        try:
            torch.broadcast_shapes(importance.shape, weight.shape)
            fits = importance.dim() <= weight.dim()
            importance.expand(weight.shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"importance must broadcast to the weight's shape {tuple(weight.shape)}, got {tuple(importance.shape)}"
            )
    if scales is not None and (scales.dim() != 1 or not scales.numel() or not bool((scales > 0).all())):
        raise ValueError(f"scales must be positive and of shape (A,), got {scales!r}: pass a grid such as scale_grid()")
