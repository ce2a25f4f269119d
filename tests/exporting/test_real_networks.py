"""The forms a network is deployed in, on real checkpoints and real images."""

import shutil

import pytest
import torch

import lq
from lq.data import CIFAR10Data, ImagePackData
from lq.deployed import open_deployed
from lq.evaluation import evaluate
from lq.exporting.c import write_c
from lq.exporting.onnx import write_onnx
from lq.models import create_model
from tests.helpers.integers import check_accumulators_are_exact

CIFAR = (3, 32, 32)


def from_checkpoint(root, name, **spec):
    """A network with real weights, quantized and calibrated on real images, and further ones."""
    if name == "mobilenetv1":
        data = ImagePackData(f"{root}/in1k_sample1000_256.npz", batch_size=8)
        path, kind, classes = f"{root}/in1k_mobilenetv1_075.safetensors", "mobilenetv1_075_same", 1000
    else:
        data = CIFAR10Data(root, batch_size=100)
        path, kind, classes = f"{root}/cifar10_{name}.safetensors", f"cifar_{name}", 10
    model = create_model(kind, num_classes=classes, checkpoint=path)
    data.prepare_data()
    data.setup("fit")
    lq.quantize_model(model, lq.QuantSpec(granularity="channel", **spec))
    lq.calibrate(model, data.calibration_batches(64, 32))
    data.setup("test")
    return model.eval(), data


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("resnet20", {"bits": 4, "quantizer": "subset"}),
        ("resnet32", {"bits": 8}),
        ("resnet56", {"bits": 2, "grid": "mid_rise"}),
        ("mobilenetv1", {"bits": 4}),
    ],
)
def test_accumulators_are_exact(data_root, name, spec):
    model, data = from_checkpoint(data_root, name, **spec)
    x = next(iter(data.test_dataloader()))[0][:1]
    network = lq.IntegerNetwork(model, tuple(x.shape[1:]))
    check_accumulators_are_exact(network, model, network.encode(x))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("quantizer", ["lsq", "subset"])
def test_all_forms_agree_on_a_hundred_images(data_root, tmp_path, quantizer):
    pytest.importorskip("onnxruntime")
    model, data = from_checkpoint(data_root, "resnet20", bits=4, quantizer=quantizer)
    path = lq.save(model, tmp_path / "net.lq.safetensors", architecture={"name": "cifar_resnet20"})
    integers = lq.IntegerNetwork(model, CIFAR)
    write_c(integers, tmp_path / "net.c")
    write_onnx(model, tmp_path / "net.onnx", CIFAR)
    files = [str(path), f"integer:{path}", str(tmp_path / "net.onnx"), str(tmp_path / "net.c")]
    networks = [open_deployed(file, CIFAR) for file in files]
    report = evaluate(networks, data.test_dataloader(), images=100, progress=False)
    assert report.images == 100
    artifact, _, _, in_c = report.rows
    assert artifact.right >= 85
    assert in_c.same == [*in_c.same[:1], 100, *in_c.same[2:]]  # C and the integers
    assert min(count for row in report.rows for count in row.same) >= 99
    x = next(iter(data.test_dataloader()))[0][:10]
    with torch.inference_mode():
        assert torch.equal(networks[3].run(x), integers(x))
