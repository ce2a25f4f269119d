import numpy as np
import pytest
from torch import nn

from lq import QuantSpec
from lq.globs import matches
from lq.spec import LAYER_FIELDS, LayerSpec


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 1, "bits must be an integer from 2 to 8, got 1"),
        ("bits", 9, "bits must be an integer from 2 to 8, got 9"),
        ("bits", 4.5, "bits must be an integer from 2 to 8, got 4.5"),
        ("activation_bits", 16, "activation_bits must be an integer from 2 to 8, got 16"),
        ("activation_bits", "all", "activation_bits must be an integer from 2 to 8, got 'all'"),
        ("first_last_bits", 0, "first_last_bits must be an integer from 2 to 8, got 0"),
        ("activation", "relu", "activation must be one of .* got 'relu'"),
        ("levels", 257, "levels must be an integer from 3 to 256, got 257"),
        ("levels", "many", "levels must be an integer from 3 to 256, got 'many'"),
        ("grid", "log", "grid must be one of .* got 'log'"),
        ("granularity", "row", "granularity must be one of .* got 'row'"),
        ("forward", "ste", "forward must be one of .* got 'ste'"),
        ("activation_forward", "ste", "activation_forward must be one of .* got 'ste'"),
        ("scale_init", "mean", "scale_init must be one of .* got 'mean'"),
        ("staircase", "sine", "staircase must be one of .* got 'sine'"),
        ("slope_backward_max", 0, "slope_backward_max must be positive or None, got 0"),
        ("include", "layer1.*", r"include must be a list of globs or None, got 'layer1.\*': write include"),
        ("slope_backward_max", "1", "slope_backward_max must be a number and be positive or None, got '1'"),
        ("accumulator_bits", 16.5, "accumulator_bits must be an integer from 8 to 32, got 16.5"),
        ("gradient_scale", "no", "gradient_scale must be True or False, got 'no'"),
        ("signed_points", 1, "signed_points must be True or False, got 1"),
        ("zero", "yes", "zero must be one of .*None, True, False.* got 'yes'"),
        ("normalize", "no", "normalize must be one of .*None, True, False.* got 'no'"),
        ("candidates", 5, "candidates must be one of .* or a list of magnitudes, got 5"),
        ("activation_candidates", ["a"], "activation_candidates must be one of .* or a list of magnitudes, got .'a'."),
        ("words", "2", "words must be an integer of at least 1, got '2'"),
        ("activation_bits", np.int64(4), "activation_bits must be an integer from 2 to 8, got .*4"),
        ("overrides", [1], r"overrides must hold fields by glob, got \[1\]: such as"),
        ("overrides", {"a": 3}, r"overrides\['a'\] must hold fields by name, got 3: such as"),
        ("overrides", {"a": {"bit": 3}}, r"overrides\['a'\] key must be one of .* got 'bit'"),
        ("overrides", {"a": {"bits": 11}}, "bits must be an integer from 2 to 8, got 11"),
    ],
)
def test_bad_values_name_field_value_and_fix(field, value, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**{field: value})


@pytest.mark.parametrize("quantizer", ["subset", "codebook", "apot", "log2", "dlq", "nulsq"])
def test_points_fill_a_width(quantizer):
    with pytest.raises(ValueError, match=f"levels must be None for quantizer='{quantizer}', got 3: give bits instead"):
        QuantSpec(quantizer=quantizer, levels=3)
    with pytest.raises(ValueError, match=f"levels must be None for quantizer='{quantizer}'"):
        QuantSpec(levels=15, overrides={"a": {"quantizer": quantizer}})


def test_round_trip_through_plain_values():
    spec = QuantSpec(bits=3, include=["a.*", nn.Conv2d], overrides={"a.b": {"bits": 8, "activation": None}})
    assert spec.include == ("a.*", "type:Conv2d")
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ValueError, match="QuantSpec field must be one of .* got 'bit': remove it"):
        QuantSpec.from_dict({"bit": 3})


