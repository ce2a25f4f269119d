"""What the runs of recipes share: a described, finalized tracking run, a Trainer, a test, stored files and figures."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningDataModule, Trainer

from lq.classifier import Classifier
from lq.tracking import is_mlflow

__all__ = ["RunSettings", "input_of", "make_trainer", "score", "store_files", "tracked"]


class RunSettings(Protocol):
    """What every run's settings have."""

    @property
    def data(self) -> LightningDataModule:
        """The DataModule."""
        ...

    trainer: dict[str, Any]
    loggers: list[Any]
    output_dir: Path


@contextmanager
def tracked(loggers: Sequence[Any], description: Mapping[str, Any] | None) -> Iterator[None]:
    """A run in each tracking store: described at the start, ended as successful or as failed.

    Args:
        loggers: Lightning loggers.
        description: the whole configuration.

    Yields:
        Nothing.
    """
    description = dict(description or {})
    for logger in loggers:
        logger.log_hyperparams(_nameable(description))
        if is_mlflow(logger):
            logger.experiment.log_dict(logger.run_id, description, "config.yaml")
    try:
        yield
    except BaseException:
        for logger in loggers:
            logger.finalize("failed")
        raise
    for logger in loggers:
        logger.finalize("success")


def _nameable(value: Any) -> Any:
    """The same, with mappings as text whose keys (globs, say) tracking stores do not take for names."""
    if not isinstance(value, Mapping):
        return value
    if not all(re.fullmatch(r"[\w.\- ]+", str(key)) for key in value):
        return str(dict(value))
    return {key: _nameable(part) for key, part in value.items()}


def make_trainer(settings: RunSettings, callbacks: Sequence[Callback] = (), **changes: Any) -> Trainer:
    """The Trainer of a stage.

    Args:
        settings: of the run.
        callbacks: of the stage.
        **changes: arguments of the Trainer that differ in this stage.

    Returns:
        The Trainer.
    """
    arguments: dict[str, Any] = {
        **settings.trainer,
        "logger": settings.loggers,
        "callbacks": list(callbacks),
        "default_root_dir": settings.output_dir,
        "enable_autolog_hparams": False,  # the run is described once, by its configuration
        **changes,
    }
    return Trainer(**arguments)


def input_of(data: LightningDataModule) -> dict[str, Any]:
    """What a network that was trained on these data takes, for its artifact.

    Args:
        data: set up for testing or fitting.

    Returns:
        Shape of one image, and mean and std by which pixels from 0 to 1 are normalised, as far as the data say so.
    """
    dataset = next((getattr(data, n) for n in ("test", "val", "train") if getattr(data, n, None) is not None), None)
    found: dict[str, Any] = {"shape": list(dataset[0][0].shape)} if dataset is not None else {}
    for name in ("mean", "std"):
        values = getattr(data, name, None)
        found |= {} if values is None else {name: [float(v) for v in values]}
    return found


def score(settings: RunSettings, classifier: Classifier, prefix: str, *callbacks: Callback) -> tuple[float, Trainer]:
    """Score on the test set.

    Args:
        settings: of the run.
        classifier: what to score.
        prefix: of the logged names.
        *callbacks: of the Trainer.

    Returns:
        The accuracy, from 0 to 1, and the Trainer that found it.
    """
    classifier.prefix = prefix
    trainer = make_trainer(settings, callbacks, enable_checkpointing=False)
    results = trainer.test(classifier, settings.data, verbose=False)
    classifier.prefix = ""
    return results[0][f"{prefix}test/acc"], trainer


def store_files(loggers: Sequence[Any], paths: Sequence[Path], figures: Mapping[str, Any]) -> None:
    """Store what a run made where the tracking store keeps artifacts, under "lq/".

    Args:
        loggers: Lightning loggers; those without artifacts are passed over.
        paths: files.
        figures: Matplotlib figures by file name.
    """
    for logger in filter(is_mlflow, loggers):
        store, run_id = logger.experiment, logger.run_id
        for path in paths:
            store.log_artifact(run_id, str(path), "lq")
        for name, figure in figures.items():
            store.log_figure(run_id, figure, f"lq/{name}")
