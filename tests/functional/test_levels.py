import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lq.functional import bits_for_levels, code_range, level_values


@given(bits=st.integers(2, 8), grid=st.sampled_from(["mid_tread", "mid_rise"]), scale=st.floats(0.01, 100))
def test_levels_are_symmetric_and_equally_spaced(bits, grid, scale):
    codes = code_range(bits, grid=grid)
    levels = level_values(codes, torch.tensor([scale], dtype=torch.float64))
    assert torch.equal(levels, -levels.flip(0))
    assert np.allclose(levels.diff(), scale)
    assert codes.levels == len(levels) == 2**bits - (grid == "mid_tread")
    assert codes.bits == bits
    assert bool((levels == 0).any()) == (grid == "mid_tread")
    assert levels[-1].item() == pytest.approx(codes.largest * scale)


@given(bits=st.integers(2, 8))
def test_the_full_range_has_one_level_more_below_zero(bits):
    codes = code_range(bits, grid="full_range")
    assert codes == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.0)
    assert (codes.bits, codes.largest) == (bits, codes.hi)


@given(bits=st.integers(2, 8))
def test_unsigned_levels_start_at_zero_and_use_every_code(bits):
    codes = code_range(bits, signed=False)
    assert (codes.lo, codes.hi, codes.offset, codes.bits) == (0, 2**bits - 1, 0.0, bits)


def test_explicit_number_of_levels():
    assert code_range(2, levels=15) == code_range(4)
    assert code_range(2, levels=6, grid="mid_rise") == (-3, 2, 0.5)
    assert bits_for_levels(6) == 3


def test_levels_per_channel_have_a_row_each():
    assert level_values(code_range(2), torch.tensor([1.0, 2.0])).tolist() == [[-1, 0, 1], [-2, 0, 2]]


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_bad_bits_name_value_and_range(bits):
    with pytest.raises(ValueError, match=r"bits must be an integer from 2 to 8, got .*choose"):
        code_range(bits)


@pytest.mark.parametrize(
    ("levels", "grid", "message"),
    [
        (16, "mid_tread", "levels must be odd for grid='mid_tread'.*got 16: use levels=15"),
        (15, "mid_rise", "levels must be even for grid='mid_rise'.*got 15: use levels=14"),
        (5, "full_range", "levels must be even for grid='full_range', got 5: use levels=4"),
        (2, "mid_rise", "levels must be an integer from 3 to 256, got 2"),
        (257, "mid_tread", "levels must be an integer from 3 to 256, got 257"),
    ],
)
def test_bad_levels_say_the_fix(levels, grid, message):
    with pytest.raises(ValueError, match=message):
        code_range(4, levels=levels, grid=grid)


def test_bad_grid():
    with pytest.raises(ValueError, match=r"grid must be one of .* got 'midtread'"):
        code_range(4, grid="midtread")
