import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lq
from lq.exporting.onnx import write_onnx
from lq.exporting.onnx_weights import stored_weight
from lq.models import create_model
from tests.exporting.test_integer import SHAPE
from tests.helpers.modules import SmallResidual
from tests.helpers.quantized import quantized

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")
SPECS = {
    "8 bits per channel": ({"bits": 8, "granularity": "channel"}, {"INT8"}),
    "4 bits": ({"bits": 4, "granularity": "channel"}, {"INT4", "INT8"}),
    "full range": ({"bits": 4, "grid": "full_range"}, {"INT4", "INT8"}),
    "full range of 8 bits": ({"bits": 8, "grid": "full_range", "granularity": "channel"}, {"INT8"}),
    "mid-rise of 4 bits": ({"bits": 4, "grid": "mid_rise"}, {"UINT4"}),
    "weights of 3 bits alone": ({"bits": 3, "activation": None, "granularity": "channel"}, {"INT4", "INT8"}),
    "mid-rise": ({"bits": 2, "grid": "mid_rise", "activation": None}, {"INT4"}),
    "subset": ({"bits": 4, "quantizer": "subset", "granularity": "channel"}, {"UINT4", "INT8"}),
    "subset, inputs too": ({"bits": 3, "quantizer": "subset", "activation_levels": "subset"}, {"UINT4", "INT8"}),
    "points per channel": (
        {"bits": 3, "quantizer": "subset", "granularity": "channel", "points_per": "channel", "activation": None},
        {"INT8"},
    ),
}


def session(path):
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(path, options)


def kinds(path):
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    named = onnx.TensorProto.DataType.Name
    return proto, {named(i.data_type) for i in proto.graph.initializer if len(i.dims) > 1}


@pytest.mark.parametrize("what", SPECS)
def test_the_runtime_computes_what_torch_computes(tmp_path, what):
    spec, expected = SPECS[what]
    model = quantized(SmallResidual(), SHAPE, **spec)
    before = copy.deepcopy(model.state_dict())
    path = write_onnx(model, tmp_path / "net.onnx", SHAPE)
    assert model.state_dict().keys() == before.keys()
    proto, found = kinds(path)
    assert expected <= found
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    for count in (1, 32):  # the batch may have any size
        x = torch.randn(count, *SHAPE)
        (y,) = session(path).run(None, {"input": x.numpy()})
        with torch.no_grad():
            expected_y = model(x).numpy()
        error = np.abs(y - expected_y).max(1) / np.abs(expected_y).max()
        assert error.max() < 0.02  # one input at a tie; or a product that the runtime fuses and computes in 8 bits
        assert np.median(error) < (1e-5 if spec.get("activation", "auto") else 0.02)


def test_points_can_be_constants_and_transformers_export(tmp_path):
    model = quantized(SmallResidual(), SHAPE, bits=4, quantizer="subset", activation=None)
    path = write_onnx(model, tmp_path / "net.onnx", SHAPE, fold_points=True)
    assert "UINT4" not in kinds(path)[1]
    vit = create_model("test_vit", num_classes=3)
    size = (3, 160, 160)
    vit = quantized(vit, size, bits=4, granularity="channel", activation=None)
    path = write_onnx(vit, tmp_path / "vit.onnx", size)
    assert "INT4" in kinds(path)[1]
    x = torch.randn(2, *size)
    with torch.no_grad():
        np.testing.assert_allclose(session(path).run(None, {"input": x.numpy()})[0], vit(x).numpy(), atol=2e-2)


