"""The search against enumeration of every subset, written independently in NumPy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lq
from lq.functional import candidate_points, scale_grid
from lq.functional import scale_search as module
from lq.functional.moments import cut_moments, sort_rows, sorted_moments
from lq.functional.scale_search import best_step, candidate_problem, search_rows, shared_subset
from lq.functional.subset import best_subset, bin_moments, point_problem


def loss_of(x, h, points, power):
    return float((h * np.abs(x[:, None] - points[None]).min(1) ** power).sum())


def enumerate_all(x, h, candidates, count, scale, power, zero=None):
    """Least loss over all subsets at one scale."""
    subsets = itertools.combinations(candidates, count)
    kept = (s for s in subsets if zero is not True or 0.0 in s)
    return min(loss_of(x, h, np.array(s) * scale, power) for s in kept)


weights = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]) | st.floats(0, 4, width=32), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    x=weights,
    power=st.sampled_from([2, 4]),
    count=st.integers(1, 5),
    scale=st.floats(0.05, 8),
    weighted=st.booleans(),
    zero=st.sampled_from([None, True, False]),
    seed=st.integers(0, 99),
)
@example(x=[0.0] * 5, power=2, count=2, scale=1.0, weighted=False, zero=None, seed=0)
@example(x=[2.0] * 5, power=4, count=3, scale=0.1, weighted=True, zero=True, seed=0)
def test_the_subset_is_the_best_of_all_at_any_scale(x, power, count, scale, weighted, zero, seed):
    draw = np.random.default_rng(seed)
    candidates = np.sort(draw.choice(np.arange(0, 33), size=7, replace=False) / 32.0)
    candidates[0] = 0.0
    if zero is False:
        candidates = candidates[candidates > 0]
    h = draw.choice([0.0, 1.0, 5.0], size=len(x)) if weighted else np.ones(len(x))
    values = np.array(x, dtype=np.float64)
    problem = point_problem(torch.from_numpy(candidates), power, count, zero)
    rows = sorted_moments(torch.from_numpy(values)[None], torch.from_numpy(h)[None] if weighted else None, power)
    scales = torch.tensor([[scale]], dtype=torch.float64)
    loss, chosen = best_subset(problem, bin_moments(rows, problem, scales), count)
    expected = enumerate_all(values, h, candidates, count, scale, power, zero)
    floor = 1e-12 * float(h.max() * ((values + scale) ** power).sum())  # weights without importance round, too
    assert float(loss) * scale**power == pytest.approx(expected, rel=1e-9, abs=floor + 1e-300)
    picked = candidates[chosen[0, 0].numpy()] * scale
    assert loss_of(values, h, picked, power) == pytest.approx(expected, rel=1e-9, abs=floor + 1e-300)
    assert zero is not True or 0.0 in picked


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4]), st.sampled_from([1, 2]), st.booleans())
def test_signed_points_too(seed, power, bits, weighted):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=20)
    h = draw.random(20) if weighted else np.ones(20)
    candidates = np.array([-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    problem = point_problem(torch.from_numpy(candidates), power, 2**bits)
    rows = sorted_moments(torch.from_numpy(x)[None], torch.from_numpy(h)[None], power)
    loss, _ = best_subset(problem, bin_moments(rows, problem, torch.tensor([[1.7]], dtype=torch.float64)), 2**bits)
    assert float(loss) * 1.7**power == pytest.approx(enumerate_all(x, h, candidates, 2**bits, 1.7, power), rel=1e-9)


def published_search(x, candidates, count, power, passes=1000):
    """As the published code does: every subset, nearest assignment and scale in turn, from one start; p = 2 only."""
    best = np.inf
    for subset in itertools.combinations(candidates, count):
        points, scale = np.array(subset) / max(subset), x.max()
        for _ in range(passes):
            q = points[np.abs(x[:, None] / scale - points[None]).argmin(1)]
            if not (q * q).sum():
                break
            new = (q * x).sum() / (q * q).sum()
            if abs(new - scale) < 1e-12:
                break
            scale = new
        best = min(best, loss_of(x, np.ones_like(x), points * scale, power))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_the_published_enumeration(seed):
    draw = np.random.default_rng(seed)
    x = draw.laplace(size=400) if seed % 2 else draw.normal(size=400)
    result = lq.search_subset(torch.from_numpy(x), bits=3)
    assert float(result.loss) <= published_search(np.abs(x), candidate_points(None, 3).numpy(), 4, 2) * (1 + 1e-9)


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "channels"])
def test_a_finer_and_wider_grid_gains_nothing(power, bits, kind, monkeypatch):
    torch.manual_seed(3)
    x = {
        "normal": torch.randn(1, 4000),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((1, 4000)),
        "uniform": torch.rand(1, 4000),
        "channels": torch.randn(6, 300),
    }[kind]
    problem = candidate_problem(None, bits, power=power)
    *_, usual = search_rows(x.abs(), None, problem, 2 ** (bits - 1))
    monkeypatch.setattr(module.scale_grid, "__defaults__", (1600, 0.005, 8.0))
    monkeypatch.setattr(module, "_STARTS", 40)
    *_, best = search_rows(x.abs(), None, problem, 2 ** (bits - 1))
    assert float(usual.sum() / best.sum()) < 1.001


@pytest.mark.parametrize("power", [2, 4])
def test_scale_is_a_minimum(power):
    torch.manual_seed(0)
    x = torch.randn(5000).double()
    result = lq.search_subset(x, bits=3, power=power)
    for factor in (0.999, 1.001):
        points = (result.points * result.scale * factor).numpy()
        assert loss_of(x.abs().numpy(), np.ones(5000), points, power) > float(result.loss)


def test_result_agrees_with_itself():
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 3)
    h = torch.rand(8, 1, 1, 1)
    result = lq.search_subset(weight, bits=3, importance=h, channel_axis=0, power=4)
    assert result.points.shape == (8, 4)
    assert result.scale.shape == result.loss.shape == (8,)
    assert result.codes.shape == weight.shape
    assert result.codes.dtype == torch.uint8
    assert int(result.codes.max()) < 8
    loss = (h * (weight - result.dequantize()).abs() ** 4).sum((1, 2, 3))
    torch.testing.assert_close(loss.double(), result.loss, rtol=1e-4, atol=0)
    assert torch.equal((result.codes & 4) > 0, weight < 0)  # the sign is in the top bit
    alone = lq.search_subset(weight[3], bits=3, power=4)
    torch.testing.assert_close(alone.loss * h[3].item(), result.loss[3], rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_invariance_to_order_sign_and_size(seed):
    torch.manual_seed(seed)
    x = torch.randn(200).double()
    base = lq.search_subset(x, bits=3)
    for other, factor in ((x[torch.randperm(200)], 1.0), (-x, 1.0), (x * 8, 64.0)):
        result = lq.search_subset(other, bits=3)
        assert float(result.loss) == pytest.approx(float(base.loss) * factor, rel=1e-9)


def test_data_that_lie_on_candidates_lose_nothing():
    x = lq.two_word_candidates()[[1, 4, 9, 14]].repeat(3) * 0.7 * torch.tensor([1.0, -1.0]).repeat(6)
    result = lq.search_subset(x, bits=3)
    assert float(result.loss) < 1e-12
    torch.testing.assert_close(result.dequantize(), x)


def test_zero_channels_zero_weights_and_signs():
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 0.5]])
    result = lq.search_subset(weight, bits=2, channel_axis=0, zero=False)
    assert result.scale[0] == 0
    assert result.loss[0] == 0
    assert result.zero_channels.tolist() == [0]
    assert torch.equal(result.dequantize()[0], weight[0])
    assert float(result.dequantize()[1, 0]) > 0  # sign(0) = +1: the smallest positive point
    with_zero = lq.search_subset(torch.tensor([0.0, -0.001, 1.0, 0.5]), bits=3, zero=True)
    assert with_zero.points[0] == 0
    assert int(with_zero.codes[1]) == 0  # one code for zero, whatever the sign


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (2, 3, 1, 1)])
def test_any_dtype_and_shape(dtype, shape):
    torch.manual_seed(0)
    weight = (torch.rand(shape) + 0.1).to(dtype)
    for axis in (None, *range(-1, len(shape))):
        result = lq.search_subset(weight, bits=2, channel_axis=axis)
        assert result.dequantize().shape == weight.shape
        assert bool(torch.isfinite(result.loss).all())


def test_given_scales_are_the_only_ones():
    x = torch.randn(300)
    result = lq.search_subset(x, bits=3, scales=torch.tensor([0.9, 2.0]))
    assert float(result.scale) in (pytest.approx(0.9), pytest.approx(2.0))
    assert float(lq.search_subset(x, bits=3).loss) <= float(result.loss)
    assert scale_grid(5)[-1] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"bits": 5},
            "candidates must be at least as many as the points chosen, got 15 for 16 points .* 'uniform' as many as",
        ),
        ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
        ({"power": 3}, "power must be 2 or 4, got 3"),
        ({"importance": torch.tensor(-1.0)}, "importance must be finite and not negative"),
        ({"importance": torch.ones(3, 7)}, r"importance must broadcast to the weight's shape \(4, 5\), got \(3, 7\)"),
        ({"channel_axis": 2}, r"channel_axis must be an axis of the weight, got 2"),
        ({"scales": torch.tensor([-1.0])}, "scales must be positive"),
        ({"weight": torch.tensor([1.0, float("nan")])}, "weight must be finite"),
        ({"weight": torch.tensor([1.0, float("inf")])}, "weight must be finite"),
        ({"weight": torch.zeros(4)}, "weight must not be all zero"),
        ({"weight": torch.ones(4, dtype=torch.int32)}, "weight must hold floating point"),
        ({"candidates": [0.5, 0.5, 1.0]}, "distinct"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        lq.search_subset(**{"weight": torch.randn(4, 5), **arguments})


def test_too_many_irregular_candidates_are_refused():
    with pytest.raises(ValueError, match="candidates must be few enough"):
        lq.search_subset(torch.randn(10), bits=4, candidates=torch.rand(300, dtype=torch.float64))


def test_channels_without_importance_count_alike():
    weight = torch.randn(2, 40)
    h = torch.stack([torch.zeros(40), torch.ones(40)])
    result = lq.search_subset(weight, bits=3, importance=h, channel_axis=0)
    assert float(result.loss[0]) == pytest.approx(float(lq.search_subset(weight[0], bits=3).loss), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 40])
def test_sorting_by_bits_is_sorting(dtype, rows):
    x = torch.randn(rows, 100, dtype=dtype)
    x[:, :4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40], dtype=dtype)
    values, order = sort_rows(x)
    assert torch.equal(values, x.sort(dim=1).values)
    assert torch.equal(values, x.gather(1, order))


@pytest.mark.parametrize("count", [1, 63, 5000, 40_000])
@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_ranges_are_exact(count, power, weighted):
    torch.manual_seed(count)
    x = torch.randn(2, count)
    h = torch.rand(2, count).double() if weighted else None
    rows = sorted_moments(x, h, power)
    borders = torch.arange(rows.centres.shape[1] + 1) * rows.segment
    cuts = torch.cat([torch.randint(0, count + 1, (2, 3, 6)), borders.expand(2, 3, -1)], dim=-1).sort(-1).values
    sums, segments = cut_moments(rows, cuts)
    order = sort_rows(x)[1]
    values, weight = x.gather(1, order).double(), torch.ones_like(x).double() if h is None else h.gather(1, order)
    for c, a, q in itertools.product(range(2), range(3), range(cuts.shape[-1] - 1)):
        part = slice(int(cuts[c, a, q]), min(int(cuts[c, a, q + 1]), count))
        distance = values[c, part] - rows.centres[c, segments[c, a, q]]
        for k in range(power + 1):
            terms = weight[c, part] * distance**k
            assert float(sums[c, a, q, k]) == pytest.approx(float(terms.sum()), rel=1e-9, abs=1e-9 * count)


def test_sums_do_not_cancel_for_many_weights_in_narrow_bins():
    """Two million weights, 4096 candidates' worth of resolution: the loss of all bins agrees with the direct sum."""
    torch.manual_seed(0)
    x = torch.rand(1, 2_000_000).double()
    points = (torch.arange(128).double() + 0.5) / 128
    problem = point_problem(points, 4, 128)
    rows = sorted_moments(x, None, 4)
    loss, _ = best_subset(problem, bin_moments(rows, problem, torch.ones(1, 1).double()), 128)
    direct = (x - (torch.floor(x * 128) + 0.5) / 128).pow(4).sum()
    assert float(loss) == pytest.approx(float(direct), rel=1e-7)


