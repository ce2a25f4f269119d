"""nuLSQ, APoT and weight normalization against what their authors wrote down."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lq.functional.layout import ScaleLayout
from lq.functional.learned_steps import learned_step_points, learned_step_quantize
from lq.functional.levels import CodeRange
from lq.functional.points import midpoints, nearest_point
from lq.functional.standardize import standardize
from lq.quantizers import APoTQuantizer, LearnedStepsQuantizer
from lq.quantizers.learned_steps import InputLearnedStepsQuantizer


def published(x, steps, below):
    """Value, dy/dx and dy/ds by a loop over intervals, from zero outwards on each side."""
    sides = {1: steps[below:], -1: steps[:below][::-1]}
    y, inside, shares = 0.0, 1.0, np.zeros(len(steps))
    side = 1 if x >= 0 else -1
    own = sides[side]
    index = (lambda k: below + k) if side > 0 else (lambda k: below - 1 - k)
    reached = 0.0
    for k, step in enumerate(own):
        if abs(x) <= reached + step:
            f = (abs(x) - reached) / step
            y, shares[index(k)] = side * (reached + step * round(f)), side * (round(f) - f)
            return y, inside, shares
        reached += step
    shares[[index(k) for k in range(len(own))]] = side
    return side * reached, 0.0 if len(own) or x != 0 else 1.0, shares


@pytest.mark.parametrize(("count", "below"), [(3, 0), (3, 2), (7, 4), (15, 8), (15, 0)])
def test_steps_learn_by_the_published_gradients(count, below):
    generator = torch.Generator().manual_seed(count + below)
    steps = (torch.rand(count, dtype=torch.float64, generator=generator) + 0.1).requires_grad_()
    x = (torch.randn(300, dtype=torch.float64, generator=generator) * count / 3).requires_grad_()
    upstream = torch.randn(300, dtype=torch.float64, generator=generator)
    y = learned_step_quantize(x, steps, below)
    y.backward(upstream)
    found = [published(v, steps.tolist(), below) for v in x.tolist()]
    np.testing.assert_allclose(y.detach(), [f[0] for f in found], atol=1e-12)
    np.testing.assert_allclose(x.grad, upstream.numpy() * [f[1] for f in found], atol=1e-12)
    expected = (upstream.numpy()[:, None] * np.stack([f[2] for f in found])).sum(0)
    np.testing.assert_allclose(steps.grad, expected, atol=1e-10)


@given(st.integers(2, 4), st.booleans(), st.integers(0, 99))
def test_training_sees_the_very_levels_that_are_nearest_and_ends_pass_gradients(bits, signed, seed):
    generator = torch.Generator().manual_seed(seed)
    steps, below = torch.rand(2**bits - 1, generator=generator) + 0.1, 2 ** (bits - 1) * signed
    levels = learned_step_points(steps, below)
    x = torch.cat([torch.randn(200, generator=generator) * 2, levels, midpoints(levels)]).requires_grad_()
    y = learned_step_quantize(x, steps, below)
    assert torch.equal(y, levels[nearest_point(x.detach(), levels)])
    y.sum().backward()
    assert torch.equal(x.grad, ((x >= levels[0]) & (x <= levels[-1])).float())


@pytest.mark.parametrize("bits", [3, 6, 8])  # more than 32 thresholds are searched, not compared
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
def test_images_learn_the_same_however_they_lie(bits, grad_format):
    generator = torch.Generator().manual_seed(bits)
    images, upstream = (torch.randn(2, 3, 5, 6, generator=generator) for _ in range(2))
    gradients = []
    for x, grad in (
        (images, upstream),
        (images.contiguous(memory_format=torch.channels_last), upstream.contiguous(memory_format=grad_format)),
    ):
        steps = torch.full((2**bits - 1,), 3 / 2**bits).requires_grad_()
        y = learned_step_quantize(x, steps, 2 ** (bits - 1))
        assert y.stride() == x.stride()
        y.backward(grad)
        gradients.append(steps.grad)
    torch.testing.assert_close(*gradients)


def test_what_is_no_number_stays_none():
    y = learned_step_quantize(torch.tensor([torch.nan, 1.0, torch.inf]), torch.ones(3), 0)
    assert y.isnan().tolist() == [True, False, False]


def test_steps_that_have_crossed_zero_learn_by_their_magnitude():
    x, gradients = torch.randn(500), []
    for sign in (1.0, -1.0):
        steps = (torch.tensor([0.5, 0.25, 0.5]) * sign).requires_grad_()
        learned_step_quantize(x, steps, 2).square().sum().backward()
        gradients.append(steps.grad * sign)
    assert torch.equal(*gradients)


@given(st.integers(2, 4), st.integers(0, 99))
def test_levels_ascend_whatever_the_steps_have_become(bits, seed):
    steps = torch.randn(2**bits - 1, generator=torch.Generator().manual_seed(seed))
    levels = learned_step_points(steps, 2 ** (bits - 1))
    assert bool((levels.diff() > 0).all())
    assert levels[2 ** (bits - 1)] == 0


def test_steps_start_as_the_best_even_ones_and_may_part():
    weight = torch.randn(2000)
    quantizer = LearnedStepsQuantizer(3, gradient_scale=False)
    quantizer.calibrate_(weight)
    assert quantizer.steps.unique().numel() == 1
    assert 0.5 < float(quantizer.steps[0].detach()) < 0.7  # 0.586 is the best step for 7 levels of a normal density
    before = float((quantizer.hard(weight) - weight).square().sum())
    optimizer = torch.optim.SGD([quantizer.steps], lr=1e-5)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer.train()(weight) - weight).square().sum().backward()
        optimizer.step()
    assert quantizer.steps.unique().numel() > 1
    assert float((quantizer.hard(weight) - weight).square().sum()) < 0.97 * before


def test_the_sign_of_an_input_decides_which_steps_lie_below_zero():
    quantizer = InputLearnedStepsQuantizer(CodeRange(0, 7, 0.0))
    quantizer.calibrate_(torch.rand(500))
    assert float(quantizer.level_values().min()) == 0
    quantizer.codes = CodeRange(-3, 3, 0.0)
    quantizer.calibrate_(torch.randn(500))
    assert int((quantizer.level_values() < 0).sum()) == 4


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_apot_learns_its_threshold_as_published_and_never_stops_weights(bits):
    quantizer = APoTQuantizer(bits, gradient_scale=False)
    weight = (torch.randn(400, dtype=torch.float64) * 2).requires_grad_()
    quantizer.double().set_points_(_apot_points(bits), torch.tensor([1.5]))
    upstream = torch.randn(400, dtype=torch.float64)
    y = quantizer.train()(weight)
    y.backward(upstream)
    t = weight.detach().numpy() / 1.5
    points = _apot_points(bits).double().numpy()
    near = np.sign(t) * points[np.abs(np.minimum(np.abs(t), 1)[:, None] - points).argmin(1)]
    np.testing.assert_allclose(y.detach(), 1.5 * near, atol=1e-9)
    torch.testing.assert_close(weight.grad, upstream)
    per_weight = np.where(np.abs(t) > 1, np.sign(t), near - t)
    np.testing.assert_allclose(quantizer.scale.grad, [(upstream.numpy() * per_weight).sum()], rtol=1e-6)


def _apot_points(bits):
    """Written out, over the largest: ternary; one word and a half; two words of two bits and one of one."""
    sums = {
        2: [0, 1],
        3: [0, 1 / 4, 1 / 2, 1],
        4: [a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2)],
    }[bits]
    return torch.tensor(sorted(sums)) / max(sums)


@given(st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_normalized_weights_forget_mean_and_size(factor, shift):
    weight = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = torch.tensor([0.3], dtype=torch.float64)
    out = standardize(weight * factor + shift, spread)
    np.testing.assert_allclose(out.mean(), 0, atol=1e-9)
    np.testing.assert_allclose(out.std(correction=0), 0.3, rtol=1e-9)
    torch.testing.assert_close(out, standardize(weight, spread), rtol=1e-6, atol=1e-9)


def test_normalization_of_a_constant_weight_is_zero_and_its_gradient_is_right():
    assert not standardize(torch.full((4,), 3.0), torch.ones(1)).any()
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: standardize(w, torch.tensor([0.7], dtype=torch.float64)), (weight,))


def test_a_constant_weight_of_half_precision_is_zero():
    for dtype in (torch.float16, torch.bfloat16):
        assert not standardize(torch.full((4,), 0.5, dtype=dtype), torch.ones(1)).any()


def test_steps_that_have_moved_since_are_seen_everywhere():
    weight = torch.randn(200)
    quantizer = LearnedStepsQuantizer(3)
    quantizer.calibrate_(weight)
    with torch.no_grad():
        quantizer.steps.mul_(torch.linspace(0.5, 2, 7))  # as an optimizer does, and nothing runs afterwards
    expected = learned_step_points(quantizer.steps.detach(), quantizer.below)
    torch.testing.assert_close(quantizer.state_dict()["points"], expected)
    quantizer.points.zero_()
    torch.testing.assert_close(quantizer.level_values(), expected)
    quantizer.points.zero_()
    assert torch.equal(quantizer.decode(quantizer.encode(weight)), quantizer.hard(weight))


def test_steps_shared_by_channels_are_damped_by_all_their_weights():
    weight, gradients = torch.randn(16, 30), []
    for layout in (ScaleLayout(), ScaleLayout.per_channel(weight.shape)):
        quantizer = LearnedStepsQuantizer(3, layout=layout, count=weight.numel() // layout.scales)
        quantizer.set_points_(quantizer.points, torch.ones(layout.scales))
        quantizer.train()(weight).sum().backward()
        gradients.append(quantizer.steps.grad)
    torch.testing.assert_close(*gradients)


def test_steps_learn_in_evaluation_mode_too():
    quantizer = LearnedStepsQuantizer(3).eval()
    quantizer(torch.randn(50)).sum().backward()
    assert quantizer.steps.grad is not None
