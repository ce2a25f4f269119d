"""Greedy rounding with error feedback: weights not yet rounded make up for the error of those that are."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["error_feedback"]


def error_feedback(
    weight: Tensor, hessian: Tensor, quantize: Callable[[Tensor], Tensor], *, damping: float = 0.01
) -> Tensor:
    """Round the columns of a weight one by one, most important first::

        q_j = Q(w_j)        w_k -= (w_j - q_j) [H^-1]_jk / [H^-1]_jj   for every k not yet rounded

    with ``H`` updated as columns leave, by way of the Cholesky factor of its inverse.

    Args:
        weight: shape ``(G, O, d)``: G groups of O output channels.
        hessian: ``X X^T`` of the inputs, shape ``(G, d, d)``, float64.
        quantize: nearest level of a column, shape ``(G, O)`` to the same.
        damping: added to the diagonal, as a share of its mean, until the factorisation succeeds.

    Returns:
        Rounded weights, shape of ``weight``.

    Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1; greedy order as in their "act-order".

    >>> error_feedback(torch.tensor([[[0.4, 0.4]]]), torch.ones(1, 2, 2).double(), torch.round)
    tensor([[[0., 1.]]])
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    group = torch.arange(len(order), device=order.device)[:, None]
    h = hessian[group[..., None], order[..., None], order[:, None]].clone()
    unused = h.diagonal(dim1=1, dim2=2) == 0
    h.diagonal(dim1=1, dim2=2).add_(unused)  # an input that is always zero has no say
    factor = _inverse_factor(h, damping)
    left = weight.gather(2, order[:, None].expand_as(weight)).to(factor)
    rounded = torch.empty_like(left)
    for j in range(left.shape[2]):
        column = left[:, :, j]
        q = quantize(column.to(weight)).to(factor)
        rounded[:, :, j] = q
        error = (column - q) / factor[:, j, j, None]
        left[:, :, j + 1 :] -= error[..., None] * factor[:, j, None, j + 1 :]
    out = torch.empty_like(weight)
    return out.scatter_(2, order[:, None].expand_as(weight), rounded.to(weight))


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse; row j holds what column j passes on."""
    mean = h.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    for _ in range(20):
        damped = h.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
        damping *= 10
    raise ValueError("hessian must be positive semidefinite and finite, got one that is not: check the batches")
