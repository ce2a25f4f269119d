import pytest
import torch

import lq
from lq.deployed import Deployed, open_deployed
from lq.evaluation import evaluate
from lq.exporting.c import write_c
from lq.exporting.onnx import write_onnx
from lq.models import create_model
from tests.helpers.commands import lq as command
from tests.helpers.commands import tracked_run
from tests.helpers.quantized import quantized

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One network in every form."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("forms")
    architecture = {"name": "cifar_resnet8", "in_chans": 1}
    model = quantized(create_model(**architecture), SHAPE, bits=4)
    lq.save(model, folder / "net.lq.safetensors", architecture=architecture, input={"shape": list(SHAPE)})
    write_onnx(model, folder / "net.onnx", SHAPE)
    write_c(lq.IntegerNetwork(model, SHAPE), folder / "net.c")
    return folder


def test_the_command_compares_all_forms_and_tracks_them(folder):
    files = "files=[net.lq.safetensors,integer:net.lq.safetensors,net.onnx,net.c]"
    done = command("evaluate", files, "model=cifar_resnet8", "model.in_chans=1", "images=50", cwd=folder)
    assert done.returncode == 0, done.stderr
    for kind in ("float", "artifact", "integer", "onnx", "c"):
        assert f" {kind} " in done.stdout
    assert "50 images" in done.stdout
    client, run = tracked_run(folder, "lq-evaluate")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["network_3/same_class_as_5"] == 1
    assert run.data.metrics["network_2/bytes"] == (folder / "net.lq.safetensors").stat().st_size
    names = {f.path for f in client.list_artifacts(run.info.run_id, "lq")}
    assert names == {"lq/evaluation.txt", "lq/evaluation.json", "lq/evaluation.png"}


def test_figures_are_those_of_the_classes():
    classes = [torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 0, 2])]
    networks = [
        Deployed(str(i), "float", 10, lambda x, c=c: torch.eye(3)[c[x[:, 0, 0, 0].long()]])
        for i, c in enumerate(classes)
    ]
    batches = [(torch.arange(4.0).reshape(4, 1, 1, 1), torch.tensor([0, 1, 2, 1]))]
    report = evaluate(networks, batches, progress=False)
    first, second = report.to_dicts()
    assert (first["accuracy"], second["accuracy"]) == (0.75, 0.5)
    assert first["same_class_as_1"] == 1
    assert first["same_class_as_2"] == second["same_class_as_1"] == 0.75
    assert first["images_per_second"] > 0
    assert evaluate(networks, batches * 3, images=6, progress=False).images == 6


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("none.onnx", FileNotFoundError, "none.onnx' which does not"),
        ("text.txt", ValueError, "must end in .ckpt, .lq.safetensors, .onnx or .c"),
        ("integer:net.onnx", ValueError, "a checkpoint or an artifact after 'integer:'"),
    ],
)
def test_files_of_another_kind_are_named(folder, monkeypatch, file, error, message):
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text("no network")
    with pytest.raises(error, match=message):
        open_deployed(file, SHAPE)


@pytest.mark.parametrize("file", ["net.lq.safetensors", "net.onnx", "net.c"])
def test_images_of_another_shape_are_refused(folder, file):
    network = open_deployed(str(folder / file), SHAPE)
    assert network.shape == SHAPE
    with pytest.raises(ValueError, match=r"takes images of shape \[1, 8, 8\], the data have \[3, 8, 8\]"):
        evaluate([network], [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], progress=False)


def test_no_images_are_an_error():
    network = Deployed("zero", "float", 0, lambda x: torch.zeros(len(x), 2))
    with pytest.raises(ValueError, match="at least one image"):
        evaluate([network], [], progress=False)
    with pytest.raises(ValueError, match="networks must hold at least one"):
        evaluate([], [(torch.zeros(1, 1, 1, 1), torch.zeros(1))], progress=False)
    for images in (0, -1):
        with pytest.raises(ValueError, match=f"images must be at least 1, got {images}"):
            evaluate([network], [], images=images, progress=False)


@pytest.mark.parametrize("name", ["junk.onnx", "junk.ckpt", "junk.lq.safetensors", "junk"])
def test_files_that_are_not_what_they_seem_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"junk")
    path.chmod(0o755)
    with pytest.raises(ValueError, match="junk"):
        open_deployed(str(path), SHAPE)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(1, 2, 2), 0) for _ in range(6)])


def test_images_may_come_as_a_stream():
    network = Deployed("first", "float", 0, lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2))
    report = evaluate([network], torch.utils.data.DataLoader(Stream(), batch_size=4))
    assert report.images == 6
    assert report.rows[0].right == 6
