import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lq
from lq.functional import codebook as module
from lq.functional import fit_codebook


def enumerate_clusters(x, h, count, power):
    """Every way to cut the sorted values into runs, with the best centre of each run."""
    order = np.argsort(x)
    x, h = x[order], h[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), min(count, len(x)) - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, len(x))):
            y, w = x[a:b], h[a:b]
            if power == 2:
                centre = (w * y).sum() / max(w.sum(), 1e-300)
            else:
                grid = np.linspace(y.min(), y.max(), 4001)
                centre = grid[(w[:, None] * (y[:, None] - grid) ** 4).sum(0).argmin()]
            total += (w * np.abs(y - centre) ** power).sum()
        best = min(best, total)
    return best


@settings(max_examples=120, deadline=None)
@given(
    x=st.lists(st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=11),
    count=st.sampled_from([2, 3, 4]),
    weighted=st.booleans(),
    signed=st.booleans(),
)
def test_least_squares_levels_are_the_exact_optimum(x, count, weighted, signed):
    values = np.array(x)
    h = np.random.default_rng(0).random(len(x)) + 0.1 if weighted else np.ones(len(x))
    levels, loss = fit_codebook(
        torch.tensor(values), count, importance=torch.tensor(h) if weighted else None, signed=signed
    )
    expected = enumerate_clusters(values if signed else np.abs(values), h, count, 2)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert levels.shape == (count,)
    assert bool((levels.diff() >= 0).all())


@pytest.mark.parametrize("seed", range(5))
def test_fourth_power_levels_are_near_the_optimum(seed):
    x = np.random.default_rng(seed).normal(size=12)
    _, loss = fit_codebook(torch.tensor(x), 3, power=4, signed=True)
    assert float(loss) <= enumerate_clusters(x, np.ones(12), 3, 4) * 1.001


def test_rows_are_searched_each_by_itself():
    torch.manual_seed(0)
    weight, h = torch.randn(5, 300), torch.rand(5, 300)
    for power in (2, 4):
        levels, loss = fit_codebook(weight, 8, power=power, importance=h, channel_axis=0)
        for c in range(5):
            own, own_loss = fit_codebook(weight[c], 8, power=power, importance=h[c])
            torch.testing.assert_close(levels[c], own, rtol=1e-6, atol=1e-9)
            assert float(loss[c]) == pytest.approx(float(own_loss), rel=1e-9)


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_subset_beats_free_levels(power, bits):
    torch.manual_seed(bits)
    weight = torch.randn(40_000)
    _, free = fit_codebook(weight, 2 ** (bits - 1), power=power)
    assert float(free) <= float(lq.search_subset(weight, bits=bits, power=power).loss) * (1 + 1e-9)


def test_gaussian_levels_are_those_of_lloyd_and_max():
    # Max 1960, table I: 8 levels for a unit Gaussian at 0.2451, 0.7560, 1.3439, 2.1520
    torch.manual_seed(0)
    levels, _ = fit_codebook(torch.randn(400_000), 4)
    torch.testing.assert_close(levels.float(), torch.tensor([0.2451, 0.7560, 1.3439, 2.1520]), atol=0.02, rtol=0)


def test_fewer_values_than_levels():
    levels, loss = fit_codebook(torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0]), 4)
    assert float(loss) == 0
    assert {1.0, 2.0} <= set(levels.tolist())
    levels, loss = fit_codebook(torch.tensor([1.0, 2.0]), 4)
    assert float(loss) == 0
    assert levels.shape == (4,)


def test_many_weights_come_within_a_hair_of_the_exact_optimum(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(60_000)
    _, exact = fit_codebook(weight, 8)
    monkeypatch.setattr(module, "_EXACT", 1000)
    monkeypatch.setattr(module, "_BORDERS", 4096)
    _, fast = fit_codebook(weight, 8)
    assert 1 - 1e-12 <= float(fast / exact) < 1 + 1e-5
