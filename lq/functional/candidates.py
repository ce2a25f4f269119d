"""Candidate points on a logarithmic scale, from which a subset is chosen.

A word is a short list of powers of two and zero; a candidate is a sum of one entry of each word, so that multiplying by
it takes one shifter per word and an adder.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CANDIDATE_SETS", "candidate_points", "choices", "powers_of_two", "two_word_candidates", "word_candidates"]

ONE_WORD = ((1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 0),)
TWO_WORDS = ((1, 1 / 2, 1 / 8, 0), (1, 1 / 4, 1 / 16, 0))
THREE_WORDS = ((1, 1 / 8, 1 / 64, 0), (1 / 2, 1 / 16, 1 / 128, 0), (1 / 4, 1 / 32, 1 / 256, 0))
CANDIDATE_SETS = ("one_word", "two_words", "three_words", "uniform", "mid_rise", "log2", "apot")


def word_candidates(words: Sequence[Sequence[float]]) -> Tensor:
    """Distinct sums of one entry of each word, halved until none exceeds 1.

    Args:
        words: entries are zero or powers of two.

    Returns:
        Ascending magnitudes, float32, shape ``(m,)``.

    Raises:
        ValueError: for an empty word, or an entry that is neither zero nor a power of two.

    Source: Oh et al., Non-Uniform Step Size Quantization for Accurate Post-Training Quantization, ECCV 2022.

    >>> word_candidates([(1, 0.5, 0), (0.25, 0)])
    tensor([0.0000, 0.1250, 0.2500, 0.3750, 0.5000, 0.6250])
    """
    if not words or not all(len(word) for word in words):
        raise ValueError(f"words must each hold at least one entry, got {words!r}: give powers of two and zero")
    for entry in itertools.chain(*words):
        if entry != 0 and not _is_power_of_two(entry):
            raise ValueError(f"words must hold zero and powers of two, got {entry!r}: round it to a power of two")
    sums = sorted({float(sum(pick)) for pick in itertools.product(*words)})
    halvings = max(0, math.ceil(math.log2(sums[-1]))) if sums[-1] > 1 else 0
    return torch.tensor(sums, dtype=torch.float32) / 2**halvings


def two_word_candidates() -> Tensor:
    """The default set: the 15 distinct halved sums of ``{1, 1/2, 1/8, 0}`` and ``{1, 1/4, 1/16, 0}``.

    Returns:
        Ascending magnitudes, float32, shape ``(15,)``: {0,1,2,3,4,6,8,9,12,16,17,18,20,24,32}/32.

    Source: Oh et al., Non-Uniform Step Size Quantization for Accurate Post-Training Quantization, ECCV 2022.

    >>> (two_word_candidates() * 32).int().tolist()
    [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 17, 18, 20, 24, 32]
    """
    return word_candidates(TWO_WORDS)


def candidate_points(candidates: str | Sequence[float] | Tensor | None, bits: int, *, signed: bool = False) -> Tensor:
    """Candidates by name, or from an explicit list::

        one_word     {1, 1/2, ..., 1/128, 0}                               9 magnitudes
        two_words    see `two_word_candidates` (None is this)              15
        three_words  sums of three words that interleave, down to 1/512    64
        uniform      {0, 1, ..., n-1} / n                                  n = 2**(b-1): nothing is left to choose
        mid_rise     {1/2, 3/2, ..., n - 1/2} / n                          n
        log2         {0, 2**(2-n), ..., 1/2, 1}                            n
        apot         additive powers of two for b-1 bits of magnitude      n

    Args:
        candidates: a name, or distinct magnitudes, not negative.
        bits: width of a code; the last four sets depend on it.
        signed: whether 2**b signed points will be chosen: "uniform" then gets one magnitude more.

    Returns:
        Ascending magnitudes, float64, shape ``(m,)``.

    Raises:
        ValueError: for an unknown name, duplicates, negative or infinite magnitudes.

    >>> candidate_points("uniform", 3), candidate_points([0.5, 0.25], 2)
    (tensor([0.0000, 0.2500, 0.5000, 0.7500], dtype=torch.float64), tensor([0.2500, 0.5000], dtype=torch.float64))
    """
    if candidates is None:
        candidates = "two_words"
    if isinstance(candidates, str):
        return _named(candidates, bits, signed)
    points = torch.as_tensor(candidates, dtype=torch.float64).flatten().cpu()
    if not points.numel() or not bool(torch.isfinite(points).all()) or bool((points < 0).any()):
        raise ValueError(
            f"candidates must be finite magnitudes, none negative, got {points.tolist()}: drop the signs, they are "
            "added by themselves"
        )
    points = points.sort().values
    if points.unique().numel() != points.numel():
        raise ValueError(f"candidates must be distinct, got {points.tolist()}: remove the duplicates")
    return points


def _named(name: str, bits: int, signed: bool) -> Tensor:
    count = 2 ** (bits - 1)
    words = {"one_word": ONE_WORD, "two_words": TWO_WORDS, "three_words": THREE_WORDS}
    if name in words:
        return word_candidates(words[name]).double()
    if name == "uniform":
        return torch.arange(count + signed, dtype=torch.float64) / count
    if name == "mid_rise":
        return (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if name == "log2":
        return torch.tensor([0.0, *(2.0**-e for e in range(count - 2, -1, -1))], dtype=torch.float64)
    if name == "apot":
        return word_candidates(_apot_words(bits - 1)).double()
    raise ValueError(f"candidates must be one of {CANDIDATE_SETS} or a list of magnitudes, got {name!r}: choose one")


def _apot_words(bits: int) -> list[tuple[float, ...]]:
    """Additive powers of two for ``bits`` bits: words of two bits whose exponents interleave, and one of an odd bit.

    Source: Li et al., Additive Powers-of-Two Quantization, ICLR 2020, equation 5; odd widths as in their experiments.
    """
    if bits == 1:
        return [(0, 1)]
    pairs, odd = divmod(bits, 2)
    last = 2 * pairs + odd  # exponents before the last entry of the first word
    words: list[tuple[float, ...]] = [(0, 2.0**-k, 2.0 ** -(pairs + k), 2.0 ** -(last + k)) for k in range(pairs)]
    return [*words, (0, 2.0 ** (1 - last))] if odd else words


def powers_of_two(value: float) -> tuple[int, ...]:
    """Exponents of the fewest powers of two that add up to a magnitude.

    Args:
        value: finite, not negative.

    Returns:
        Exponents, largest first; empty for zero.

    >>> powers_of_two(0.28125)
    (-2, -5)
    """
    mantissa, denominator = float(value).as_integer_ratio()
    shift = denominator.bit_length() - 1
    return tuple(bit - shift for bit in range(mantissa.bit_length() - 1, -1, -1) if mantissa >> bit & 1)


def choices(
    candidates: str | Sequence[float] | Tensor | None,
    bits: int,
    *,
    signed: bool = False,
    zero: bool | None = None,
    words: int | None = None,
) -> Tensor:
    """All points that a subset may be chosen from, checked against the number that will be.

    Args:
        candidates: see `candidate_points`.
        bits: width of a code: 2^(b-1) magnitudes will be chosen, or 2^b points where ``signed``.
        signed: whether the negatives of the candidates are points of their own.
        zero: True requires a zero among them, False leaves it out.
        words: see that each is a sum of at most so many powers of two; None does not.

    Returns:
        Ascending points, float64.

    Raises:
        ValueError: for candidates that do not fit, or fewer of them than points.

    >>> choices([0.0, 0.5, 1.0], 2, signed=True, zero=False)
    tensor([-1.0000, -0.5000,  0.5000,  1.0000], dtype=torch.float64)
    """
    points = candidate_points(candidates, bits, signed=signed)
    if words is not None:
        check_words(points, words)
    if zero is True and not bool((points == 0).any()):
        raise ValueError(f"candidates must hold 0 where zero=True, got {points.tolist()}: add 0, or leave zero=None")
    if zero is False:
        points = points[points > 0]
    if signed:
        points = torch.cat([-points.flip(0), points]).unique()
    count = 2**bits if signed else 2 ** (bits - 1)
    if points.numel() < count:
        raise ValueError(
            f"candidates must be at least as many as the points chosen, got {points.numel()} for {count} points of "
            f"{bits} bits{' with signs' if signed else ''}: lower bits, or choose a larger set: 'three_words' "
            "has 64, 'uniform' as many as any width has"
        )
    return points


def check_words(points: Tensor, words: int) -> None:
    """See that every candidate is a sum of at most ``words`` powers of two.

    Args:
        points: magnitudes.
        words: shifters there are.

    Raises:
        ValueError: naming the candidates that need more.
    """
    over = [p for p in points.tolist() if len(powers_of_two(p)) > words]
    if over:
        needs = ", ".join(f"{p:g} ({len(powers_of_two(p))})" for p in over[:8])
        raise ValueError(
            f"candidates must be sums of at most {words} powers of two, got {needs}: round them, or allow more with "
            "words"
        )


def _is_power_of_two(value: float) -> bool:
    return value > 0 and math.frexp(value)[0] == 0.5
