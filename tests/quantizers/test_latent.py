"""Weights are drawn to the levels that ship, and figures tell of those, be they the nearest or not."""

from dataclasses import replace

import pytest
import torch

from lq.functional.layout import ScaleLayout
from lq.quantizers import SigmoidSumQuantizer, build_weight_quantizer
from lq.spec import LayerSpec
from tests.quantizers.test_battery import SPECS

BOUNDED = LayerSpec(quantizer="a2q", bits=3, granularity="channel", activation="unsigned")
ALL = SPECS | {"a2q-bounded": BOUNDED, "a2q-plus-bounded": replace(BOUNDED, quantizer="a2q_plus")}

SOFT = ("soft", "subset", "codebook", "qn", "dsq")  # have a soft staircase, in training or behind it
HARD = [name for name, spec in ALL.items() if spec.quantizer not in SOFT]


@pytest.fixture(params=ALL, ids=list(ALL))
def made(request):
    torch.manual_seed(0)
    spec, weight = ALL[request.param], torch.randn(6, 4, 3, 3)
    layout = ScaleLayout.per_channel(weight.shape) if spec.granularity == "channel" else ScaleLayout()
    quantizer = build_weight_quantizer(spec, layout, weight.numel() // layout.scales)
    quantizer.calibrate_(weight, spec.scale_init)
    return quantizer, weight


def test_a_weight_is_drawn_to_its_own_level_and_no_further_than_the_ends(made):
    """What `hold` says, which is the level itself, or with qn the middle between the thresholds around the weight."""
    quantizer, weight = made
    got = torch.autograd.grad(quantizer.regularizer(weight.requires_grad_(), kind="nearest"), weight)[0]
    weight = weight.detach()
    target, low, high = (quantizer.hold(quantizer.encode(w)) for w in (weight, weight * 0 - 1e6, weight * 0 + 1e6))
    inside = (weight > low) & (weight < high)
    torch.testing.assert_close(got[inside], (weight - target)[inside], atol=1e-5, rtol=1e-4)
    assert not bool(got[~inside].any())
    assert isinstance(quantizer, SigmoidSumQuantizer) or torch.equal(target, quantizer.hard(weight))


def test_the_loss_is_that_of_the_levels_that_ship(made):
    quantizer, weight = made
    found, q = quantizer.statistics(weight), quantizer.hard(weight)
    torch.testing.assert_close(found.loss, (weight - q).double().square().sum(), rtol=1e-5, atol=0)
    assert int(found.zero) == int((q == 0).sum())
    assert 0 <= float(found.distance) <= weight.numel()


@pytest.mark.parametrize("made", HARD, indirect=True)
def test_what_is_quantized_already_is_drawn_nowhere_and_loses_nothing(made):
    quantizer, weight = made
    assert not quantizer.softens
    seen = quantizer.statistics(weight, soft=True)
    assert float(quantizer.regularizer(weight, kind="nearest", on="quantized").detach()) == pytest.approx(0, abs=1e-6)
    assert float(seen.loss) == pytest.approx(0, abs=1e-6)
    assert float(seen.alignment) == pytest.approx(1, abs=1e-4)
