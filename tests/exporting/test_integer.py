import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.exporting import check_accumulators, integer_cost, repair_accumulators
from lq.functional.packing import packed_bytes
from lq.models import create_model
from lq.nn import named_quantized_layers
from tests.helpers.integers import check_accumulators_are_exact
from tests.helpers.modules import SmallResidual, small_cnn
from tests.helpers.quantized import quantized

SHAPE = (3, 14, 14)
SPECS = {
    "4 bits": {"bits": 4},
    "2 bits mid-rise per channel": {"bits": 2, "grid": "mid_rise", "granularity": "channel"},
    "2 bits full range": {"bits": 2, "grid": "full_range"},
    "8 bits": {"bits": 8, "granularity": "channel"},
    "weights 3, inputs 5": {"bits": 3, "activation_bits": 5},
    "subset": {"bits": 4, "quantizer": "subset", "granularity": "channel"},
    "subset, points per channel": {"bits": 3, "quantizer": "subset", "granularity": "channel", "points_per": "channel"},
    "subset, inputs too": {"bits": 4, "quantizer": "subset", "activation_levels": "subset"},
    "offsets of inputs": {"bits": 4, "quantizer": "lsq_plus"},
    "thresholds from k-means": {"bits": 3, "quantizer": "qn"},
    "signed points": {"bits": 3, "quantizer": "subset", "signed_points": True, "zero": True},
}


@pytest.fixture(params=SPECS)
def made(request):
    torch.manual_seed(0)
    return quantized(SmallResidual(), SHAPE, **SPECS[request.param])


def reference_codes(wide, takes):
    """Requantization with Python's integers."""
    if takes.thresholds is not None:
        return np.searchsorted(takes.thresholds.numpy(), wide, side="right")
    m, n = int(takes.by.m), int(takes.by.n)
    each = [min(max((int(w) * m + (1 << (n - 1))) >> n, takes.lo), takes.hi) for w in wide.reshape(-1)]
    return np.array(each).reshape(wide.shape)


def test_accumulators_equal_a_convolution_in_double_precision_exactly(made):
    network = lq.IntegerNetwork(made, SHAPE)
    check_accumulators_are_exact(network, made, network.encode(torch.randn(6, *SHAPE)))


