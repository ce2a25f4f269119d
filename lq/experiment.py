"""The recipes' run, from a float network to a quantized, tracked, stored one."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from lq.callbacks import LearnedQuantization
from lq.checkpoints import load_from_checkpoint
from lq.classifier import Classifier
from lq.exporting import load, save
from lq.flavour import log_packed_model
from lq.network import NetworkSize, network_size
from lq.runs import input_of, make_trainer, score, store_files, tracked
from lq.surgery import make_plan
from lq.text import format_table
from lq.tracking import log_text, metric, network_metrics
from lq.tracking.figures import alignment_figure, weights_figure

__all__ = ["Outcome", "Settings", "run"]

NETWORK = "network.lq.safetensors"
_say = rank_zero_only(print)


@dataclass
class Settings:
    """Everything a run needs, built.

    Args:
        model: arguments of `lq.models.create_model`.
        optimizer: arguments of `lq.classifier.Classifier` but model and prefix.
        quantization: the callback.
        data: the DataModule.
        trainer: arguments of the Trainer of the quantized stage.
        loggers: Lightning loggers.
        callbacks: further callbacks of the quantized stage, a ModelCheckpoint among them.
        output_dir: folder for checkpoints and codes.
        seed: of everything that is random.
        pretrain_epochs: float epochs before quantization; 0 where model.checkpoint holds a float network.
        pretrain_lr: learning rate of those.
        select: which network is stored: "best" by the monitored metric, or "last".
        ckpt_path: checkpoint to resume the quantized stage from.
        registered_model: name under which MLflow registers the packed network; None registers none.
        description: the whole configuration, for the tracking store.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    quantization: LearnedQuantization
    data: LightningDataModule
    trainer: dict[str, Any]
    loggers: list[Any]
    callbacks: list[Callback]
    output_dir: Path
    seed: int = 0
    pretrain_epochs: int = 0
    pretrain_lr: float = 0.1
    select: str = "best"
    ckpt_path: str | None = None
    registered_model: str | None = None
    description: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """Figures of a finished run.

    Args:
        float_accuracy: of the float network on the test set; None after a resume.
        quantized_accuracy: of the hard quantized network on the test set.
        alignment: of its weights.
        size: of its weights.
        network: the packed network, for `lq.load`.
    """

    float_accuracy: float | None
    quantized_accuracy: float
    alignment: float
    size: NetworkSize
    network: Path

    def __str__(self) -> str:
        """A short table."""
        size = self.size
        ratio = size.float_bytes / size.packed_bytes
        rows = [
            ("test accuracy, float", "-" if self.float_accuracy is None else f"{self.float_accuracy:.2%}"),
            ("test accuracy, quantized", f"{self.quantized_accuracy:.2%}"),
            ("weights, float", f"{size.float_bytes:,} bytes"),
            (
                "weights, quantized",
                f"{size.packed_bytes:,} bytes ({size.bits_per_weight:.2f} bits each, 1/{ratio:.1f})",
            ),
            ("alignment", f"{self.alignment:.3f}"),
            ("network, packed", str(self.network)),
        ]
        return format_table(("result", "value"), rows)


def run(settings: Settings) -> Outcome:
    """Train float if asked, quantize, fine-tune, test, store, and log all of it.

    Args:
        settings: what to do.

    Returns:
        The figures.

    Raises:
        ValueError: for settings that cannot work, before anything is written to a tracking store.
    """
    if settings.select not in ("best", "last"):
        raise ValueError(f"select must be 'best' or 'last', got {settings.select!r}: choose one of those")
    seed_everything(settings.seed, workers=True, verbose=False)
    classifier = Classifier(settings.model, **settings.optimizer)
    make_plan(classifier, settings.quantization.spec)
    settings.data.prepare_data()
    with tracked(settings.loggers, settings.description):
        return _run(settings, classifier)


def _run(settings: Settings, classifier: Classifier) -> Outcome:
    float_accuracy = None
    if settings.ckpt_path is None:
        float_accuracy = _float_stage(settings, classifier)
    seed_everything(settings.seed, workers=True, verbose=False)
    trainer = make_trainer(settings, [settings.quantization, *settings.callbacks])
    _say("Quantization-aware training")
    trainer.fit(classifier, settings.data, ckpt_path=settings.ckpt_path, weights_only=True)
    stored = _stored(settings, trainer, classifier)
    network = settings.output_dir / NETWORK
    # packed weights lie on their levels: how well training aligned them is seen before
    alignment, size = network_metrics(stored, layers=False)[metric("alignment")], network_size(stored)
    figures = {}
    if trainer.is_global_zero:
        figures = {"weights.png": weights_figure(stored), "alignment.png": alignment_figure(stored)}
        save(stored, network, input=input_of(settings.data), metrics=_monitored(settings, trainer))
    trainer.strategy.barrier()
    stored.model = load(network)  # what is scored is what ships
    accuracy, _ = score(settings, stored, "")
    outcome = Outcome(float_accuracy, accuracy, alignment, size, network)
    if trainer.is_global_zero:
        store_files(settings.loggers, [network], figures)
        log_text(settings.loggers, "lq/outcome.txt", str(outcome))
        if settings.registered_model:
            log_packed_model(settings.loggers, network, registered_name=settings.registered_model)
    return outcome


def _float_stage(settings: Settings, classifier: Classifier) -> float:
    if settings.pretrain_epochs:
        classifier.prefix, peak = "float/", classifier.settings["lr"]
        classifier.settings["lr"] = settings.pretrain_lr
        _say("Float pre-training")
        trainer = make_trainer(settings, max_epochs=settings.pretrain_epochs, enable_checkpointing=False)
        trainer.fit(classifier, settings.data)
        classifier.prefix, classifier.settings["lr"] = "", peak
    return score(settings, classifier, "float/")[0]


def _checkpoint(settings: Settings, trainer: Trainer) -> ModelCheckpoint | None:
    """What chose the network that is stored, None where the last one is."""
    found = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
    return found if settings.select == "best" and found is not None and found.best_model_path else None


def _monitored(settings: Settings, trainer: Trainer) -> dict[str, float]:
    """The metric by which the network was chosen."""
    checkpoint = _checkpoint(settings, trainer)
    if checkpoint is None or checkpoint.monitor is None or checkpoint.best_model_score is None:
        return {}
    return {checkpoint.monitor: float(checkpoint.best_model_score)}


def _stored(settings: Settings, trainer: Trainer, classifier: Classifier) -> Classifier:
    checkpoint = _checkpoint(settings, trainer)
    if checkpoint is None:
        return copy.deepcopy(classifier).eval()
    return load_from_checkpoint(Classifier, checkpoint.best_model_path, map_location="cpu")