def test_one_subset_for_all_channels_lies_between_per_tensor_and_per_channel():
    torch.manual_seed(0)
    x = (torch.randn(12, 200) * torch.rand(12, 1).exp()).abs()
    problem = candidate_problem(None, 3)
    _, _, own = search_rows(x, None, problem, 4)
    points, scales, shared = shared_subset(x, None, problem, 4)
    _, _, single = search_rows(x.reshape(1, -1), None, problem, 4)
    assert points.shape == (4,)
    assert scales.shape == (12,)
    assert float(own.sum()) <= float(shared.sum()) <= float(single.sum())


def test_best_step_of_uniform_levels_beats_any_other():
    torch.manual_seed(0)
    x = torch.randn(3, 400)
    codes = lq.functional.code_range(4)
    step = best_step(x, None, codes, 2)
    for factor in torch.linspace(0.2, 3, 200).tolist():
        other = lq.functional.hard_quantize(x, step[:, None].float() * factor, **codes._asdict())
        mine = lq.functional.hard_quantize(x, step[:, None].float(), **codes._asdict())
        assert bool(((x - mine).square().sum(1) <= (x - other).square().sum(1) * (1 + 1e-5)).all())


def test_channels_of_zeros_have_no_say_in_the_shared_points():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(16, 100) * 0.01, torch.zeros(16, 100)]).abs()
    problem = candidate_problem(None, 3)
    points, scales, loss = shared_subset(x, None, problem, 4)
    alone, _, own = shared_subset(x[:16], None, problem, 4)
    assert torch.equal(points, alone)
    assert float(loss.sum()) == pytest.approx(float(own.sum()))
    assert bool((scales[16:] == 0).all())
