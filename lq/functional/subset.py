"""The best subset of candidate points for sorted weights, exactly, for many scales and channels at once.

With nearest-point assignment the loss of the weights between two neighbouring chosen points depends on those two alone,
so the best subset is a shortest path through the ascending candidates.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lq.functional.moments import SortedRows, cut_moments, shifted

__all__ = ["PointProblem", "best_subset", "best_value", "bin_moments", "point_problem", "refit"]

_MOST_ENTRIES = 1 << 27


class PointProblem(NamedTuple):
    """What depends on the candidates alone; made by `point_problem`.

    The borders between which no nearest point can change are the candidates and the midpoints of all pairs. Between two
    neighbouring borders lies a bin; sums of powers about its centre are all that is needed of the weights in it.

    Args:
        points: candidates in units of the scale, ascending, shape ``(m,)``.
        borders: shape ``(R,)``.
        centres: of the ``R + 1`` bins.
        costs: matrix from the bins' sums of powers to losses: rows are ``(start j, end j, pair i < j)`` with pairs
            ordered by j; columns are power, then bin. One row, their sum, where there is nothing to choose.
        power: p.
    """

    points: Tensor
    borders: Tensor
    centres: Tensor
    costs: Tensor
    power: int

    def to(self, device: torch.device) -> "PointProblem":
        """The same on another device."""
        return PointProblem(*(t.to(device) for t in self[:4]), self.power)  # type: ignore[arg-type]


def point_problem(points: Tensor, power: int, count: int, zero: bool | None = None) -> PointProblem:
    """Prepare the losses that the shortest path adds up::

        start j   sum over u < U_j of (u - U_j)^p                       end j   the same over u >= U_j
        pair i,j  sum over U_i <= u < m of (u - U_i)^p + sum over m <= u < U_j of (u - U_j)^p,   m = (U_i + U_j)/2

    Args:
        points: candidates, ascending, float64.
        power: 2 or 4.
        count: K; where all candidates are chosen, one path alone is prepared.
        zero: True where zero must be among the chosen points.

    Returns:
        The problem.

    Raises:
        ValueError: for so many candidates that the table would not fit.
    """
    m = points.numel()
    every = count == m
    pairs = (
        torch.tensor([(i, j) for j in range(m) for i in range(j - 1 if every and j else 0, j)]).long().reshape(-1, 2)
    )
    middles = (points[pairs[:, 0]] + points[pairs[:, 1]]) / 2
    borders = torch.cat([points, middles]).unique()
    entries = (2 * m + len(pairs)) * (power + 1) * (len(borders) + 1)
    if entries > _MOST_ENTRIES:
        raise ValueError(
            f"candidates must be few enough for a table of {_MOST_ENTRIES} losses, got {m} that need {entries}: use "
            "fewer, or such as share their midpoints (sums of powers of two)"
        )
    centres = torch.cat([borders[:1], (borders[1:] + borders[:-1]) / 2, borders[-1:]])
    bins = torch.arange(len(borders) + 1)
    at = torch.searchsorted(borders, points)  # bins up to at[j] lie below point j
    middle = torch.searchsorted(borders, middles)
    # (u - U)^p = sum over k of binom(p, k) (c - U)^(p - k) (u - c)^k
    terms = [math.comb(power, k) * (centres - points[:, None]) ** (power - k) for k in range(power + 1)]
    loss = torch.stack(terms, dim=1)  # (m, p + 1, R + 1)
    below = (bins <= at[:, None])[:, None]
    i, j = pairs.unbind(1)
    left = ((bins > at[i, None]) & (bins <= middle[:, None]))[:, None]
    right = ((bins > middle[:, None]) & (bins <= at[j, None]))[:, None]
    between = left * loss[i] + right * loss[j]
    costs = torch.cat([below * loss, ~below * loss, between]).flatten(1)
    if every:
        costs = torch.cat([costs[:1], costs[2 * m - 1 :]]).sum(0, keepdim=True)  # first start, last end, all pairs
    problem = PointProblem(points, borders, centres, costs, power)
    return problem if every or zero is not True else _through_zero(problem, pairs)


def _through_zero(problem: PointProblem, pairs: Tensor) -> PointProblem:
    """Paths that pass zero by get an infinite loss, by way of an extra column that is always 1."""
    points, m = problem.points, problem.points.numel()
    at = int((points == 0).nonzero())
    place = torch.arange(m)
    past = torch.cat([place > at, place < at, (pairs[:, 0] < at) & (pairs[:, 1] > at)])
    extra = torch.where(past, torch.inf, 0.0).to(points)[:, None]
    return problem._replace(costs=torch.cat([problem.costs, extra], dim=1))


def bin_moments(rows: SortedRows, problem: PointProblem, scales: Tensor) -> Tensor:
    """Sums of powers of ``x/a`` about the centre of each bin.

    Args:
        rows: sorted weights.
        problem: the candidates.
        scales: ``a``, positive float64, shape ``(C, A)``.

    Returns:
        Shape ``(p + 1, R + 1, C, A)``.
    """
    channels, trials = scales.shape
    borders = (scales[..., None] * problem.borders).to(rows.values.dtype)
    found = torch.searchsorted(rows.values, borders.view(channels, -1)).clamp_(max=rows.count)
    found = found.view(channels, trials, -1)
    segments = torch.arange(rows.centres.shape[1] + 1, device=scales.device) * rows.segment
    cuts = torch.cat([segments.expand(channels, trials, -1), found], dim=-1)
    several = len(segments) > 2
    cuts = cuts.sort(dim=-1).values if several else torch.cat([cuts[..., :1], found, cuts[..., 1:2]], dim=-1)
    sums, segment = cut_moments(rows, cuts)
    centre = rows.centres.gather(1, segment.reshape(channels, -1)).view(segment.shape)
    if not several:
        bins = problem.centres.expand(segment.shape)
        return torch.stack(shifted(sums, centre / scales[..., None] - bins, scales[..., None])).permute(0, 3, 1, 2)
    which = torch.searchsorted(found, cuts[..., :-1].contiguous(), right=True)
    bins = problem.centres[which]
    parts = shifted(sums, centre / scales[..., None] - bins, scales[..., None])
    out = sums.new_zeros(len(parts), channels, trials, len(problem.centres))
    for total, part in zip(out, parts, strict=True):
        total.scatter_add_(-1, which, part)
    return out.permute(0, 3, 1, 2)


def _losses(problem: PointProblem, moments: Tensor) -> Tensor:
    """Losses in units of the scale to the power p, shape ``(2m + pairs, batch)``."""
    columns = moments.reshape(-1, moments.shape[2] * moments.shape[3])
    width = columns.shape[0]
    losses = problem.costs[:, :width] @ columns
    return losses if problem.costs.shape[1] == width else losses + problem.costs[:, width:]


def best_value(problem: PointProblem, moments: Tensor, count: int) -> Tensor:
    """Least loss over all subsets of ``count`` candidates, at each scale.

    Args:
        problem: the candidates.
        moments: from `bin_moments`.
        count: K.

    Returns:
        Losses in units of ``a^p``, shape ``(C, A)``.
    """
    if len(problem.costs) == 1:
        return _losses(problem, moments)[0].clamp_min(0).view(moments.shape[2:])
    return _shortest(problem, moments, count)[0].view(moments.shape[2:])


def best_subset(problem: PointProblem, moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Least loss and the subset that has it.

    Args:
        problem: the candidates.
        moments: from `bin_moments`.
        count: K.

    Returns:
        Losses in units of ``a^p``, shape ``(C, A)``, and chosen candidates, ascending, shape ``(C, A, K)``.
    """
    if len(problem.costs) == 1:
        all_ = torch.arange(count, device=moments.device).expand(*moments.shape[2:], count)
        return best_value(problem, moments, count), all_
    best, last, steps = _shortest(problem, moments, count, trace=True)
    chosen = [last]
    for step in reversed(steps):
        chosen.append(step.gather(0, chosen[-1][None])[0])
    return best.view(moments.shape[2:]), torch.stack(chosen[::-1], dim=-1).view(*moments.shape[2:], count)


