"""The configuration of ``lq train``: its schema, and how it becomes objects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import MISSING, DictConfig, OmegaConf

from lq.bit_allocation import WIDTHS
from lq.callbacks import AnnealSpec, LearnedQuantization
from lq.classifier import Classifier
from lq.cli.fields import doc
from lq.cli.schema import schema
from lq.data import CIFAR10Data, DigitsData, ImageFolderData, ImagePackData
from lq.experiment import Settings
from lq.models import create_model
from lq.spec import QuantSpec
from lq.tracking.mlflow import mlflow_logger

__all__ = ["GROUPS", "TrainConfig", "build", "given_overrides", "named_loggers", "register"]


@dataclass
class TrainConfig:
    """Fields of the top level; every group is a field of its own."""

    model: Any = MISSING
    data: Any = MISSING
    optimizer: Any = MISSING
    quantizer: Any = None
    schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: dict[str, Any] = field(default_factory=dict)
    experiment: str = doc("name under which the tracking store groups runs.", "lq")
    seed: int = doc("of everything that is random.", 0)
    average_bits: float | None = doc(
        "mean bits per weight under which every layer gets a width by what it loses; null gives all quantizer.bits.",
        None,
    )
    widths: list[int] = doc("that average_bits chooses from.", list(WIDTHS))
    pretrain_epochs: int = doc("float epochs before quantization; 0 where model.checkpoint is a float network.", 0)
    pretrain_lr: float = doc("peak learning rate of those.", 0.1)
    select: str = doc('which network is stored: "best" on the held-out images, or "last".', "best")
    test: bool = doc("whether to score on the test set; false for trials that choose between settings.", True)
    ckpt_path: str | None = doc("checkpoint to resume the quantized stage from.", None)
    registered_model: str | None = doc("name under which MLflow registers the packed network; null for none.", None)
    output_dir: str = doc("folder for checkpoints, logs and codes.", MISSING)


GROUPS: dict[str, dict[str, type[Any]]] = {
    "model": {"schema": schema(create_model, instantiate=False)},
    "data": {
        "schema_digits": schema(DigitsData),
        "schema_cifar10": schema(CIFAR10Data),
        "schema_imagefolder": schema(ImageFolderData),
        "schema_imagepack": schema(ImagePackData),
    },
    "optimizer": {"schema": schema(Classifier, instantiate=False, skip=("model", "prefix"))},
    "quantizer": {"schema": schema(QuantSpec, instantiate=False)},
    "schedule": {"schema": schema(AnnealSpec, instantiate=False)},
    "trainer": {
        "schema": schema(Trainer, instantiate=False, skip=("logger", "callbacks", "default_root_dir")),
    },
    "logger": {"schema_mlflow": schema(mlflow_logger), "schema_csv": schema(CSVLogger)},
}


def register() -> None:
    """Make the schemas known to Hydra under the names that ``conf/`` refers to."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    for group, options in GROUPS.items():
        for name, node in options.items():
            store.store(group=group, name=name, node=node)


def build(config: DictConfig) -> Settings:
    """Build everything a run needs.

    Args:
        config: composed by Hydra.

    Returns:
        Settings for `lq.experiment.run`.

    Raises:
        ValueError: for a bad value, naming the field, the values allowed and the fix.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    if not _quantized(plain):
        plain["quantizer"] = None
    quantization = None
    if plain["quantizer"] is not None:
        anneal = instantiate(config.schedule, _convert_="all")
        quantization = LearnedQuantization(QuantSpec.from_dict(plain["quantizer"]), AnnealSpec(**anneal))
    return Settings(
        model=plain["model"],
        optimizer=plain["optimizer"],
        quantization=quantization,
        data=instantiate(config.data),
        trainer=plain["trainer"],
        loggers=named_loggers(config, run_name(plain)),
        callbacks=_callbacks(config.callbacks),
        output_dir=Path(config.output_dir),
        description={**plain, "overrides": given_overrides()},
        **{
            name: plain[name]
            for name in (
                "seed",
                "average_bits",
                "widths",
                "pretrain_epochs",
                "pretrain_lr",
                "select",
                "test",
                "ckpt_path",
                "registered_model",
            )
        },
    )


def _callbacks(nodes: Any) -> list[Any]:
    """Make them; settings without a class are of one that nobody asked for."""
    for name, node in nodes.items():
        if node and "_target_" not in node:
            raise ValueError(
                f"callbacks.{name} must be a callback, got {OmegaConf.to_container(node)} without a class: choose a "
                "group that has one, such as callbacks=distill or callbacks=teacher for distillation, or give "
                f"+callbacks.{name}._target_"
            )
    missing = sorted(OmegaConf.missing_keys(nodes))
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, got nothing: write {missing[0]}=...")
    return [instantiate(node) for node in nodes.values() if node]


def run_name(plain: dict[str, Any]) -> str:
    """Name by which a person tells runs apart.

    Args:
        plain: the configuration.

    Returns:
        Network, method and widths, such as "resnet18 soft W4A4".
    """
    if not _quantized(plain):
        return f"{plain['model']['name']} float"
    spec = QuantSpec.from_dict(plain["quantizer"])
    return f"{plain['model']['name']} {spec.quantizer} {spec.widths}"


def _quantized(plain: dict[str, Any]) -> bool:
    # a name, since a recipe that sets one field of the quantizer would make a null a whole quantizer again
    return plain["quantizer"] is not None and plain["quantizer"].get("quantizer") != "none"


def named_loggers(config: DictConfig, name: str) -> list[Any]:
    """The logger of a run, named so that a person tells runs apart.

    Args:
        config: composed by Hydra.
        name: of the run, where the configuration gives none.

    Returns:
        None or one Lightning logger, in a list.
    """
    unnamed = "run_name" in config.logger and not config.logger.run_name
    logger = instantiate(config.logger, **({"run_name": name} if unnamed else {}))
    return [logger] if logger else []


def given_overrides() -> str:
    """What was overridden on the command line, as one line."""
    return " ".join(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ""
