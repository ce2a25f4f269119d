"""`lq search` as a user runs it."""

import re

import pytest
import torch

import lq as package
from lq.classifier import Classifier
from lq.data import DigitsData
from lq.nn import named_quantized_layers
from lq.quantizers import PointQuantizer
from tests.helpers.commands import lq, tracked_run

QUICK = ["pretrain_epochs=1", "trainer.limit_train_batches=8", "trainer.enable_progress_bar=false"]
STAGES = [
    "search=best",
    "search.reconstruct=5",
    "search.equalize=true",
    "search.activation=auto",
    "calibration_images=64",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    done = lq("search", *QUICK, *STAGES, "output_dir=out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_it_prints_every_layer_and_the_outcome(finished):
    _, out = finished
    for what in (
        r"layer1.0.conv1 +16x16x3x3 +4 +subset +.*2\^-",
        r"conv1 .*8 +uniform",
        "8 of 8 layers quantized; ends by execution order",
        "batch norms folded: 7 of 7",
        "biases corrected: 8",
        "reconstructed blocks",
        r"test accuracy, searched +\d+\.\d\d%",
        r"bits each",
    ):
        assert re.search(what, out), what
    assert out.rstrip().endswith("mlflow ui")


def test_the_run_is_tracked_whole(finished):
    folder, _ = finished
    client, run = tracked_run(folder, "digits-search")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "cifar_resnet8 subset W4A4 inputs equalized reconstructed"
    assert {"float/test/acc", "test/acc", "lq/sqnr_db", "lq/bits_per_weight"} <= set(run.data.metrics)
    assert run.data.params["search/bits"] == "4"
    names = {"search_report.txt", "search_report.json", "outcome.txt", "network.lq.safetensors", "network.ckpt"}
    names |= {"points.png", "loss.png", "accuracy.png"}
    assert {f.path for f in client.list_artifacts(run.info.run_id, "lq")} == {f"lq/{name}" for name in names}


def test_the_stored_network_loads_and_is_the_one_that_was_scored(finished):
    folder, out = finished
    module = package.load_from_checkpoint(Classifier, folder / "out" / "network.ckpt")
    data = DigitsData(batch_size=32)
    data.setup("test")
    with torch.no_grad():
        right = total = 0
        for x, y in data.test_dataloader():
            right, total = right + int((module(x).argmax(1) == y).sum()), total + len(y)
    said = re.search(r"searched +(\d+\.\d\d)%", out)
    assert said is not None
    assert f"{100 * right / total:.2f}" == said[1]
    packed = package.load(folder / "out" / "network.lq.safetensors")
    for path, layer in named_quantized_layers(module.model).items():
        assert torch.equal(packed.get_submodule(path).weight, layer.quantized_weight())
        if isinstance(layer.weight_quantizer, PointQuantizer):
            assert torch.equal(packed.get_submodule(path).weight_quantizer.points, layer.weight_quantizer.points)


def test_the_same_folder_is_not_searched_twice(finished):
    folder, out = finished
    done = lq("search", *QUICK, *STAGES, "output_dir=out", "logger=csv", cwd=folder)
    assert done.returncode == 0, done.stderr
    pattern = r"searched +(\S+)%"
    assert re.findall(pattern, done.stdout) == re.findall(pattern, out)
    changed = lq("search", *QUICK, *STAGES, "output_dir=out", "logger=csv", "search.power=4", cwd=folder)
    assert changed.returncode != 0
    assert "folder must hold results of these weights and settings" in changed.stderr
    assert "delete the folder" in changed.stderr


def test_several_devices_are_refused(tmp_path):
    done = lq("search", *QUICK, "trainer.devices=2", cwd=tmp_path)
    assert done.returncode != 0
    assert "trainer.devices must be 1, got 2: a search runs on one device" in done.stderr