def test_requantized_codes_equal_a_reference_in_python_integers(made):
    network, values = lq.IntegerNetwork(made, SHAPE), {}
    x = network.encode(torch.randn(3, *SHAPE))
    seen = {}
    logits = network.run(x, lambda path, what, t: seen.update({(path, what): t.numpy()}))
    for name, step in (
        (step.node.name, step) for step in network.steps
    ):  # the whole network once more, in NumPy and Python integers
        given = [values.get(n) for n in step.node.inputs]
        settings = step.node.settings
        if step.node.kind == "input":
            continue
        if step.layer is not None:
            plan = step.layer
            if given[0] is not None:
                assert np.array_equal(reference_codes(given[0], plan.takes), seen[plan.path, "codes"])
            acc = seen[plan.path, "accumulators"].astype(object)
            m, b, n = (part.numpy().astype(object).reshape(-1, 1, 1) for part in plan.by)
            values[name] = ((acc * m + b + 2 ** (n - 1)) // 2**n).reshape(3, *step.node.shape)
        elif step.node.kind == "relu":
            cap = step.cap.numpy().astype(object).reshape(-1, 1, 1) if step.cap is not None else 2**62
            values[name] = np.minimum(np.maximum(given[0], 0), cap)
        elif step.node.kind == "add":
            halves = [(2**s) // 2 for s in step.shifts]
            values[name] = sum((g + h) // 2**s for g, h, s in zip(given, halves, step.shifts, strict=True))
        elif step.node.kind in ("max", "average"):
            values[name] = pool(given[0], step)
        else:
            assert step.node.kind == "flatten", settings
            values[name] = given[0].reshape(3, -1)
    assert values[network.steps[-1].node.name].tolist() == logits.tolist()


def pool(x, step):
    (high, wide), (down, right) = step.node.settings["kernel"], step.node.settings["stride"]
    pad = step.node.settings["padding"][0]
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-(2**40))
    rows, columns = step.node.shape[1:]
    out = np.zeros((len(x), *step.node.shape), dtype=object)
    for y in range(rows):
        for z in range(columns):
            part = x[:, :, y * down : y * down + high, z * right : z * right + wide].reshape(*x.shape[:2], -1)
            if step.node.kind == "max":
                out[:, :, y, z] = part.max(-1)
            else:
                m, n = int(step.by.m), int(step.by.n)
                out[:, :, y, z] = (part.sum(-1) * m + (1 << (n - 1))) // 2**n
    return out


def test_codes_differ_from_the_fake_quantized_network_by_one_at_ties_only(made):
    network, x = lq.IntegerNetwork(made, SHAPE), torch.randn(64, *SHAPE)
    ours, theirs, positions = {}, {}, {}
    network.run(network.encode(x), lambda path, what, t: ours.update({path: t} if what == "codes" else {}))
    handles = []
    for path, layer in named_quantized_layers(made).items():

        def see(module, args, path=path):
            quantizer = module.quantizer
            theirs[path] = quantizer.encode(args[0]).long()
            positions[path] = (args[0].double() / quantizer.scale.double(), quantizer)

        handles.append(layer.input_quantizer.register_forward_pre_hook(see))
    made(x)
    assert len(theirs) == len(network.layers)
    first = next(iter(ours))
    assert torch.equal(ours[first].long(), theirs[first])
    total = different = 0
    for path in ours:
        gap = (ours[path].long() - theirs[path]).abs()
        assert int(gap.max()) <= 1
        total, different = total + gap.numel(), different + int(gap.sum())
    assert different <= 1e-3 * total
    [handle.remove() for handle in handles]
    same = (network(x).argmax(1) == made(x).argmax(1)).double().mean()
    assert same >= 0.98


def test_batch_norm_activations_and_paddings_of_timm():
    for name, size in (("mobilenetv1_075_same", 32), ("mobilenetv2_035", 32), ("resnet18", 32)):
        model = quantized(create_model(name, num_classes=4), (3, size, size), bits=8, granularity="channel")
        network, x = lq.IntegerNetwork(model, (3, size, size)), torch.randn(4, 3, size, size)
        with torch.no_grad():
            expected = model(x)
        assert float((network(x) - expected).norm() / expected.norm()) < 0.1, name


def test_shifts_alone_and_narrow_accumulators():
    model = quantized(SmallResidual(), SHAPE, bits=4)
    network, x = lq.IntegerNetwork(model, SHAPE, shift_only=True), torch.randn(8, *SHAPE)
    assert all(int(m) & (int(m) - 1) == 0 for plan in network.layers for m in plan.by.m.abs() if int(m))
    assert network(x).isfinite().all()
    exact = lq.IntegerNetwork(model, SHAPE)
    assert torch.equal(lq.IntegerNetwork(model, SHAPE, accumulator_bits=31)(x), exact(x))
    assert not torch.equal(lq.IntegerNetwork(model, SHAPE, accumulator_bits=8)(x), exact(x))


NARROW = [{"bits": 4}, {"bits": 4, "granularity": "channel"}, {"bits": 4, "quantizer": "subset"}]
NARROW += [{"bits": 4, "quantizer": "qn"}, {"bits": 4, "quantizer": "qn", "granularity": "channel"}]


@pytest.mark.parametrize("spec", NARROW)
def test_accumulators_of_a_given_width_are_refused_then_repaired(spec):
    model = quantized(SmallResidual(), SHAPE, **spec)
    network = lq.IntegerNetwork(model, SHAPE)
    with pytest.raises(ValueError, match=r"accumulators must fit in 14 bits .* stem \(\d+ bits\).*overflow=repair"):
        check_accumulators(network, 14)
    changed = repair_accumulators(model, SHAPE, 14)
    assert changed["stem"] > 1
    repaired = lq.IntegerNetwork(model, SHAPE)
    check_accumulators(repaired, 14)
    x = torch.randn(8, *SHAPE)
    assert torch.equal(lq.IntegerNetwork(model, SHAPE, accumulator_bits=14)(x), repaired(x))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no scale makes its accumulators fit in 4 bits"):
        repair_accumulators(model, SHAPE, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_repair_that_fails_changes_nothing():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)]
    model = quantized(nn.Sequential(*layers), SHAPE, bits=4, first_last_bits=None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="2: no scale makes its accumulators fit in 7 bits"):  # those of 0 do
        repair_accumulators(model, SHAPE, 7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_repairs_are_of_the_codes_that_are_exported():
    for seed in range(4):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)]
        spec = {"bits": 4, "quantizer": "apot", "granularity": "channel", "first_last_bits": None}
        model = quantized(nn.Sequential(*layers), SHAPE, **spec).to(torch.bfloat16)
        repair_accumulators(model, SHAPE, 13)
        check_accumulators(lq.IntegerNetwork(model, SHAPE), 13)


