"""What a student loses against its teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation_loss", "feature_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, dim: int = 1) -> Tensor:
    """Divergence of the student's classes from the teacher's, ``T^2 KL(softmax(t/T) || softmax(z/T))``.

    Args:
        student: logits z, any shape.
        teacher: logits t, the same shape.
        temperature: T, positive; the factor T^2 keeps the size of the gradient.
        dim: of the classes; the mean is taken over the others.

    Returns:
        Scalar, in at least float32.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.

    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> distillation_loss(logits, logits).item(), round(distillation_loss(-logits, logits).item(), 4)
    (0.0, 0.4621)
    """
    logs, target = (F.log_softmax(_precise(logits) / temperature, dim) for logits in (student, teacher))
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(dim).mean() * temperature**2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of features in units of the teacher's energy, ``mean((z - t)^2) / mean(t^2)``.

    Args:
        student: any shape.
        teacher: the same shape.

    Returns:
        Scalar, in at least float32.

    >>> feature_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])).item()
    0.20000000298023224
    """
    z, t = _precise(student), _precise(teacher)
    return (z - t).square().mean() / t.square().mean().clamp_min(1e-12)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
