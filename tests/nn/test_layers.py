import copy
import pickle

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.layers import Linear as TimmLinear
from torch import nn
from torch.nn.utils import parametrizations

import lq
from lq.nn import FixedWeight, QuantLayer, SubstituteWeight, from_float, operator_weight
from lq.quantizers import build_weight_quantizer
from lq.spec import LayerSpec


class Shifted(nn.Conv2d):
    """A subclass of unknown kind: pads in its own way, then does as its base."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 0, 0)))


class Adapted(nn.Linear):
    """Two more products beside the layer's own, as adapters have."""

    def __init__(self):
        super().__init__(6, 5)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


CASES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv2d-same-string": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (2, 4, 6, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "timm-linear": (lambda: TimmLinear(6, 5), (2, 6)),
    "conv2d-same": (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "standardized": (lambda: StdConv2d(4, 6, 3), (2, 4, 6, 6)),
    "scaled-standardized": (lambda: ScaledStdConv2d(4, 6, 3), (2, 4, 6, 6)),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), (2, 6)),
    "subclass": (lambda: Shifted(4, 6, 3), (2, 4, 6, 6)),
    "adapter": (Adapted, (2, 6)),
}
TRANSFORMS = {"standardized", "scaled-standardized"}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request):
    make, shape = CASES[request.param]
    return request.param, make(), torch.randn(shape)


def quantized(layer, granularity="channel", **fields):
    model = nn.Sequential(layer)
    lq.quantize_model(model, lq.QuantSpec(first_last_bits=None, granularity=granularity, **fields))
    lq.set_slope(model, 5.0)
    return model


def expected(layer, float_layer, x):
    """The float layer, run with the quantized weight in place of whatever it would use."""
    with SubstituteWeight(float_layer.weight.shape, lambda _: layer.quantized_weight()) as substitution:
        y = float_layer(x)
    assert substitution.calls == 1
    return y


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_forward_is_the_float_forward_with_the_quantized_weight(case, granularity):
    _, layer, x = case
    float_layer = copy.deepcopy(layer)
    model = quantized(layer, granularity).eval()
    assert isinstance(layer, QuantLayer)
    assert torch.equal(model(x), expected(layer, float_layer, x))
    assert not torch.equal(model(x), float_layer(x))


def test_identity_of_module_and_parameters_is_kept(case):
    _, layer, _ = case
    parameters = dict(layer.named_parameters())
    kind = type(layer)
    model = quantized(layer)
    assert model[0] is layer
    assert isinstance(layer, kind)
    after = dict(layer.named_parameters())
    assert all(after[name] is p for name, p in parameters.items())
    assert {n for n in after if n not in parameters} == {"weight_quantizer.scale", "input_quantizer.quantizer.scale"}


def test_a_weight_that_is_transformed_is_quantized_after_the_transform(case):
    name, layer, _ = case
    float_layer = copy.deepcopy(layer)
    quantized(layer)
    assert layer.transforms_weight == (name in TRANSFORMS)
    torch.testing.assert_close(layer.float_weight(), operator_weight(float_layer))


def test_a_normalized_weight_is_quantized_after_everything_else(case):
    _, layer, x = case
    with torch.no_grad():
        float_weight = operator_weight(layer)
        spread = float_weight.std(correction=0)
    quantized(layer, normalize=True)
    centred = float_weight - float_weight.mean()
    torch.testing.assert_close(layer.float_weight(), centred / centred.std(correction=0) * spread)
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer.hard(layer.float_weight()))
    float_layer = copy.deepcopy(layer)
    lq.dequantize_model(float_layer, keep_latent=True)
    y = layer.eval()(x)
    assert torch.equal(y, expected(layer, float_layer, x))
    assert torch.equal(copy.deepcopy(layer)(x), y)
    layer.train()(x).square().sum().backward()
    weights = {n: p for n, p in layer.named_parameters() if n == "weight" or n.startswith("parametrizations")}
    assert weights
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights.values())
    layer.normalize_(False)
    torch.testing.assert_close(layer.float_weight(), float_weight)


def test_dequantized_layer_gives_the_same_output_exactly(case):
    name, layer, x = case
    kind = type(layer)
    model = quantized(layer).eval()
    y = model(x)
    lq.dequantize_model(model)
    assert torch.equal(model(x), y)
    assert not isinstance(layer, QuantLayer)
    assert isinstance(layer, FixedWeight) == (name in TRANSFORMS)
    assert isinstance(layer, kind if name != "weight-norm" else nn.Linear)
    assert not any("quantizer" in key for key in layer.state_dict())


def test_round_trip_that_keeps_the_latent_weight(case):
    _, layer, x = case
    before = layer(x)
    kind, keys = type(layer), set(layer.state_dict())
    model = quantized(layer)
    lq.dequantize_model(model, keep_latent=True)
    assert type(layer) is kind
    assert set(layer.state_dict()) == keys
    assert torch.equal(layer(x), before)


def test_everything_learns(case):
    _, layer, x = case
    model = quantized(layer).train()
    lq.calibrate(model, [x])
    (model(x).square().sum() + lq.scale_regularizer(model)).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_copies_and_pickles(case):
    name, layer, x = case
    model = quantized(layer).eval()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if name != "weight-norm":  # torch cannot pickle its own parametrized classes
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_compiles_without_a_graph_break(case):
    _, layer, x = case
    model = quantized(layer).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_hooks_of_the_user_stay():
    layer, seen = nn.Linear(6, 5), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    quantized(layer)(torch.randn(2, 6))
    assert seen == [1]


def test_exports():
    model = quantized(nn.Conv2d(4, 6, 3)).eval()
    x = torch.randn(2, 4, 6, 6)
    lq.calibrate(model, [x])
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_from_float_refuses_what_it_cannot_convert():
    quantizer = build_weight_quantizer(LayerSpec(), lq.functional.layout.ScaleLayout(), 4)
    with pytest.raises(TypeError, match="module must be a float convolution or linear layer, got ReLU"):
        from_float(nn.ReLU(), quantizer, None)


class TwoProducts(nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


def test_operator_weight_needs_exactly_one_product():
    with pytest.raises(ValueError, match="gives its weight to 2 convolution or linear operators"):
        operator_weight(TwoProducts(3, 3))


@pytest.mark.parametrize("quantizer", ["soft", "lsq"])
def test_mixed_precision_keeps_no_inputs_in_float32(quantizer):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3))
    lq.quantize_model(model, lq.QuantSpec(quantizer=quantizer))
    x, kept = torch.randn(64, 4, 8, 8), []
    lq.calibrate(model.train(), [x])
    with torch.autocast("cpu", torch.bfloat16):
        x = model[1](model[0](x))  # in bfloat16
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model[2](x)
    assert {t.dtype for t in kept if t.shape == x.shape} == {torch.bfloat16}


def test_mixed_precision_compiles_whole():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3))
    lq.quantize_model(model, lq.QuantSpec())
    x, found = torch.randn(4, 4, 8, 8), []
    lq.calibrate(model.train(), [x])
    torch.compiler.reset()
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
