import os
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lq._paths import home
from lq.callbacks import HoldAtAlignment, SelfDistillation
from lq.cli.config import GROUPS, build, register
from lq.cli.help import help_text
from lq.cli.job import needs_own_processes
from lq.cli.schema import argument_docs
from lq.cli.search_config import SEARCH_GROUPS, build_search, register_search
from lq.experiment import run
from lq.models.cifar_resnet import cifar_resnet20
from lq.spec import QuantSpec

GROUP_OPTIONS = sorted((p.parent.name, p.stem) for p in (home() / "conf").glob("*/*.yaml"))
SEARCH = "search_config"
RECIPES = sorted(p.stem for p in (home() / "recipes").glob("*.yaml"))
REQUIRED = {
    "data=cifar10": ["data.root=/nowhere"],
    "data=imagefolder": ["data.root=/nowhere"],
    "data=imagepack": ["data.path=/nowhere"],
    "recipes=search_imagenet_timm": ["data.root=/nowhere"],
    "recipes=imagenet_timm": ["data.root=/nowhere"],
    "callbacks=teacher": [
        "callbacks.distillation.teacher.name=cifar_resnet56",
        "callbacks.distillation.teacher.checkpoint=null",
    ],
    "model=timm": ["model.name=resnet18"],
}


@pytest.fixture(autouse=True)
def _hydra(monkeypatch, tmp_path):
    register()
    register_search()
    monkeypatch.setenv("LQ_HOME", str(home()))
    monkeypatch.setenv("LQ_DATA", os.environ.get("LQ_DATA", "/nowhere"))
    with initialize_config_dir(str(home() / "conf"), version_base="1.3"):
        yield


def composed(*overrides, name="config"):
    config = compose(name, ["output_dir=/tmp/unused", *overrides])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return config


def test_there_is_something_to_compose():
    assert len(GROUP_OPTIONS) >= 14
    assert {"digits", "cifar10_resnet20", "imagenet_timm"} <= set(RECIPES)
    assert {group for group, _ in GROUP_OPTIONS} >= set(GROUPS) | set(SEARCH_GROUPS)


@pytest.mark.parametrize(("group", "option"), GROUP_OPTIONS)
def test_every_option_composes(group, option):
    choice = f"{group}={option}"
    for name, groups in (("config", GROUPS), ("search_config", SEARCH_GROUPS)):
        if group in groups or (name == "config" and group != "search"):
            assert group in composed(choice, *REQUIRED.get(choice, []), name=name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_says_what_it_is(recipe):
    name = "search_config" if recipe.startswith("search_") else "config"
    composed(f"recipes={recipe}", *REQUIRED.get(f"recipes={recipe}", []), name=name)
    head = (home() / "recipes" / f"{recipe}.yaml").read_text()
    for part in ("# @package _global_", "# What", "# Data", "# Command", "# Override", "# Cost", "# Result"):
        assert part in head, f"{recipe} lacks {part!r}"


def test_the_default_is_the_digits_recipe():
    assert composed().data._target_ == "lq.data.digits.DigitsData"
    assert composed().quantizer.bits == QuantSpec().bits == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantizer.bit=4", "bit"),
        ("quantizer.bits=four", "bits"),
        ("data.batchsize=4", "batchsize"),
        ("trainer.max_epoch=4", "max_epoch"),
        ("schedule.slope=4", "slope"),
        ("optimizer.lr=fast", "lr"),
        ("nosuch=4", "nosuch"),
        ("quantizer=dorefa", "dorefa"),
    ],
)
def test_unknown_keys_and_wrong_types_are_rejected_by_name(override, message):
    with pytest.raises(Exception, match=message) as caught:
        composed(override)
    assert isinstance(caught.value, ConfigCompositionException) or "hydra" in type(caught.value).__module__


def test_unknown_keys_in_a_recipe_file_are_rejected(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "typo.yaml").write_text("# @package _global_\nquantizer:\n  bitz: 3\n")
    with pytest.raises(Exception, match="bitz"):
        composed("recipes=typo", f"hydra.searchpath=[file://{tmp_path}]")


def test_objects_are_built_from_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = composed(
        "quantizer.bits=3",
        "quantizer.overrides={linear: {bits: 5}}",
        "quantizer.activation_bits=6",
        "schedule.anneal_steps=100",
        "schedule.hold={_target_: lq.callbacks.HoldAtAlignment, threshold: 0.9}",
        "logger=csv",
    )
    settings = build(config)
    assert settings.quantization.spec == QuantSpec(bits=3, activation_bits=6, overrides={"linear": {"bits": 5}})
    assert settings.quantization.anneal.anneal_steps == 100
    assert settings.quantization.anneal.hold == HoldAtAlignment(0.9)
    assert type(settings.data).__name__ == "DigitsData"
    assert [type(c).__name__ for c in settings.callbacks] == ["ModelCheckpoint"]
    assert not list(tmp_path.glob("mlflow*"))


