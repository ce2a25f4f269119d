import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lq
from lq.functional import allocation
from lq.functional.allocation import choose_within_budget
from lq.functional.distillation import distillation_loss
from lq.network import network_size
from lq.nn import named_quantized_layers


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))
def test_the_choice_is_the_best_of_all(items, options, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.randint(0, 6, (items, options), generator=generator).double()
    sizes = torch.randint(1, 9, (items, options), generator=generator)
    least, most = int(sizes.amin(1).sum()), int(sizes.amax(1).sum())
    for budget in {least, (least + most) // 2, most}:
        chosen = choose_within_budget(losses, sizes, budget)
        rows = torch.arange(items)
        assert int(sizes[rows, chosen].sum()) <= budget
        every = itertools.product(range(options), repeat=items)
        best = min(float(losses[rows, list(c)].sum()) for c in every if int(sizes[rows, list(c)].sum()) <= budget)
        assert float(losses[rows, chosen].sum()) == pytest.approx(best)
    with pytest.raises(ValueError, match=f"budget must be at least {least}, .* got {least - 1}"):
        choose_within_budget(losses, sizes, least - 1)


def test_many_totals_are_thinned_and_stay_within_the_budget(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(30, 4, generator=generator).sort(dim=1, descending=True).values
    sizes = torch.randint(1000, 9000, (30, 4), generator=generator).sort(dim=1).values
    rows, budget = torch.arange(30), 130_000
    exact = float(losses[rows, choose_within_budget(losses, sizes, budget)].sum())
    monkeypatch.setattr(allocation, "_MOST", 500)
    chosen = choose_within_budget(losses, sizes, budget)
    assert int(sizes[rows, chosen].sum()) <= budget
    assert float(losses[rows, chosen].sum()) == pytest.approx(exact, rel=0.02)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    return model.eval(), [torch.randn(16, 3, 8, 8) for _ in range(2)]


@pytest.mark.parametrize("average", [3.2, 3.7, 5.0])
def test_widths_keep_the_budget_and_the_ends(network, average):
    model, batches = network
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = lq.allocate_bits(model, batches, lq.QuantSpec(quantizer="lsq"), average_bits=average, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.bits["0"] == found.bits["9"] == 8
    assert set(found.losses) == {"2", "4", "6"}
    assert average - 1.5 < found.average_bits <= average
    assert f"{found.average_bits:.3f} bits per weight" in str(found)
    lq.quantize_model(model_copy := copy.deepcopy(model), found.spec, example_input=batches[0])
    layers = dict(model_copy.named_modules())
    assert {path: layers[path].weight_quantizer.codes.bits for path in found.bits} == found.bits
    size = network_size(model_copy)
    assert 8 * (size.packed_bytes - 4 * 5) / size.weights == pytest.approx(found.average_bits, abs=0.05)


def test_losses_are_those_of_one_layer_alone(network):
    model, batches = network
    found = lq.allocate_bits(model, batches, average_bits=4, widths=[3, 8], progress=False)
    alone = copy.deepcopy(model)
    lq.quantize_model(alone, lq.QuantSpec(bits=3, first_last_bits=None, include=["4"]))
    lq.calibrate(alone, batches)
    alone.eval()
    with torch.no_grad():
        expected = torch.stack([distillation_loss(alone(x), model(x)) for x in batches]).mean()
    assert found.losses["4"][3] == pytest.approx(float(expected), rel=1e-5)
    assert found.losses["4"][8] < found.losses["4"][3]


def test_given_widths_stay_and_tied_layers_share_one():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    model[3].weight = model[2].weight
    spec = lq.QuantSpec(overrides={"1": {"bits": 5}, "4": {"granularity": "channel"}})
    found = lq.allocate_bits(model, [torch.randn(32, 8)], spec, average_bits=5.5, progress=False)
    assert set(found.losses) == {"2", "4"}
    assert found.bits["1"] == 5
    assert found.spec.layer("2").bits == found.spec.layer("3").bits == found.bits["2"]
    assert found.spec.layer("4").granularity == "channel"
    assert found.spec.layer("4").bits == found.bits["4"]


@pytest.mark.parametrize("name", ["blocks", "layers"])
def test_tied_layers_choose_whatever_their_path_is_called(name):
    torch.manual_seed(0)
    parts = [nn.Linear(8, 8) for _ in range(5)]
    parts[2].weight = parts[1].weight
    model = nn.Sequential()
    model.add_module(name, nn.Sequential(*parts))
    found = lq.allocate_bits(model, [torch.randn(32, 8)], average_bits=6, progress=False)
    assert set(found.losses) == {f"{name}.1", f"{name}.3"}


@pytest.mark.parametrize("sizes", [(3, 5, 7), (8, 8, 8), (11, 13, 2), (9, 4, 6)])
def test_the_least_budget_that_is_named_is_enough(sizes):
    torch.manual_seed(0)
    a, b, c = sizes
    model, batches = nn.Sequential(nn.Linear(a, b), nn.Linear(b, c), nn.Linear(c, a)), [torch.randn(16, a)]
    with pytest.raises(ValueError, match="average_bits must be at least") as refused:
        lq.allocate_bits(model, batches, average_bits=2, progress=False)
    least = float(str(refused.value).split("at least ")[1].split()[0])
    found = lq.allocate_bits(model, batches, average_bits=least, progress=False)
    assert found.bits == {"0": 8, "1": 2, "2": 8}
    assert found.average_bits == pytest.approx(least, abs=1e-3)


def test_bad_input_names_what_is_possible(network):
    model, batches = network
    with pytest.raises(ValueError, match=r"average_bits must be at least 3\.\d+ here, got 1.5: .* 2 bits. Raise it"):
        lq.allocate_bits(model, batches, average_bits=1.5, progress=False)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        lq.allocate_bits(model, [], average_bits=4)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
        lq.allocate_bits(model, batches, average_bits=4, widths=[2, 9])
    with pytest.raises(ValueError, match="no layer is free to choose"):
        lq.allocate_bits(nn.Sequential(nn.Linear(2, 2)), [torch.zeros(1, 2)], average_bits=8, progress=False)
    for budget in (float("nan"), float("inf"), -1, "3"):
        with pytest.raises(ValueError, match=f"average_bits must .*be positive, got {budget!r}"):
            lq.allocate_bits(model, batches, average_bits=budget)
    with pytest.raises(ValueError, match="widths must be a list, got 5"):
        lq.allocate_bits(model, batches, average_bits=4, widths=5)
    with pytest.raises(TypeError, match="spec must be an lq.QuantSpec or None, got 3"):
        lq.allocate_bits(model, batches, 3, average_bits=4)
    with pytest.raises(TypeError, match="model must return logits, got dict: give forward="):
        lq.allocate_bits(model, batches, average_bits=6, forward=lambda m, x: {"logits": m(x)}, progress=False)
    for widths in ([], [4, 4]):
        with pytest.raises(ValueError, match="widths must be one or more different ones, got"):
            lq.allocate_bits(model, batches, average_bits=4, widths=widths)


def test_levels_that_follow_a_batch_norm_do_so_where_a_width_is_measured():
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 8, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(32, 4),
    ]
    model = nn.Sequential(*parts).eval()
    nn.init.uniform_(model[3].weight, 0.05, 3.0)
    images = torch.randn(16, 3, 2, 2)
    folded = lq.QuantSpec(quantizer="minmax", fold_norms=True, activation=None)
    found = lq.allocate_bits(model, [images], folded, average_bits=8, widths=[3], progress=False)
    alone = copy.deepcopy(model)
    spec = lq.QuantSpec(
        quantizer="minmax", fold_norms=True, activation=None, bits=3, include=["2"], first_last_bits=None
    )
    lq.quantize_model(alone, spec, images)
    expected = distillation_loss(alone(images), model(images))
    assert found.losses["2"][3] == pytest.approx(float(expected), rel=1e-4)


def test_batches_may_come_from_a_generator(network):
    model, batches = network
    found = lq.allocate_bits(model, (batch for batch in batches), average_bits=5, progress=False)
    assert found.bits == lq.allocate_bits(model, batches, average_bits=5, progress=False).bits


def test_losses_that_are_no_numbers_choose_nothing():
    with pytest.raises(ValueError, match=r"losses must be finite, those of items \[0\] are not"):
        choose_within_budget(torch.tensor([[float("nan"), 1.0], [5.0, 1.0]]), torch.tensor([[2, 4], [2, 4]]), 8)


def test_levels_follow_the_width_that_is_chosen():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    spec = lq.QuantSpec(bits=2, quantizer="lsq", overrides={"2": {"quantizer": "soft"}})
    found = lq.allocate_bits(model, [torch.randn(32, 8)], spec, average_bits=6, widths=[4], progress=False)
    assert (found.bits["2"], found.spec.layer("2").grid) == (4, "mid_tread")
    named = lq.QuantSpec(bits=2, overrides={"2": {"grid": "mid_rise"}})
    found = lq.allocate_bits(model, [torch.randn(32, 8)], named, average_bits=6, widths=[4], progress=False)
    assert (found.bits["2"], found.spec.layer("2").grid) == (4, "mid_rise")


class HeadFirst(nn.Module):
    """Registers its head before its body."""

    def __init__(self):
        super().__init__()
        self.head, self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu())


@pytest.mark.parametrize("quantizer", ["lsq", "codebook"])
def test_the_spec_means_the_same_whatever_the_order_of_layers(quantizer):
    torch.manual_seed(0)
    spec = lq.QuantSpec(quantizer=quantizer, normalize=True)
    found = lq.allocate_bits(HeadFirst(), [torch.randn(32, 8)], spec, average_bits=5.5, widths=[2, 4], progress=False)
    assert found.bits["head"] == found.bits["a"] == 8
    model = HeadFirst()
    lq.quantize_model(model, found.spec)  # by registration order
    layers = named_quantized_layers(model)
    assert {path: layer.weight_quantizer.codes.bits for path, layer in layers.items()} == found.bits
    assert {p for p, layer in layers.items() if layer.layer_spec.quantizer == quantizer} >= {"b", "c"}
    assert {p for p, layer in layers.items() if layer.layer_spec.normalize} == {"b", "c"}


def test_widths_that_a_method_lacks_are_named(network):
    model, batches = network
    with pytest.raises(ValueError, match="widths must be such that the spec allows, got 6: candidates must be"):
        lq.allocate_bits(model, batches, lq.QuantSpec(quantizer="subset"), average_bits=4, progress=False)


def test_inputs_that_overrides_alone_quantize_are_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [torch.randn(32, 8)]
    losses = []
    for activation, own in ((None, "auto"), ("auto", "auto"), (None, None)):
        spec = lq.QuantSpec(activation=activation, overrides={"2": {"activation": own, "activation_bits": 2}})
        found = lq.allocate_bits(model, batches, spec, average_bits=5)
        losses.append(found.losses["2"])
    assert losses[0] == losses[1]
    assert losses[0][8] > 100 * losses[2][8]


def test_what_is_no_float_network_or_no_list_is_refused():
    model, batches = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"batches must be a list of batches, got a tensor of shape \(3, 4\): write"):
        lq.allocate_bits(model, batches, average_bits=5)
    lq.quantize_model(model, lq.QuantSpec())
    with pytest.raises(ValueError, match=r"model must be float, got 2 quantized layers \(0, ...\): call this before"):
        lq.allocate_bits(model, [batches], average_bits=5)
