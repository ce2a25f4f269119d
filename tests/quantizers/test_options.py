"""What each method heeds of a spec: what is declared changes a network in training, what is not changes nothing."""

import warnings

import pytest
import torch
from torch import nn

import lq
from lq.quantizers import REGISTRY, Method, find_method, register_quantizer
from lq.spec import OPTIONS, QuantSpec
from lq.surgery import idle_options
from lq.surgery.plan import make_plan
from tests.helpers.modules import Plain, fit

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
OWN = {"pact": {"levels": 15}, "a2q": {"grid": "full_range"}, "a2q_plus": {"grid": "full_range"}}  # what they have


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


def test_every_option_is_of_some_method():
    assert set(VALUES) == set(OPTIONS) == {option for method in REGISTRY.values() for option in method.options or ()}


@pytest.mark.filterwarnings("ignore:without an effect")
@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_method_heeds_the_fields_that_it_declares_and_no_others(name):
    usual = {"quantizer": name, "bits": {"oaq": 8, "qn": 2}.get(name, 3)}  # sums of few bits overflow nothing
    if name in ("a2q", "a2q_plus"):
        usual["granularity"] = "channel"
    plain, options = trained(**usual), REGISTRY[name].options or ()
    for field, value in (VALUES | OWN.get(name, {})).items():
        beside = BESIDE.get(field, {})
        without = trained(**usual | beside) if beside else plain
        changed = trained(**usual | beside | {field: value})
        if field in options and field != "words":  # which only refuses candidates
            assert not isinstance(changed, str), changed
        refused = field in ("levels", "fold_norms") and field not in options
        assert same(without, changed) != (refused or field in options), (name, field)


def warned_of(**fields):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lq.quantize_model(model, QuantSpec(**fields))
    return [str(warning.message).split(". Leave that out")[0] for warning in caught]


def test_options_without_an_effect_are_reported():
    assert warned_of(quantizer="lsq", forward="soft", power=4) == [
        "without an effect on quantizer=lsq: forward='soft', power=4"
    ]
    assert warned_of(quantizer="apot", first_last_bits=None, overrides={"*": {"grid": "mid_rise"}}) == [
        "without an effect on quantizer=apot: grid='mid_rise'"
    ]


CHANNELS = {"points_per": "channel"}
IDLE_BESIDE = [
    (CHANNELS, "subset: points_per='channel' (needs granularity='channel')"),
    ({"activation_candidates": "apot"}, "subset: activation_candidates='apot' (needs activation_levels='subset')"),
    (
        {"activation_levels": "subset", "activation": None},
        "subset: activation_levels='subset' (needs quantized activations: activation='auto')",
    ),
    (CHANNELS | {"granularity": "channel"}, None),
    (CHANNELS | {"overrides": {"1": {"granularity": "channel"}}}, None),
    ({"activation_candidates": "apot", "activation_levels": "subset"}, None),
]


@pytest.mark.filterwarnings("ignore:without an effect")
@pytest.mark.parametrize(("fields", "told"), IDLE_BESIDE)
def test_options_that_need_another_one_beside_them_are_reported_without_it(fields, told):
    expected = [] if told is None else [f"without an effect on quantizer={told}"]
    assert warned_of(quantizer="subset", first_last_bits=None, **fields) == expected
    if told is not None:  # and they do change nothing
        usual = {"quantizer": "subset", "bits": 3} | fields
        without = {k: v for k, v in usual.items() if k != next(iter(fields))}
        assert same(trained(**usual), trained(**without))


def test_nothing_is_said_where_some_layer_heeds_the_option():
    assert warned_of(quantizer="soft", forward="soft", power=2) == []
    assert warned_of(quantizer="lsq", forward="soft", overrides={"0": {"quantizer": "soft"}}) == []
    assert warned_of(quantizer="apot", grid="mid_rise") == []  # of the first and last block, which have lsq


def test_nothing_is_said_of_methods_that_do_not_say_what_they_heed(monkeypatch):
    monkeypatch.setattr("lq.quantizers.lookup.REGISTRY", REGISTRY.copy())
    own = find_method("lsq")
    register_quantizer("mine", Method(own.weight, own.activation, "one of somebody else's"))
    assert warned_of(quantizer="mine", forward="soft") == []


def test_a_fit_reports_them_once():
    callback = lq.LearnedQuantization(quantizer="lsq", regularizer=None, forward="soft")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Plain(), [callback])
    found = [w for w in caught if "without an effect" in str(w.message)]
    assert [str(w.message).split(". ")[0] for w in found] == ["without an effect on quantizer=lsq: forward='soft'"]


@pytest.mark.parametrize("quantizer", ["soft", "apot"])
def test_nothing_is_said_of_what_an_allocation_says_of_the_ends(quantizer):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    spec = QuantSpec(quantizer=quantizer)
    found = lq.allocate_bits(model, [torch.randn(16, 8)], spec, average_bits=5.5, progress=False).spec
    assert found.overrides["0"]["bits"] == 8
    assert not idle_options(found, make_plan(model, found))
