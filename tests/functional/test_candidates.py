import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lq
from lq.functional import candidate_points, powers_of_two, word_candidates
from lq.functional.candidates import CANDIDATE_SETS, check_words, choices


def test_the_default_set_is_the_published_one():
    assert (lq.two_word_candidates() * 32).tolist() == [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 18, 20, 24, 32]
    assert [math.comb(lq.two_word_candidates().numel(), k) for k in (2, 4, 8)] == [105, 1365, 6435]


@pytest.mark.parametrize("name", CANDIDATE_SETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_named_sets_are_ascending_distinct_and_at_most_one(name, bits):
    points = candidate_points(name, bits)
    assert bool((points.diff() > 0).all())
    assert points[0] >= 0
    assert points[-1] <= 1
    if name in ("uniform", "mid_rise", "log2", "apot"):
        assert points.numel() == 2 ** (bits - 1)


def test_apot_levels_are_the_authors():
    # 3 bits of magnitude: {0, 1, 1/2, 1/8} + {0, 1/4}; 4 bits: {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}; up to a factor
    three = sorted({a + b for a in (0, 1, 1 / 2, 1 / 8) for b in (0, 1 / 4)})
    four = sorted({a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)})
    for bits, expected in ((4, three), (5, four)):
        points = candidate_points("apot", bits)
        assert (points / points[-1]).tolist() == pytest.approx([e / expected[-1] for e in expected])
    assert candidate_points("log2", 4).tolist() == [0, *(2.0**-e for e in range(6, -1, -1))]


@given(st.integers(0, 2**30), st.integers(-20, 20))
def test_powers_of_two_add_up_and_are_fewest(mantissa, shift):
    value = mantissa * 2.0**shift
    powers = powers_of_two(value)
    assert math.fsum(2.0**e for e in powers) == value
    assert len(powers) == bin(mantissa).count("1")


def test_words_bound_the_shifters():
    check_words(lq.two_word_candidates(), 2)
    check_words(candidate_points("three_words", 4), 3)
    with pytest.raises(ValueError, match=r"at most 1 powers of two, got 0.09375 \(2\)"):
        check_words(lq.two_word_candidates(), 1)
    with pytest.raises(ValueError, match="at most 2 powers of two, got 0.1"):
        lq.QuantSpec(quantizer="subset", bits=2, candidates=[0.1, 0.5], words=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: word_candidates([]), "words must each hold at least one entry"),
        (lambda: word_candidates([(1, 0.3)]), "zero and powers of two, got 0.3"),
        (lambda: candidate_points("fibonacci", 4), "candidates must be one of .* got 'fibonacci': choose one"),
        (lambda: candidate_points([0.5, 0.5], 2), r"distinct, got \[0.5, 0.5\]: remove the duplicates"),
        (lambda: candidate_points([-0.5, 1], 2), "none negative, got"),
        (lambda: candidate_points([float("nan"), 1], 2), "finite magnitudes"),
        (lambda: candidate_points([], 2), "finite magnitudes"),
        (lambda: choices([0.5, 1.0], 3), "got 2 for 4 points of 3 bits: lower bits"),
        (lambda: choices("two_words", 5, signed=True), "got 29 for 32 points of 5 bits with signs"),
        (lambda: choices([0.5, 1.0], 2, zero=True), "must hold 0 where zero=True"),
    ],
)
def test_bad_candidates_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_zero_can_be_forbidden_and_signs_added():
    assert 0 not in choices("two_words", 4, zero=False)
    signed = choices(torch.tensor([0.0, 0.5, 1.0]), 2, signed=True)
    assert signed.tolist() == [-1, -0.5, 0, 0.5, 1]
