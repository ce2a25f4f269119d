"""Weight normalization: zero mean and a fixed spread before quantization."""

import torch
from torch import Tensor

__all__ = ["standardize"]

_TINY = 1e-12


def standardize(weight: Tensor, spread: Tensor) -> Tensor:
    """Weights with mean 0 and a given standard deviation::

        spread * (w - mean(w)) / std(w)

    Gradients pass through mean and standard deviation. A constant weight becomes 0; half precision is computed in
    float32.

    Args:
        weight: any shape, floating point.
        spread: standard deviation of the result, one element.

    Returns:
        Shape and dtype of ``weight``.

    Source: Li et al., Additive Powers-of-Two Quantization, ICLR 2020, section 3.2, where the spread is 1; another one
        spares networks without batch norms a change of scale.

    >>> standardize(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0]))
    tensor([-2.4495,  0.0000,  2.4495])
    """
    precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
    centred = precise - precise.mean()
    return (centred * (spread.to(precise) / centred.std(correction=0).clamp_min(_TINY))).to(weight.dtype)
