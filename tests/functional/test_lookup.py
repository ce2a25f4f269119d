"""Counts of thresholds and tables, whichever way they are found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.functional.lookup import count_reached, look_up, take

MANY = 5000  # values from which on a grid is looked for


def compared(u, thresholds):
    return (u[..., None] >= thresholds.to(u.dtype)).sum(-1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-300, 300), min_size=1, max_size=15, unique=True),
    st.integers(-3, 6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_thresholds_on_a_grid_are_counted_as_by_comparison(whole, fine, dtype, seed):
    thresholds = torch.tensor(sorted(whole), dtype=torch.float64) / 2.0**fine
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(MANY, generator=generator, dtype=torch.float64) * float(thresholds.abs().max() + 1)
    exact, below = thresholds.to(dtype), torch.nextafter(thresholds.float(), torch.tensor(-math.inf)).to(dtype)
    u = torch.cat(
        [u.to(dtype), exact, below, torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, -1e-30, 1e30], dtype=dtype)]
    )
    expected = compared(u, thresholds)
    assert torch.equal(count_reached(u, thresholds), expected)
    table = torch.rand(len(thresholds) + 1)
    assert torch.equal(look_up(u, thresholds, table), table[expected])


@pytest.mark.parametrize(
    "thresholds", [[0.1, 0.2], [0.0, 1e-9], [-1e9, 0.25, 1e9], [0.5, math.inf], [1 / 3], list(range(0, 200, 5))]
)
def test_thresholds_on_no_grid_are_counted_too(thresholds):
    u = torch.cat([torch.randn(MANY), torch.tensor([math.inf, -math.inf, *thresholds])])
    assert torch.equal(count_reached(u, torch.tensor(thresholds)), compared(u, torch.tensor(thresholds)))


def test_a_table_keeps_images_as_they_lie():
    index = torch.randint(0, 4, (2, 3, 5, 6)).contiguous(memory_format=torch.channels_last)
    table = torch.rand(4)
    found = take(table, index)
    assert torch.equal(found, table[index])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert take(table, index.contiguous()).is_contiguous()