class Chain(nn.Module):
    """Convolutions between quantized inputs alone: caps, a channel whose norm has gain 0, groups, a transposed one."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.cap = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.ReLU6()
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.up(self.cap(self.depthwise(x))).relu()).mean((2, 3))


def operators(path, folder):
    """Kinds of the nodes that the runtime runs."""
    options = runtime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / "optimized.onnx")
    runtime.InferenceSession(path, options)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    ("spec", "integers", "fused"),
    [
        ({"bits": 8}, None, 2),
        ({"bits": 4}, None, 0),
        ({"bits": 4}, True, 2),
        ({"bits": 4, "grid": "mid_rise"}, True, 2),
        ({"bits": 4, "quantizer": "subset"}, True, 2),
        ({"bits": 4, "quantizer": "codebook"}, True, 0),
        ({"bits": 3, "quantizer": "subset", "candidates": [0.1, 0.25, 0.5, 0.75, 1.0]}, True, 0),
    ],
)
def test_runtimes_compute_in_integers_where_they_may(tmp_path, spec, integers, fused):
    model = quantized(Chain(), SHAPE, first_last_bits=None, **spec)
    model.norm.weight.data[2], model.norm.bias.data[2] = 0, 0.7
    path = write_onnx(model, tmp_path / "net.onnx", SHAPE, integers=integers)
    found = operators(path, tmp_path)
    assert found.count("QLinearConv") == fused, found
    assert "Relu" not in found
    x = torch.randn(16, *SHAPE)
    with torch.no_grad():
        error = np.abs(session(path).run(None, {"input": x.numpy()})[0] - model(x).numpy())
    assert np.median(error) < 2e-3 * float(model(x).detach().abs().max())
    assert error.max() < 0.02 * float(model(x).detach().abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24)])
@pytest.mark.parametrize("spec", [{"bits": 8}, {"bits": 7}, {"bits": 4}, {"bits": 4, "quantizer": "subset"}])
def test_linear_layers_are_products_of_integers_without_overflow(tmp_path, spec, shape, bias):
    model = nn.Sequential(nn.Linear(24, 16, bias=bias), nn.ReLU(), nn.Linear(16, 3, bias=bias))
    for layer in (model[0], model[2]):
        layer.weight.data = layer.weight.abs()  # sums of products all of one sign
    model = quantized(model, shape, first_last_bits=None, granularity="channel", activation_bits=8, **spec)
    path = write_onnx(model, tmp_path / "net.onnx", shape)
    found = operators(path, tmp_path)
    assert sum(found.count(kind) for kind in ("MatMulIntegerToFloat", "QLinearMatMul")) == 2, found
    x = 3 * torch.rand(8, *shape)
    with torch.no_grad():
        expected = model(x).numpy()
    y = session(path).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(y, expected, atol=1e-5 * float(np.abs(expected).max()), rtol=0)


REAL = {
    "fractional exponents": {"bits": 3, "quantizer": "dlq", "activation_bits": 8},
    "many exponents": {"bits": 6, "quantizer": "log2", "granularity": "channel"},
    "a codebook": {"bits": 3, "quantizer": "codebook"},
    "wide mid-rise": {"bits": 8, "grid": "mid_rise"},
    "no powers of two": {"bits": 3, "quantizer": "subset", "candidates": [0.1, 0.3, 0.6, 0.8, 1.0]},
    "large multiples": {"bits": 5, "quantizer": "subset", "candidates": "three_words"},
    "points per channel": {"bits": 3, "quantizer": "subset", "granularity": "channel", "points_per": "channel"},
    "a gain below zero": {"bits": 4},
}


@pytest.mark.parametrize("shape", [(24,), (5, 24)])
@pytest.mark.parametrize("what", REAL)
def test_linear_layers_of_real_numbers_are_not_quantized_anew(tmp_path, what, shape):
    norm = [nn.BatchNorm1d(16)] if len(shape) == 1 else []
    model = nn.Sequential(nn.Linear(24, 16), *norm, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    if norm:
        norm[0].weight.data = torch.linspace(-1, 2, 16) if what == "a gain below zero" else torch.rand(16) + 0.5
        norm[0].running_mean.uniform_(-1, 1)
    model = quantized(model, shape, first_last_bits=None, **REAL[what])
    path = write_onnx(model, tmp_path / "net.onnx", shape)
    x = torch.randn(32, *shape)
    with torch.no_grad():
        expected = model(x).numpy()
    y = session(path).run(None, {"input": x.numpy()})[0]
    np.testing.assert_allclose(y, expected, atol=2e-6 * float(np.abs(expected).max()), rtol=0)


@pytest.mark.parametrize(("bits", "kind"), [(7, "INT8"), (8, "UINT8")])
def test_signed_integers_are_used_where_no_processor_overflows(tmp_path, bits, kind):
    model = quantized(Chain(), SHAPE, bits=bits, activation_bits=8, first_last_bits=None)
    write_onnx(model, tmp_path / "net.onnx", SHAPE)
    operators(tmp_path / "net.onnx", tmp_path)
    proto = onnx.load(tmp_path / "optimized.onnx")
    (weight,) = {n.input[3] for n in proto.graph.node if n.op_type == "QLinearConv" and len(n.input) > 3} & {
        i.name for i in proto.graph.initializer if list(i.dims) == [8, 1, 3, 3]
    }
    found = next(i for i in proto.graph.initializer if i.name == weight)
    assert onnx.TensorProto.DataType.Name(found.data_type) == kind


def test_runtimes_do_not_quantize_values_anew(tmp_path):
    spec = {"bits": 4, "quantizer": "subset", "granularity": "tensor", "first_last_bits": None}
    model = quantized(Chain(), SHAPE, **spec)
    path = write_onnx(model, tmp_path / "net.onnx", SHAPE, fold_points=True)
    assert "QLinearConv" not in operators(path, tmp_path)


def test_integers_of_8_bits_stand_for_the_same_weights():
    model = quantized(Chain(), SHAPE, bits=4, granularity="channel")
    layer = model.depthwise
    gain = torch.tensor([1.0, -0.3, 0.0, 2.0, 1e-12, 0.5, -1.0, 3.0]).double()
    stored = stored_weight(layer, gain, fold_points=False, integers=True)
    whole = stored.codes.float() * stored.factor.reshape(-1, 1, 1, 1)
    assert int(whole.abs().max()) <= 127
    assert torch.equal(whole, whole.round())
    assert bool((stored.integer_scale > 0).all())
    expected = layer.quantized_weight().double() * gain.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        whole.double() * stored.integer_scale.double().reshape(-1, 1, 1, 1), expected, atol=1e-9, rtol=1e-6
    )
    plain = dataclasses.replace(stored, factor=torch.ones(8), integer_scale=stored.scale.abs())

    def missed(s):
        steps = layer.bias.double() / (s.integer_scale.double() * layer.input_quantizer.quantizer.scale.double())
        return ((steps - steps.round()) * s.integer_scale.double()).abs()[gain.abs() > 1e-6]

    assert float(missed(stored).mean()) < 0.1 * float(missed(plain).mean())


class Doubled(nn.Module):
    def forward(self, bias):
        return 2 * bias


def small(*layers, name=""):
    model = nn.Sequential(*layers)
    if name == "bias":
        parametrize.register_parametrization(model[2], "bias", Doubled())
    return model


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)
        self.again = self.b

    def forward(self, x):
        return self.last(self.again(self.b(self.a(x).relu()).relu()))


ODD = {
    "one-dimensional": (lambda: small(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 3, 3)), (2, 16)),
    "a computed bias": (
        lambda: small(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), name="bias"),
        (2, 9, 9),
    ),
    "two names": (TwoNames, (2, 11, 11)),
    "transposed, in groups": (
        lambda: small(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.Conv2d(6, 3, 3)),
        (2, 9, 9),
    ),
    "a norm over rows": (lambda: small(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (6, 6)),
}


@pytest.mark.parametrize("integers", [None, True])
@pytest.mark.parametrize("what", ODD)
def test_odd_networks_are_computed_rightly(tmp_path, what, integers):
    make, shape = ODD[what]
    model = quantized(make(), shape, bits=4, granularity="channel")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1)
            module.weight.data.uniform_(0.5, 2)
    path = write_onnx(model, tmp_path / "net.onnx", shape, integers=integers)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        expected = model(x).numpy()
    y = session(path).run(None, {"input": x.numpy()})[0]
    assert y.shape == expected.shape
    assert np.median(np.abs(y - expected)) < 0.01 * expected.std()


@pytest.mark.parametrize("gain", [1e-3, 1e-5, 1e-6, 1e-7, 1e-9, 0.0])
def test_channels_that_training_switched_off_keep_their_bias(tmp_path, gain):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    model = quantized(model, (2, 9, 9), bits=8, granularity="channel", first_last_bits=None)
    model[1].weight.data = torch.tensor([1.0, gain, 0.5, -gain])
    model[1].bias.data = torch.tensor([0.1, 1.0, -0.2, 0.9])
    path = write_onnx(model, tmp_path / "net.onnx", (2, 9, 9))
    x = torch.randn(8, 2, 9, 9)
    with torch.no_grad():
        expected = model(x).numpy()
    error = np.abs(session(path).run(None, {"input": x.numpy()})[0] - expected)
    assert error.mean() < 0.03 * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_another_precision_are_exported_in_float32(tmp_path, dtype):
    model = quantized(small(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)), (2, 9, 9), bits=4).to(dtype)
    whole, x = copy.deepcopy(model).float(), torch.randn(4, 2, 9, 9)
    assert torch.equal(lq.IntegerNetwork(model, (2, 9, 9))(x), lq.IntegerNetwork(whole, (2, 9, 9))(x))
    y = session(write_onnx(model, tmp_path / "net.onnx", (2, 9, 9))).run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(np.median(np.abs(y - whole(x).numpy())), 0, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {dtype}


class Unexportable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else x


def test_what_torch_cannot_export_is_said_and_leaves_no_file(tmp_path):
    model = quantized(Unexportable(), SHAPE, bits=4, activation=None)
    with pytest.raises(lq.UnsupportedError, match="cannot be exported to ONNX"):
        write_onnx(model, tmp_path / "net.onnx", SHAPE)
    assert not list(tmp_path.iterdir())


def test_loaded_networks_can_be_exported_by_torch(tmp_path):
    model = quantized(create_model("cifar_resnet8"), (3, 32, 32), bits=4, granularity="channel")
    loaded = lq.load(lq.save(model, tmp_path / "net.lq.safetensors", architecture={"name": "cifar_resnet8"}))
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(loaded, (x,))
    assert torch.equal(program.module()(x), loaded(x))
