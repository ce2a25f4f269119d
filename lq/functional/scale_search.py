"""Best points and best scale of many rows together: exact subsets on a grid of scales, then a polish."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lq.functional.candidates import choices
from lq.functional.levels import CodeRange
from lq.functional.moments import SortedRows, sorted_moments
from lq.functional.subset import PointProblem, best_subset, best_value, bin_moments, point_problem, refit

__all__ = ["best_step", "candidate_problem", "scale_grid", "search_rows", "shared_subset"]

SMALLEST_FACTOR, LARGEST_FACTOR, FACTORS = 0.02, 4.0, 200
_STARTS = 6
_POLISH = 10
_STILL = 1e-7  # relative: the scale is then within a few 1e-4 of its optimum
_ROUNDS = 4
_AROUND = 16
_BATCH = 1 << 14  # pairs of channel and scale whose shortest paths are found together


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


def search_rows(
    x: Tensor, h: Tensor | None, problem: PointProblem, count: int, scales: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best points and scale of each row.

    Args:
        x: shape ``(C, N)``; magnitudes unless the points are signed.
        h: importance, float64, shape of ``x``, or None.
        problem: from `point_problem`.
        count: K.
        scales: scales to try, without polish; None for the grid and the polish.

    Returns:
        Points ``(C, K)``, scales ``(C,)``, 0 for rows of zeros, and losses ``(C,)``, all float64.
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
    points, scale, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
    none = torch.zeros_like(scale)
    return points, torch.where(peak > 0, scale, none), torch.where(peak > 0, loss, none)


def shared_subset(x: Tensor, h: Tensor | None, problem: PointProblem, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """One subset for all rows, with a scale for each: a decoder table per layer and scales per channel.

    Rows are brought to one scale, the best subset of all of them found, the best scale of each row for that subset,
    and so on while the loss falls.

    Args:
        x: shape ``(C, N)``; magnitudes unless the points are signed.
        h: importance, float64, shape of ``x``, or None.
        problem: from `candidate_problem`.
        count: K.

    Returns:
        Points ``(K,)``, scales ``(C,)`` and losses ``(C,)``, float64.
    """
    _, scale, _ = search_rows(x, h, problem, count)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(_ROUNDS):
        unit = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]
        share = torch.where(scale > 0, scale, torch.zeros_like(scale))[:, None] ** problem.power  # zeros have no say
        weight = share.expand(x.shape) if h is None else h * share
        level = (x.double() / unit).to(x.dtype)
        points, _, _ = search_rows(level.reshape(1, -1), weight.reshape(1, -1), problem, count)
        fixed = point_problem(points[0].cpu(), problem.power, count).to(x.device)
        _, scale, loss = search_rows(x, h, fixed, count)
        if best is not None and not bool(loss.sum() < best[2].sum() * (1 - 1e-6)):
            break
        best = points[0], scale, loss
    assert best is not None
    return best


def best_step(x: Tensor, h: Tensor | None, codes: CodeRange, power: int) -> Tensor:
    """Best step of uniform levels for each row: the search with nothing left to choose but the scale.

    Args:
        x: shape ``(C, N)``.
        h: importance, float64, shape of ``x``, or None.
        codes: code range.
        power: 2 or 4.

    Returns:
        Positive steps, float64, shape ``(C,)``.
    """
    half = torch.arange(codes.hi + 1, dtype=torch.float64) + codes.offset
    problem = point_problem(half, power, len(half)).to(x.device)
    if codes.lo >= 0:
        x = x.clamp_min(0)
    scale = search_rows(x.abs(), h, problem, len(half))[1]
    return torch.where(scale > 0, scale, 1.0 / (codes.largest * x.shape[1] ** 0.5))


def _lowest(rows: SortedRows, problem: PointProblem, count: int, trials: Tensor, keep: int) -> Tensor:
    """Scales of least loss among those tried, best first, shape ``(C, keep)``."""
    value = best_value(problem, bin_moments(rows, problem, trials), count) * trials**problem.power
    return trials.gather(1, value.topk(min(keep, trials.shape[1]), dim=1, largest=False).indices)


def _search(
    rows: SortedRows, problem: PointProblem, count: int, trials: Tensor, polish: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scale = _lowest(rows, problem, count, trials, _STARTS if polish else 1)
    if polish:
        spacing = (LARGEST_FACTOR / SMALLEST_FACTOR) ** (1 / FACTORS)
        around = spacing ** torch.linspace(-1, 1, _AROUND, dtype=torch.float64, device=scale.device)
        scale = torch.cat([scale, _lowest(rows, problem, count, scale[:, :1] * around, _STARTS // 2)], dim=1)
    scale, loss, chosen = _alternate(rows, problem, count, scale, _POLISH if polish else 0)
    best = loss.argmin(dim=1, keepdim=True)
    chosen = chosen.gather(1, best[..., None].expand(-1, -1, count))[:, 0]
    return problem.points[chosen], scale.gather(1, best)[:, 0], loss.gather(1, best)[:, 0]


def _alternate(
    rows: SortedRows, problem: PointProblem, count: int, scale: Tensor, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Best scale of a subset and best subset at a scale in turn, until the loss stands still."""
    moments = bin_moments(rows, problem, scale)
    loss, chosen = best_subset(problem, moments, count)
    loss = loss * scale**problem.power
    for _ in range(rounds):
        trial = scale * refit(problem, moments, chosen)
        new_moments = bin_moments(rows, problem, trial)
        new_loss, new_chosen = best_subset(problem, new_moments, count)
        new_loss = new_loss * trial**problem.power
        better = new_loss < loss * (1 - _STILL)
        if not bool(better.any()):
            break
        scale, loss = torch.where(better, trial, scale), torch.where(better, new_loss, loss)
        chosen = torch.where(better[..., None], new_chosen, chosen)
        moments = torch.where(better, new_moments, moments)
    return scale, loss, chosen


def candidate_problem(
    candidates: str | Sequence[float] | Tensor | None,
    bits: int,
    *,
    power: int = 2,
    signed: bool = False,
    zero: bool | None = None,
) -> PointProblem:
    """The problem that `search_rows` solves, from the arguments of `search_subset`.

    Args:
        candidates: name or magnitudes.
        bits: width of a code.
        power: 2 or 4.
        signed: choose from the candidates and their negatives.
        zero: force or forbid a zero point.

    Returns:
        The problem, kept for the next call.

    Raises:
        ValueError: for candidates that do not fit, or fewer of them than points.
    """
    points = choices(candidates, bits, signed=signed, zero=zero)
    count = 2**bits if signed else 2 ** (bits - 1)
    return _prepared(tuple(points.tolist()), power, zero, count)


@lru_cache(maxsize=16)
def _prepared(points: tuple[float, ...], power: int, zero: bool | None, count: int) -> PointProblem:
    return point_problem(torch.tensor(points, dtype=torch.float64), power, count, zero)
