import numpy as np
import pytest
import torch

from lq.functional import rounding
from lq.functional.feedback import error_feedback


def naive(weight, hessian, damping=0.01):
    """Optimal brain surgeon as its formulas stand: invert, round, update, leave out, invert anew."""
    h = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, left = weight.copy(), list(order)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        j = left[0]
        error = (w[:, j] - np.round(w[:, j])) / inverse[0, 0]
        w[:, j] = np.round(w[:, j])
        for position, k in enumerate(left[1:], start=1):
            w[:, k] -= error * inverse[0, position]
        left.pop(0)
    return w


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_surgeons_formulas(seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(2, 60, 7)) @ draw.normal(size=(2, 7, 7))
    weight = draw.normal(size=(2, 3, 7)) * 2
    hessian = np.einsum("gnd,gne->gde", x, x)
    result = error_feedback(torch.from_numpy(weight), torch.from_numpy(hessian), torch.round).numpy()
    for g in range(2):
        np.testing.assert_allclose(result[g], naive(weight[g], hessian[g]), atol=1e-9)


def test_it_lowers_the_error_of_the_outputs():
    torch.manual_seed(0)
    x = torch.randn(1, 500, 30).double() @ torch.randn(30, 30).double()
    weight = torch.randn(1, 8, 30).double() * 2
    rounded = error_feedback(weight, x.transpose(1, 2) @ x, torch.round)
    plain = ((weight.round() - weight) @ x.transpose(1, 2)).square().sum()
    assert ((rounded - weight) @ x.transpose(1, 2)).square().sum() < 0.5 * plain
    assert torch.equal(rounded, rounded.round())


def test_dead_inputs_and_singular_products_are_survived():
    x = torch.randn(1, 5, 12).double()
    x[..., 3] = 0
    weight = torch.randn(1, 2, 12).double()
    result = error_feedback(weight, x.transpose(1, 2) @ x, torch.round)
    assert bool(torch.isfinite(result).all())
    with pytest.raises(ValueError, match="hessian must be positive semidefinite and finite"):
        error_feedback(weight, torch.full((1, 12, 12), float("nan")).double(), torch.round)


def test_rounding_starts_where_the_weight_is_and_must_decide():
    position = torch.tensor([-0.5, 0.0, 0.3, 1.0, 2.0])
    torch.testing.assert_close(rounding.soft_rounding(rounding.rounding_start(position)), position.clamp(0, 1))
    assert float(rounding.rounding_penalty(torch.tensor([0.0, 1.0]), 20.0)) == 0
    assert float(rounding.rounding_penalty(torch.tensor([0.4]), 2.0)) == pytest.approx(1 - 0.2**2)
