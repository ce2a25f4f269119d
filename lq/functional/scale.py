"""First value of a scale, from the data it will quantize."""

import torch
from torch import Tensor

from lq.functional.hard import hard_quantize, quantize
from lq.functional.layout import positive
from lq.functional.levels import CodeRange

__all__ = ["SCALE_INITS", "initial_scale", "scale_parity", "thinned"]

SCALE_INITS = ("mse", "lsq", "max", "percentile")
PERCENTILE = 0.999
_SAMPLE = 1 << 16  # values per scale that the search looks at: its error falls with their root, not with the layer
_GRID = 48
_REFINE = 12
_POLISH = 20


def initial_scale(x: Tensor, codes: CodeRange, method: str = "mse") -> Tensor:
    """First scale of each row of ``x``::

        mse         the s that minimises sum (x - Q(x))^2: log grid of 48 from 0.02 to 1.2 times the maximum, 12
                    more around the best, then s = sum q x / sum q^2 repeated
        lsq         2 mean|x| / sqrt(Q)
        max         max|x| / Q
        percentile  the 99.9th percentile of |x|, over Q          (Q = largest level in steps)

    A row of zeros gets 1/(Q sqrt(N)), a step of the size that a freshly initialised row would have.

    Args:
        x: shape ``(C, N)``, finite; rows of more than 65536 values are sampled evenly for ``mse``.
        codes: code range.
        method: one of the four above.

    Returns:
        Positive scales, shape ``(C,)``, dtype of ``x``.

    Raises:
        ValueError: for an unknown method, or values that are not finite.

    Source: lsq after Esser et al. 2020, section 2.1; mse after LSQ+ (Bhalgat et al. 2020), section 3.3.

    >>> initial_scale(torch.tensor([[-0.3, 0.0, 0.3]]), CodeRange(-1, 1, 0.0), "mse")
    tensor([0.3000])
    """
    if method not in SCALE_INITS:
        raise ValueError(f"scale_init must be one of {SCALE_INITS}, got {method!r}: choose one of those")
    peak = x.abs().amax(dim=1)
    if not bool(torch.isfinite(peak).all()):
        raise ValueError("cannot set a scale from values that are not finite: check the weights or the input data")
    if method == "mse":
        scale = _least_squares(x, peak, codes)
    elif method == "lsq":
        scale = 2 * x.abs().mean(dim=1) / codes.largest**0.5
    elif method == "max":
        scale = peak / codes.largest
    else:
        rank = max(1, round(PERCENTILE * x.shape[1]))
        scale = x.abs().kthvalue(rank, dim=1).values / codes.largest
    empty = torch.full_like(scale, 1.0 / (codes.largest * x.shape[1] ** 0.5))
    return torch.where(scale > 0, scale, torch.where(peak > 0, peak / codes.largest, empty))


@torch.no_grad()
def scale_parity(x: Tensor, scale: Tensor, largest: float) -> Tensor:
    """Factor beside LSQ's with which scales smaller than LSQ's own learn their logarithm::

        min(1, (s / s_LSQ)^2)          s_LSQ = 2 mean|x| / sqrt(Q)

    LSQ's factor ``1/sqrt(N Q)`` gives scale and weights like relative steps at LSQ's first scale. The least squares one
    is many times smaller at 8 bits, its relative steps are as many times larger, and grow as they shrink it: a step of
    the optimizer can carry it past zero. A step of ``log s`` moves ``s`` by ``s^2`` times the gradient; this makes that
    of a step of ``s``, at the rate that is LSQ's where ``s = s_LSQ``. It is so under optimizers whose steps are
    proportional to gradients; under Adam, whose steps are not, a smaller ``scale_lr_factor`` helps.

    Args:
        x: weights, any shape.
        scale: learned scale, one, or of as many dimensions as ``x`` and broadcastable to it; its magnitude is used.
        largest: ``Q``, largest level in steps.

    Returns:
        Factor in (0, 1] for each scale, shape of ``scale``, without gradient.

    Source: derived from Esser et al., Learned Step Size Quantization, ICLR 2020, sections 2.1 and 2.2.

    >>> scale_parity(torch.tensor([-1.0, 1.0]), torch.tensor([0.5]), 4.0)
    tensor([0.2500])
    """
    s = positive(scale)
    shared = list(range(x.dim())) if s.numel() == 1 else [i for i, size in enumerate(s.shape) if size == 1]
    sums = torch.linalg.vector_norm(x, 1, dim=shared, keepdim=True).reshape(s.shape)
    ratio = s * (largest**0.5 * x.numel() / s.numel() / 2) / sums
    return ratio.square_().clamp_(max=1.0)


def thinned(rows: Tensor) -> Tensor:
    """Rows of at most 65536 values, sampled evenly, the first and the last among them.

    Args:
        rows: shape ``(C, N)``.

    Returns:
        Shape ``(C, n)``.

    >>> thinned(torch.zeros(2, 100_000)).shape
    torch.Size([2, 65536])
    """
    if rows.shape[1] <= _SAMPLE:
        return rows
    return rows[:, torch.linspace(0, rows.shape[1] - 1, _SAMPLE, device=rows.device, dtype=torch.float64).long()]


def _least_squares(x: Tensor, peak: Tensor, codes: CodeRange) -> Tensor:
    x = thinned(x)
    largest = peak.clamp_min(torch.finfo(x.dtype).tiny) / codes.largest
    best, least = largest, torch.full_like(largest, torch.inf)
    coarse = torch.logspace(-1.7, 0.08, _GRID, dtype=torch.float64)
    for factor in coarse.tolist():
        best, least = _better(x, largest * factor, best, least, codes)
    around, spacing = best, float(coarse[1] / coarse[0])
    for power in torch.linspace(-1, 1, _REFINE, dtype=torch.float64).tolist():
        best, least = _better(x, around * spacing**power, best, least, codes)
    for _ in range(_POLISH):
        q = quantize(x, best[:, None], lo=codes.lo, hi=codes.hi, offset=codes.offset) + codes.offset
        trial = ((q * x).sum(1) / q.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)).abs()
        before = least
        best, least = _better(x, torch.where(trial > 0, trial, best), best, least, codes)
        if bool((least == before).all()):
            break
    return torch.where(peak > 0, best, torch.zeros_like(best))


def _better(x: Tensor, trial: Tensor, best: Tensor, least: Tensor, codes: CodeRange) -> tuple[Tensor, Tensor]:
    value = hard_quantize(x, trial[:, None], lo=codes.lo, hi=codes.hi, offset=codes.offset)
    loss = (x - value).square_().sum(dim=1)
    wins = loss < least
    return torch.where(wins, trial, best), torch.where(wins, loss, least)
