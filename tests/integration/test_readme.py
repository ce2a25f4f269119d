"""The README's Python runs as it stands."""

import dataclasses
import re
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule

import lq
from lq.classifier import Classifier
from tests.helpers.modules import Plain, loader, small_cnn
from tests.helpers.quantized import quantized

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_no_result_is_left_to_be_filled_in():
    assert not re.findall(r"\| [A-Z_]{4,} \||RESULTS_", TEXT)
    for recipe in (Path(__file__).parents[2] / "recipes").glob("*.yaml"):
        assert "to be measured" not in recipe.read_text()


def test_there_are_blocks_to_run():
    assert len(BLOCKS) == 6


class Module(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val/acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(4)

    val_dataloader = test_dataloader = train_dataloader


def test_the_callback_in_ten_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0].replace("max_epochs=10,", "max_epochs=2, accelerator='cpu', enable_progress_bar=False,")
    scope = {"module": Module(), "datamodule": Data(), "MyModule": Module}
    exec(code, scope)
    assert type(scope["module"]) is Module
    assert len(code.strip().splitlines()) <= 14


def test_the_settings_exist():
    scope: dict = {"lq": lq}
    exec("callback = " + BLOCKS[1], scope)
    assert scope["callback"].spec.bits == 3


def test_plain_pytorch():
    scope = {"model": small_cnn(), "images": torch.randn(16, 3, 9, 9), "classes": torch.randint(4, (16,))}
    exec(BLOCKS[2], scope)
    assert not any("quantizer" in name for name, _ in scope["model"].named_parameters())
    assert scope["loss"].item() < 1.5


def test_the_search_runs_as_it_stands(capsys):
    model, weight = small_cnn(), torch.randn(6, 3, 3, 3)
    scope = {"model": model, "weight": weight, "batches": [torch.randn(8, 3, 9, 9)]}
    exec(BLOCKS[3], scope)
    assert "layers quantized" in capsys.readouterr().out
    lq.search(small_cnn(), scope["batches"], dataclasses.replace(scope["better"], reconstruct=2), progress=False)


def test_the_deployment_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Classifier({"name": "cifar_resnet8"})
    quantized(module, (3, 32, 32), bits=4)
    scope = {"module": module, "lq": lq}
    exec(BLOCKS[4], scope)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scope["network"](x), module(x))
    assert torch.equal(scope["integers"](x).argmax(1), module(x).argmax(1))


def test_files_and_commands_that_it_names_exist():
    root = Path(__file__).parents[2]
    headings = {line.lstrip("# ").lower().replace(" ", "-") for line in re.findall(r"(?m)^#+ .*$", TEXT)}
    for target in re.findall(r"\]\(([^)h][^)]*)\)", TEXT):
        assert target[1:] in headings if target.startswith("#") else (root / target).exists(), target
    for recipe in re.findall(r"recipes=(\w+)", TEXT):
        assert recipe == "mine" or (root / "recipes" / f"{recipe}.yaml").is_file()


def test_the_float_network_teaches():
    scope: dict = {"lq": lq}
    exec("callback = " + BLOCKS[5], scope)
    assert scope["callback"].student == "model"
    assert lq.testing.check_quantizer(lq.spec.LayerSpec(quantizer="lsq")) is None
