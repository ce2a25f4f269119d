import pytest
import torch

import lq
from lq.models import create_model
from tests.helpers.commands import lq as command
from tests.helpers.quantized import quantized


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    model = quantized(create_model("cifar_resnet8"), (3, 32, 32), bits=4, granularity="channel")
    path = tmp_path_factory.mktemp("net") / "net.lq.safetensors"
    return lq.save(model, path, architecture={"name": "cifar_resnet8"}, input={"shape": [3, 32, 32]})


def test_inspect_prints_layers_and_totals(artifact):
    done = command("inspect", str(artifact), cwd=artifact.parent)
    assert done.returncode == 0, done.stderr
    assert "layer1.0.conv1" in done.stdout
    assert "bits per weight" in done.stdout
    assert "architecture: name=cifar_resnet8" in done.stdout


def test_export_writes_c_and_artifacts(artifact):
    folder = artifact.parent
    done = command("export", f"checkpoint={artifact}", "out=net.c", "target=c", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "flash" in done.stdout
    assert (folder / "net.c").is_file()
    done = command("export", f"checkpoint={artifact}", "out=again.lq.safetensors", cwd=folder)
    assert done.returncode == 0, done.stderr
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(lq.load(folder / "again.lq.safetensors")(x), lq.load(artifact)(x))


def test_bad_input_is_one_line(artifact):
    folder = artifact.parent
    cases = {
        ("export", "checkpoint=none.ckpt", "out=a.c"): "checkpoint must be a file, got 'none.ckpt'",
        ("export", f"checkpoint={artifact}", "out=a.c", "target=tflite"): "target must be one of",
        (
            "export",
            f"checkpoint={artifact}",
            "out=a.c",
            "target=c",
            "accumulator_bits=12",
        ): "must fit in 12 bits",
    }
    for arguments, message in cases.items():
        done = command(*arguments, cwd=folder)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (folder / "a.c").exists()
    assert "target" in command("export", "--help", cwd=folder).stdout
