"""What each method heeds of a spec: what is declared changes a network in training, what is not changes nothing."""

import pytest
import torch
from torch import nn

import lq
from lq.quantizers import REGISTRY, Method, find_method, register_quantizer
from lq.spec import LAYER_FIELDS, QuantSpec

VALUES = {
    "levels": 5,
    "grid": "mid_rise",
    "forward": "soft",
    "activation_forward": "soft",
    "scale_init": "max",
    "staircase": "linear",
    "slope_backward_max": None,
    "gradient_scale": False,
    "scale_gradient": "exact",
    "candidates": "log2",
    "words": 1,
    "power": 4,
    "zero": True,
    "signed_points": True,
    "points_per": "channel",
    "activation_levels": "subset",
    "activation_candidates": "log2",
    "fold_norms": True,
    "accumulator_bits": 9,
}
BESIDE = {  # what a field needs to have an effect
    "grid": {"grid": "mid_tread"},  # auto is the one or the other
    "points_per": {"granularity": "channel"},
    "activation_candidates": {"activation_levels": "subset"},
    "words": {"candidates": "two_words"},
}
COMMON = {"bits", "activation_bits", "activation", "granularity", "quantizer", "normalize"}


def trained(**fields):
    """All there is of a small network after two steps; what was wrong where the fields are refused."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False), nn.Conv2d(8, 4, 3)]
    model = nn.Sequential(convolutions[0], nn.BatchNorm2d(8), nn.ReLU(), *convolutions[1:])
    with torch.no_grad():
        model[1].weight.uniform_(0.2, 3.0)  # folded or not makes a difference
    x = 4 * torch.randn(4, 4, 8, 8)
    try:
        lq.quantize_model(model, QuantSpec(first_last_bits=None, **fields), x)
    except ValueError as error:
        return str(error)
    lq.calibrate(model, [x])
    lq.set_slope(model, 6.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().mean() + 0.1 * lq.scale_regularizer(model)).backward()
        optimizer.step()
    return [*model.state_dict().values(), model(x).detach(), model.eval()(x).detach()]


def same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return len(a) == len(b) and all(p.shape == q.shape and torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_every_field_is_either_common_or_of_some_method():
    assert {*VALUES, *COMMON} == set(LAYER_FIELDS)
    assert {option for method in REGISTRY.values() for option in method.options or ()} == set(VALUES)


@pytest.mark.filterwarnings("ignore:.*changes nothing")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_method_heeds_the_fields_that_it_declares_and_no_others(name):
    usual = {"quantizer": name, "bits": {"oaq": 8, "qn": 2}.get(name, 3)}  # sums of few bits overflow nothing
    if name in ("a2q", "a2q_plus"):
        usual["granularity"] = "channel"
    plain, options = trained(**usual), REGISTRY[name].options or ()
    for field, value in VALUES.items():
        beside = BESIDE.get(field, {})
        without = trained(**usual | beside) if beside else plain
        heeded = not same(without, trained(**usual | beside | {field: value}))
        refused = field in ("levels", "fold_norms") and field not in options
        assert heeded == (refused or field in options), (name, field)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"quantizer": "lsq", "forward": "soft", "power": 4}, "forward='soft', power=4 changes nothing: lsq"),
        ({"quantizer": "apot", "overrides": {"*": {"grid": "mid_rise"}}}, "grid='mid_rise' changes nothing: apot"),
    ],
)
def test_fields_without_an_effect_are_reported(fields, shown):
    with pytest.warns(UserWarning, match="Leave it out") as warned:
        lq.quantize_model(nn.Sequential(nn.Linear(4, 4)), QuantSpec(first_last_bits=None, **fields))
    assert str(warned[0].message).startswith(shown)


@pytest.mark.filterwarnings("error:.*changes nothing")
def test_nothing_is_said_where_some_layer_heeds_the_field_or_the_method_does_not_say(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overrides = {"0": {"quantizer": "soft"}}
    lq.quantize_model(model, QuantSpec(quantizer="lsq", forward="soft", overrides=overrides))
    monkeypatch.setattr("lq.quantizers.lookup.REGISTRY", REGISTRY.copy())
    own = find_method("lsq")
    register_quantizer("mine", Method(own.weight, own.activation, "one of somebody else's"))
    lq.quantize_model(nn.Sequential(nn.Linear(4, 4)), QuantSpec(quantizer="mine", forward="soft"))