def _shortest(
    problem: PointProblem, moments: Tensor, count: int, trace: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The shortest path; D[j] is the least loss of all x below point j with t points chosen, the last of them j."""
    m = problem.points.numel()
    losses = _losses(problem, moments)
    start, end, between = losses[:m], losses[m : 2 * m], losses[2 * m :]
    least = start
    steps: list[Tensor] = []
    for t in range(1, count):
        following = torch.full_like(start, torch.inf)
        step = torch.zeros(start.shape if trace else (0,), dtype=torch.long, device=start.device)
        for j in range(t, m - count + t + 1):  # as many candidates must remain as there are points to choose
            first = j * (j - 1) // 2
            options = least[t - 1 : j] + between[first + t - 1 : first + j]
            if trace:
                value = options.min(dim=0)
                following[j] = value.values
                step[j] = value.indices + t - 1
            else:
                torch.amin(options, dim=0, out=following[j])
        least = following
        steps.append(step)
    total = (least + end)[count - 1 :]
    last = total.min(dim=0)
    return last.values.clamp_min(0), last.indices + count - 1, steps


def refit(problem: PointProblem, moments: Tensor, chosen: Tensor) -> Tensor:
    """Factor by which the scale must change to be the best for a subset with the present assignment::

        p = 2   sum h q u / sum h q^2               p = 4   the root of sum h q (u - f q)^3, by Newton

    Args:
        problem: the candidates.
        moments: from `bin_moments`, shape ``(p + 1, R + 1, C, A)``.
        chosen: subset per scale, shape ``(C, A, K)``.

    Returns:
        Factors, shape ``(C, A)``; 1 where every weight is assigned to zero.
    """
    points = problem.points[chosen]
    middles = (points[..., 1:] + points[..., :-1]) / 2
    # a bin lies on one side of every midpoint: of its borders the lower one decides
    lower = torch.cat([problem.borders[:1] - 1, problem.borders]).expand(*middles.shape[:2], -1).contiguous()
    nearest = torch.searchsorted(middles.contiguous(), lower, right=True)
    q = points.gather(-1, nearest).permute(2, 0, 1)  # (R + 1, C, A)
    about = _about(moments, problem.centres[:, None, None] - q)
    weight = (q**2 * about[0]).sum(0)
    factor = torch.ones_like(weight)
    if problem.power == 2:
        move = (q * about[1]).sum(0) / weight
    else:
        move = _newton(q, about)
    return torch.where(weight > 0, factor + torch.nan_to_num(move), factor)


def _about(moments: Tensor, shift: Tensor) -> list[Tensor]:
    return shifted(moments.movedim(0, -1), shift, torch.ones_like(shift))


def _newton(q: Tensor, about: list[Tensor], steps: int = 20) -> Tensor:
    """Minimum over d of ``sum h (u - q - d q)^4``, convex in d."""
    a, b, c, e = ((q ** (k + 1) * about[3 - k]).sum(0) for k in range(4))
    d = torch.zeros_like(a)
    for _ in range(steps):
        slope = a - 3 * b * d + 3 * c * d**2 - e * d**3
        bend = 3 * (b - 2 * c * d + e * d**2)
        d = d + torch.nan_to_num(slope / bend)
    return d.clamp(-0.5, 1.0)
