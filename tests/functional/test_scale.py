import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lq.functional import initial_scale, scale_parity
from lq.functional.layout import ScaleLayout
from lq.functional.levels import CodeRange
from lq.functional.scale import SCALE_INITS
from tests.helpers import numpy_reference

RANGES = [CodeRange(-1, 1, 0.0), CodeRange(-7, 7, 0.0), CodeRange(-2, 1, 0.5), CodeRange(0, 15, 0.0)]


@settings(max_examples=25, deadline=None)
@given(codes=st.sampled_from(RANGES), spread=st.floats(1e-4, 1e4), seed=st.integers(0, 99))
@example(codes=RANGES[1], spread=1.0, seed=77)  # two basins of nearly the same depth: the worst of these 400 cases
def test_mse_comes_near_a_dense_grid_of_scales(codes, spread, seed):
    x = np.random.default_rng(seed).normal(0, spread, 500)
    x = np.abs(x) if codes.lo == 0 else x
    s = initial_scale(torch.from_numpy(x)[None], codes).item()

    def loss(scale):
        return np.sum((x - numpy_reference.hard(x, scale, *codes)) ** 2)

    grid = np.abs(x).max() / codes.largest * np.geomspace(0.02, 1.2, 400)
    assert loss(s) <= 1.03 * min(loss(g) for g in grid)


def test_other_methods_follow_their_formulas():
    x = torch.randn(2, 5000)
    codes = CodeRange(-7, 7, 0.0)
    torch.testing.assert_close(initial_scale(x, codes, "max"), x.abs().amax(1) / 7)
    torch.testing.assert_close(initial_scale(x, codes, "lsq"), 2 * x.abs().mean(1) / 7**0.5)
    expected = torch.quantile(x.abs(), 0.999, dim=1) / 7
    torch.testing.assert_close(initial_scale(x, codes, "percentile"), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("method", SCALE_INITS)
@pytest.mark.parametrize(
    "rows", [torch.zeros(1, 9), torch.tensor([[0.0, 0.0], [1.0, -2.0]]), torch.full((1, 4), 1e-30)]
)
def test_scales_are_always_positive(method, rows):
    s = initial_scale(rows, CodeRange(-7, 7, 0.0), method)
    assert bool((s > 0).all())


def test_sampling_of_long_rows_barely_matters():
    x = torch.randn(1, 1 << 18)
    whole = initial_scale(x[:, : 1 << 16], CodeRange(-7, 7, 0.0))
    assert initial_scale(x, CodeRange(-7, 7, 0.0)).item() == pytest.approx(whole.item(), rel=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match="scale_init must be one of .* got 'median'"):
        initial_scale(torch.ones(1, 2), CodeRange(-1, 1, 0.0), "median")
    with pytest.raises(ValueError, match="not finite"):
        initial_scale(torch.tensor([[1.0, float("nan")]]), CodeRange(-1, 1, 0.0))


@pytest.mark.parametrize(
    ("transposed", "groups", "shape"),
    [(False, 1, (6, 4, 3, 3)), (False, 2, (6, 2, 3)), (True, 1, (4, 6, 3)), (True, 2, (4, 3, 3, 3))],
)
def test_layout_gives_each_output_channel_its_own_row(transposed, groups, shape):
    layout = ScaleLayout.per_channel(shape, transposed=transposed, groups=groups)
    assert layout.scales == 6
    weight = torch.randn(shape)
    kinds = {(False, 4): torch.nn.Conv2d, (False, 3): torch.nn.Conv1d, (True, 3): torch.nn.ConvTranspose1d}
    kind = kinds.get((transposed, weight.dim()), torch.nn.ConvTranspose2d)
    conv = kind(4, 6, 3, groups=groups, bias=False)
    with torch.no_grad():
        conv.weight.copy_(weight)
        # scaling the weights by a factor per scale must scale exactly the output channels
        factors = torch.arange(1.0, 7.0)
        x = torch.randn(2, 4, *[5] * (weight.dim() - 2))
        before = conv(x)
        conv.weight.copy_((layout.view(weight) * layout.broadcast(factors)).reshape(shape))
        after = conv(x)
    torch.testing.assert_close(after, before * factors.view(1, 6, *[1] * (weight.dim() - 2)), atol=1e-5, rtol=1e-5)
    assert layout.rows(weight).shape == (6, weight.numel() // 6)


@settings(max_examples=50, deadline=None)
@given(codes=st.sampled_from(RANGES), factor=st.floats(1e-6, 1e3), per_row=st.booleans(), seed=st.integers(0, 99))
def test_parity_is_the_square_of_the_scale_over_the_one_of_lsq(codes, factor, per_row, seed):
    x = np.random.default_rng(seed).normal(size=(3, 40))
    usual = 2 * np.abs(x).mean(axis=1 if per_row else None, keepdims=True) / codes.largest**0.5
    scale = torch.from_numpy(factor * usual).requires_grad_()
    parity = scale_parity(torch.from_numpy(x), scale, codes.largest)
    assert not parity.requires_grad
    assert parity.shape == scale.shape
    np.testing.assert_allclose(parity.numpy(), np.full(usual.shape, min(1.0, factor**2)), rtol=1e-12)


def test_parity_of_a_row_of_zeros_is_one():
    assert scale_parity(torch.zeros(2, 3), torch.tensor([[0.1], [1e-20]]), 7.0).tolist() == [[1.0], [1.0]]
