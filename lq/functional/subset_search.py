"""Best subset of candidate points and best scale of a tensor, together: `search_subset`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lq.functional.layout import ScaleLayout
from lq.functional.levels import require_bits
from lq.functional.points import decode_points, encode_points
from lq.functional.scale_search import candidate_problem, search_rows

__all__ = ["SubsetResult", "search_subset"]


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
        layout = ScaleLayout.along(self.codes.shape, self.channel_axis)
        values = decode_points(
            layout.rows(self.codes), self.points, self.scale.reshape(-1), bits=self.bits, signed=self.signed
        )
        return layout.unrows(values, self.codes.shape)


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
    tried on a grid and on a finer one about its best, then subset and scale polished in turn until nothing changes.

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
    problem = candidate_problem(candidates, bits, power=power, signed=signed, zero=zero)
    layout = ScaleLayout.along(weight.shape, channel_axis)
    x = layout.rows(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
    h = layout.importance_rows(importance, weight)
    count = 2**bits if signed else 2 ** (bits - 1)
    points, scale, _ = search_rows(x if signed else x.abs(), h, problem.to(x.device), count, scales)
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


def _check(weight: Tensor, bits: int, power: int, importance: Tensor | None, scales: Tensor | None) -> None:
    if not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight must hold floating point numbers, got {weight.dtype} of shape {tuple(weight.shape)}")
    require_bits("bits", bits)
    if power not in (2, 4):
        raise ValueError(f"power must be 2 or 4, got {power!r}: choose one of those")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, got NaN or infinite values: load a sound checkpoint")
    if not bool((weight != 0).any()):
        raise ValueError("weight must not be all zero, got nothing to quantize: leave such a layer out")
    if importance is not None:
        _check_importance(importance, weight)
    if scales is not None and (scales.dim() != 1 or not scales.numel() or not bool((scales > 0).all())):
        raise ValueError(f"scales must be positive and of shape (A,), got {scales!r}: pass a grid such as scale_grid()")


def _check_importance(importance: Tensor, weight: Tensor) -> None:
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError("importance must be finite and not negative, got other values: square it, or clamp it")
    try:
        importance.expand(weight.shape)
    except RuntimeError as error:
        raise ValueError(
            f"importance must broadcast to the weight's shape {tuple(weight.shape)}, got {tuple(importance.shape)}: "
            "give it dimensions of size 1"
        ) from error