def test_costs_are_counted():
    model = quantized(SmallResidual(), SHAPE, bits=4, quantizer="subset", first_last_bits=None)
    network = lq.IntegerNetwork(model, SHAPE)
    assert integer_cost(network).rows[0].observed_bits == 0
    network(torch.randn(4, *SHAPE))
    report = integer_cost(network)
    by_path = {row.path: row for row in report.rows}
    plan = next(p for p in network.layers if p.path == "depthwise")
    row = by_path["depthwise"]
    assert (row.float_bytes, row.int8_bytes, row.packed_bytes) == (4 * 72, 72, packed_bytes(72, 4))
    assert row.products == 72 * 7 * 7
    powers = sum(bin(abs(int(w))).count("1") for w in plan.weight.flatten())
    assert (row.shifts, row.adds, row.multiplies) == (powers * 49, powers * 49, 0)
    assert 1 < row.observed_bits <= row.bound_bits <= 32
    assert report.total.products == sum(r.products for r in report.rows)
    assert "depthwise" in str(report)
    uniform = integer_cost(lq.IntegerNetwork(quantized(SmallResidual(), SHAPE, bits=4), SHAPE)).rows[1]
    assert uniform.shifts == 0
    assert uniform.multiplies > 0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) * 2


class Odd(nn.Module):
    """One network per way to be misread."""

    def __init__(self, way):
        super().__init__()
        self.way, self.conv, self.second = way, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.head, self.relu = nn.Linear(14, 14), nn.ReLU(inplace=way == "in place")

    def forward(self, x):
        x = self.conv(x)
        if self.way == "in place":
            return self.second(self.relu(x)) + x
        if self.way == "broadcast":
            return self.second(x + x.mean((2, 3), keepdim=True))
        if self.way == "a pixel's linear layer":
            return self.head(x)
        if self.way == "two outputs":
            return x, self.second(x)
        first = self.second(x)
        self.relu(first)  # not what is returned
        return first


class WithReLU(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))


def test_the_output_is_what_is_returned_not_what_ran_last():
    model = quantized(Odd("last"), (3, 4, 4), bits=8)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(lq.IntegerNetwork(model, (3, 4, 4))(x).float(), model(x), atol=1e-4, rtol=1e-4)


UNSUPPORTED = {
    "in place": (lambda: Odd("in place"), {}, "changes a tensor in place that is used elsewhere"),
    "broadcast": (lambda: Odd("broadcast"), {}, "what is added must have the same shape"),
    "a pixel's linear layer": (lambda: Odd("a pixel's linear layer"), {}, "Linear is not one product"),
    "two outputs": (lambda: Odd("two outputs"), {}, "must return one tensor"),
    "a layer that does more": (lambda: nn.Sequential(WithReLU(3, 3, 1), nn.Conv2d(3, 3, 1)), {}, "is not one product"),
    "weights alone": (small_cnn, {"activation": None}, r"0: its input is not quantized.*activation=auto"),
    "a codebook": (
        small_cnn,
        {"quantizer": "codebook"},
        r"3: the levels of quantizer=codebook .*=subset",
    ),
    "real exponents": (small_cnn, {"quantizer": "dlq", "bits": 3}, r"3: the levels of quantizer=dlq are not sums"),
    "no powers of two": (
        small_cnn,
        {"quantizer": "subset", "bits": 3, "candidates": [0.1, 0.25, 0.5, 1.0]},
        r"are not sums of powers of two, or too far apart for 32 bits: use quantizer=subset with candidates that are",
    ),
    "a product": (Branching, {}, r"mul: mul has no integer form here.*target=onnx"),
    "an activation": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.Conv2d(3, 3, 1)),
        {},
        r"1: GELU has no integer form",
    ),
    "a norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), {}, "0: a batch norm must follow"),
    "a float layer": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)),
        {"exclude": ["2"]},
        "2: Conv2d is not quantized",
    ),
    "other padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
        {},
        "0: padding_mode must be 'zeros'",
    ),
    "a relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), {}, "the network's input must go to"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_has_no_integer_form_is_named_with_a_way_out(what):
    make, spec, message = UNSUPPORTED[what]
    model = quantized(make(), SHAPE, **{"bits": 4, **spec})
    with pytest.raises(lq.UnsupportedError, match=f"(?s){message}"):
        lq.IntegerNetwork(model, SHAPE)


def test_networks_that_cannot_be_traced_and_layers_that_were_not_calibrated():
    vit = create_model("vit_tiny_patch16_224", num_classes=3)
    lq.quantize_model(vit, lq.QuantSpec(bits=4))
    with pytest.raises(lq.UnsupportedError, match="target=onnx"):
        lq.IntegerNetwork(vit, (3, 224, 224))
    model = small_cnn()
    lq.quantize_model(model, lq.QuantSpec(bits=4))
    with pytest.raises(lq.UnsupportedError, match="0: its input is not quantized"):
        lq.IntegerNetwork(model, SHAPE)
    assert model.training  # left as it was