@pytest.mark.parametrize("recipe", [None, *(r for r in RECIPES if not r.startswith("search_"))])
def test_without_a_quantizer_the_network_stays_float_whatever_a_recipe_sets(recipe, monkeypatch):
    chosen = [] if recipe is None else [f"recipes={recipe}", *REQUIRED.get(f"recipes={recipe}", [])]
    monkeypatch.setattr("lq.cli.config.instantiate", lambda node, **_: node)  # data that may not be there
    settings = build(composed("quantizer=none", "quantizer.bits=2", *chosen, "logger=csv"))
    assert settings.quantization is None
    assert settings.description["quantizer"] is None


def test_another_network_teaches(tmp_path):
    larger = cifar_resnet20(in_chans=1)
    save_file(larger.state_dict(), tmp_path / "larger.safetensors")
    teacher = "callbacks.distillation.teacher"
    given = [f"{teacher}.name=cifar_resnet20", f"{teacher}.checkpoint={tmp_path}/larger.safetensors"]
    settings = build(composed("callbacks=teacher", *given, "logger=csv"))
    (distillation,) = [c for c in settings.callbacks if isinstance(c, SelfDistillation)]
    assert torch.equal(distillation.given.conv1.weight, larger.conv1.weight)
    assert settings.model["name"] == "cifar_resnet8"
    with pytest.raises(ValueError, match=r"teacher.checkpoint, .*teacher.name must be given, got nothing: write"):
        build(compose("config", ["callbacks=teacher", "logger=csv", "output_dir=/tmp/unused"]))


def test_a_distillation_weight_without_distillation_is_told_where_there_is_one():
    with pytest.raises(ValueError, match=r"callbacks\.distillation .*{'weight': 2}.*callbacks=distill or"):
        build(composed("+callbacks.distillation.weight=2", "logger=csv"))


def test_the_baseline_comes_without_our_regularizer():
    assert composed("quantizer=lsq").schedule.regularizer is None
    assert composed("quantizer=lsq", "schedule=anneal").schedule.regularizer == "nearest"
    assert composed().schedule.regularizer == "nearest"


def test_bad_values_are_refused_by_what_they_configure():
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 12"):
        build(composed("quantizer.bits=12", "logger=csv"))
    settings = build(composed("quantizer.quantizer=twn", "logger=csv"))
    with pytest.raises(ValueError, match="quantizer must be one of"):
        run(settings)


def test_help_has_a_line_for_every_group_and_field():
    text = help_text("train")
    for group, option in GROUP_OPTIONS:
        assert group in text
        assert option in text
    for name in QuantSpec.__dataclass_fields__:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"quantizer.{name} "))
        assert len(line.split(maxsplit=1)[1]) > 15
    assert "trainer.max_epochs" in text
    assert "pretrain_epochs" in text
    for name, default in (("temperature", "default 4.0"), ("teacher.checkpoint", "required")):
        lines = text.split(f"callbacks.distillation.{name} ")[1].splitlines()
        assert default in " ".join(lines[:3])
    assert max(map(len, text.splitlines())) <= 120


def test_argument_docs_join_wrapped_lines_and_inherit():
    docs = argument_docs(QuantSpec)
    assert docs["overrides"].endswith("later globs win.")
    assert docs["activation"].endswith("weight-only quantization.")


def test_a_search_is_built_from_the_configuration():
    settings = build_search(
        composed("search=best", "search.bits=3", "search.candidates=[0.25,0.5,0.75,1]", "logger=csv", name=SEARCH)
    )
    assert settings.spec.bits == 3
    assert settings.spec.candidates == (0.25, 0.5, 0.75, 1.0)
    assert settings.spec.importance == "inputs"
    assert settings.spec.reconstruct > 0
    assert settings.pretrain_epochs == 8
    for override in ("search.bit=3", "search.reconstruct=many", "nosuch=1"):
        with pytest.raises(Exception, match=override.split("=")[0].split(".")[-1]):
            composed(override, name=SEARCH)
    with pytest.raises(ValueError, match="importance must be one of"):
        build_search(composed("search.importance=random", "logger=csv", name=SEARCH))


def test_help_of_search_names_groups_fields_and_recipes():
    text = help_text("search")
    for part in (
        "search.reconstruct ",
        "calibration_images",
        "search_cifar10_resnet20",
        "search.candidates",
        "imagepack",
    ):
        assert part in text, part
    assert "schedule" not in text
    assert "search_" not in help_text("train")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("trainer", "own"),
    [
        (["devices=2"], True),
        (["devices=1", "strategy=ddp"], True),  # else it would leave its address to the jobs after it
        (["devices=1"], False),
    ],
)
def test_jobs_get_processes_of_their_own_where_their_strategy_starts_some(monkeypatch, trainer, own):
    config = composed("trainer.accelerator=cpu", *[f"trainer.{argument}" for argument in trainer])
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.MULTIRUN))
    assert needs_own_processes(config) is own
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.RUN))
    assert not needs_own_processes(config)
