import dataclasses

import pytest
import torch

import lq
from lq.cli.arguments import parse
from lq.cli.export import ExportConfig, run
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


def test_export_writes_c_and_artifacts(artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("export", [f"checkpoint={artifact}", "out=net.c", "target=c"])
    assert "flash" in capsys.readouterr().out
    assert (tmp_path / "net.c").is_file()
    run("export", [f"checkpoint={artifact}", "out=again.lq.safetensors"])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(lq.load("again.lq.safetensors")(x), lq.load(artifact)(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=none.ckpt", "out=a.c"], "checkpoint must be a file, got 'none.ckpt'"),
        (["out=a.c", "target=tflite"], "target must be one of"),
        (["out=a.c", "traget=c"], "got 'traget=c': the fields are checkpoint, out, target"),
        (["out=a.c", "accumulator_bits=many"], "Value 'many' of type 'str' could not be converted to Integer"),
        (["target=c"], "out must be given: out=..."),
        (["out=a.c", "target=c", "accumulator_bits=12"], "must fit in 12 bits"),
    ],
)
def test_bad_input_is_one_line(artifact, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run("export", [f"checkpoint={artifact}", *arguments])
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "a.c").exists()


def test_help_names_every_field(capsys):
    run("export", ["--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(ExportConfig):
        assert field.name in out


@pytest.mark.parametrize("path", ["007", "1e3", "yes", "[x.ckpt", "a #b.ckpt", "a: b", "${x}", "null", "'q"])
def test_paths_are_taken_as_they_stand(path):
    config = parse(ExportConfig, [f"checkpoint={path}", f"out={path}", "shape=[3,8,8]", "integers=true"])
    assert config.checkpoint == config.out == path
    assert (list(config.shape), config.integers) == ([3, 8, 8], True)


def test_values_that_are_no_yaml_are_named():
    with pytest.raises(ValueError, match=r"shape=\[3"):
        parse(ExportConfig, ["checkpoint=a", "out=b", "shape=[3"])
