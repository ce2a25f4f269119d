import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import lq
from lq.functional.fixed_point import multiplier, requantize, rounding_shift, wide_exponent, wrap
from lq.functional.shift_add import integer_points, make_decoder, shift_add_conv


def double(value):
    return torch.tensor([float(value)], dtype=torch.float64)


@given(
    st.floats(-100, 100).filter(lambda v: abs(v) > 1e-6),
    st.floats(-1e4, 1e4),
    st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=20),
)
def test_requantization_is_the_rounded_affine_map(factor, added, values):
    by = multiplier(double(factor), double(added), double(2**20))
    found = requantize(torch.tensor(values), by).tolist()
    for value, got in zip(values, found, strict=True):
        exact = Fraction(value) * Fraction(factor) + Fraction(added)
        assert abs(Fraction(got) - exact) <= Fraction(1, 2) + abs(exact) / 2**29 + Fraction(1, 10**6)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20), st.integers(-10, 30))
def test_rounding_shift_rounds_half_up(values, shift):
    expected = [math.floor(Fraction(v) / Fraction(2) ** shift + Fraction(1, 2)) for v in values]
    assert rounding_shift(torch.tensor(values), shift).tolist() == expected


def test_multipliers_of_powers_of_two_are_shifts():
    by = multiplier(double(0.3), double(0), double(1000), shift_only=True)
    m = int(by.m)
    assert m & (m - 1) == 0
    assert m / 2 ** int(by.n) == 0.25
    assert requantize(torch.tensor([100]), multiplier(double(0), double(3), double(100))).tolist() == [3]


@given(st.floats(1e-5, 1e9))
def test_the_wide_exponent_is_finest_without_overflow(bound):
    f = wide_exponent(bound)
    assert bound * 2.0**f <= 2**30
    assert f == 40 or bound * 2.0 ** (f + 1) > 2**30 * 0.99


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.integers(2, 32))
def test_wrapping_is_twos_complement(values, bits):
    expected = [(v + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for v in values]
    assert wrap(torch.tensor(values), bits).tolist() == expected


def by_hand(x, weight_codes, decoder, stride, dilation, groups):
    """One product after the other: decoder, first and second shifter, accumulator."""
    n, _, height, width = x.shape
    outputs, depth, rows, columns = weight_codes.shape
    high = (height - dilation[0] * (rows - 1) - 1) // stride[0] + 1
    wide = (width - dilation[1] * (columns - 1) - 1) // stride[1] + 1
    acc = np.zeros((n, outputs, high, wide), dtype=np.int64)
    for o in range(outputs):
        base = o // (outputs // groups) * depth
        for c, ky, kx in np.ndindex(depth, rows, columns):
            code = int(weight_codes[o, c, ky, kx])
            sign, shifts = int(decoder.sign[code]), decoder.shifts[code].tolist()
            for i, y, z in np.ndindex(n, high, wide):
                value = int(x[i, base + c, y * stride[0] + ky * dilation[0], z * stride[1] + kx * dilation[1]])
                shifted = sum(value << places for places in shifts if places >= 0)
                acc[i, o, y, z] += shifted if sign > 0 else -shifted if sign < 0 else 0
    return acc


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((2, 2), (2, 2))])
def test_shifters_and_accumulators_do_what_hardware_would(groups, stride, dilation):
    integers, k = integer_points(torch.cat([-lq.two_word_candidates()[1:8], lq.two_word_candidates()]))
    assert k == 5
    decoder = make_decoder(integers)
    assert decoder.words == 2
    codes = torch.randint(0, len(integers), (4, 4 // groups, 3, 3))
    x = torch.randint(-8, 8, (2, 4, 7, 8))
    found = shift_add_conv(x, codes, decoder, stride=stride, dilation=dilation, groups=groups)
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), by_hand(x.numpy(), codes.numpy(), decoder, stride, dilation, groups))
    weight = integers[codes].double()
    exact = F.conv2d(x.double(), weight, None, stride, 0, dilation, groups)
    assert torch.equal(found.double(), exact)


def test_a_layer_of_zeros_and_points_too_far_apart():
    x, decoder = torch.ones(2, 1, 3, 3), make_decoder(torch.tensor([0]))
    assert shift_add_conv(x, torch.zeros(2, 1, 2, 2), decoder).shape == (2, 2, 2, 2)
    for points in ([2.0**-30, 1.0], [0.1, 1.0]):
        with pytest.raises(ValueError, match="few powers of two within 24 bits .* choose candidates that are, 0.125"):
            integer_points(torch.tensor(points))
