import copy

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.exporting.onnx import write_onnx
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