def test_precedence_is_common_then_ends_then_overrides_in_order():
    spec = QuantSpec(bits=2, overrides={"b*": {"bits": 3}, "blue": {"bits": 5, "grid": "mid_rise"}})
    assert spec.layer("a").bits == 2
    assert spec.layer("a", first_or_last=True).bits == 8
    assert spec.layer("b", first_or_last=True).bits == 3
    assert (spec.layer("blue").bits, spec.layer("blue").grid) == (5, "mid_rise")
    assert QuantSpec(bits=2, first_last_bits=None).layer("a", first_or_last=True).bits == 2


def test_first_and_last_drop_an_explicit_number_of_levels():
    layer = QuantSpec(levels=15).layer("a", first_or_last=True)
    assert (layer.weight_codes.bits, layer.weight_codes.levels) == (8, 255)


def test_an_override_of_bits_drops_an_explicit_number_of_levels():
    spec = QuantSpec(levels=15, overrides={"a": {"bits": 8}, "b": {"bits": 8, "levels": 9}})
    assert spec.layer("a").weight_codes.levels == 255
    assert spec.layer("b").weight_codes.levels == 9


def test_activation_width_follows_levels_or_its_own_bits():
    assert LayerSpec(levels=15, bits=8).activation_codes(signed=False).bits == 4
    assert LayerSpec(bits=2, activation_bits=6).activation_codes(signed=True).bits == 6


def test_globs_on_paths_and_types():
    assert matches("layer?.*.conv1", "layer1.0.conv1")
    assert not matches("Layer*", "layer1")
    assert matches("type:*Same", "stem", ("Conv2dSame", "Conv2d"))
    assert not matches("type:Linear", "stem", ("Conv2dSame", "Conv2d"))


def test_every_layer_field_can_be_overridden():
    assert {"bits", "activation", "levels", "quantizer", "granularity", "staircase"} <= set(LAYER_FIELDS)
    for name in LAYER_FIELDS:
        value = getattr(LayerSpec(), name)
        assert QuantSpec(overrides={"*": {name: value}}).layer("x") == LayerSpec(grid="mid_tread", normalize=False)


@pytest.mark.parametrize("quantizer", ["soft", "apot", "a2q", "a2q_plus", "subset"])
def test_weights_are_normalized_where_the_authors_do_unless_told(quantizer):
    published = quantizer in ("apot", "a2q", "a2q_plus")
    for given, expected in ((None, published), (True, True), (False, False)):
        spec = QuantSpec(quantizer=quantizer, granularity="channel", normalize=given)
        assert spec.layer("a").normalize == spec.normalized == expected
        assert spec.layer("a", first_or_last=True).normalize is False


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({"bits": 2}, "mid_rise"),
        ({"bits": 3}, "mid_rise"),
        ({"bits": 4}, "mid_tread"),
        ({"bits": 8, "levels": 4}, "mid_rise"),
        ({"bits": 2, "levels": 3}, "mid_tread"),
        ({"bits": 3, "levels": 7}, "mid_tread"),
        ({"bits": 2, "grid": "mid_tread"}, "mid_tread"),
        ({"bits": 4, "grid": "mid_rise"}, "mid_rise"),
        ({"bits": 2, "quantizer": "lsq"}, "mid_tread"),
    ],
)
def test_the_soft_staircase_has_no_zero_at_two_and_three_bits_unless_told(settings, grid):
    spec = QuantSpec(**settings, overrides={"wide": {"bits": 8}})
    assert spec.layer("a").grid == LayerSpec(**settings).weight_grid == grid
    assert spec.layer("a").weight_codes.offset == (0.5 if grid == "mid_rise" else 0)
    for wide in (spec.layer("wide"), spec.layer("a", first_or_last=True)):
        assert wide.grid == ("mid_tread" if spec.grid == "auto" else spec.grid)


def test_an_override_is_checked_as_the_layer_it_makes():
    spec = QuantSpec(levels=4, overrides={"head": {"quantizer": "lsq", "bits": 8}})
    assert spec.layer("head").weight_codes.levels == 255


def test_levels_must_fit_the_grid():
    with pytest.raises(ValueError, match=r"levels must be odd for grid='mid_tread'.* got 16: use levels=15"):
        QuantSpec(levels=16, quantizer="lsq")
    with pytest.raises(ValueError, match="levels must be even for grid='mid_rise'.* got 15"):
        QuantSpec(levels=15, grid="mid_rise")
