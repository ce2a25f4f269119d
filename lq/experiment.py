"""The recipes' run, from a float network to a quantized, tracked, stored one."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, load_model, save_model

from lq.bit_allocation import WIDTHS, allocate_bits
from lq.callbacks import LearnedQuantization
from lq.checkpoints import checkpoint_spec, load_from_checkpoint
from lq.classifier import Classifier
from lq.exporting import load, save
from lq.files import write_whole
from lq.flavour import log_packed_model
from lq.network import network_size
from lq.outcome import Outcome
from lq.runs import input_of, make_trainer, score, store_files, tracked
from lq.surgery import make_plan
from lq.tracking import log_text, metric, network_metrics
from lq.tracking.figures import alignment_figure, weights_figure

__all__ = ["Settings", "run"]

NETWORK = "network.lq.safetensors"
FLOAT_NETWORK = "network.safetensors"
PRETRAINED = "pretrained.safetensors"
_CALIBRATION_IMAGES = 256
_Stored = tuple[dict[str, Any], dict[str, Any]]
_say = rank_zero_only(print)


@dataclass
class Settings:
    """Everything a run needs, built.

    Args:
        model: arguments of `lq.models.create_model`.
        optimizer: arguments of `lq.classifier.Classifier` but model and prefix.
        quantization: the callback; None fine-tunes the float network, for comparison.
        data: the DataModule.
        trainer: arguments of the Trainer of the quantized stage.
        loggers: Lightning loggers.
        callbacks: further callbacks of the quantized stage, a ModelCheckpoint among them.
        output_dir: folder for checkpoints and codes.
        seed: of everything that is random.
        average_bits: mean width of a weight, for which `lq.allocate_bits` finds the width of every layer; None gives
            all the spec's. A resumed run takes the widths of its checkpoint.
        widths: that it chooses from.
        pretrain_epochs: float epochs before quantization; 0 where model.checkpoint holds a float network. A resumed
            run takes the float network that was stored beside its checkpoint.
        pretrain_lr: learning rate of those.
        select: which network is stored: "best" by the monitored metric, or "last".
        test: whether to score on the test set; trials that choose between settings go without.
        ckpt_path: checkpoint to resume the quantized stage from.
        registered_model: name under which MLflow registers the packed network; None registers none.
        description: the whole configuration, for the tracking store.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    quantization: LearnedQuantization | None
    data: LightningDataModule
    trainer: dict[str, Any]
    loggers: list[Any]
    callbacks: list[Callback]
    output_dir: Path
    seed: int = 0
    average_bits: float | None = None
    widths: Sequence[int] = WIDTHS
    pretrain_epochs: int = 0
    pretrain_lr: float = 0.1
    select: str = "best"
    test: bool = True
    ckpt_path: str | None = None
    registered_model: str | None = None
    description: dict[str, Any] | None = None


def run(settings: Settings) -> Outcome:
    """Train float if asked, quantize, fine-tune, test, store, and log all of it.

    Args:
        settings: what to do.

    Returns:
        The figures.

    Raises:
        ValueError: for settings that cannot work, before anything is written to a tracking store.
    """
    _check(settings)
    seed_everything(settings.seed, workers=True, verbose=False)
    classifier = Classifier(settings.model, **settings.optimizer)
    if settings.quantization is not None:
        make_plan(classifier, settings.quantization.spec)
    settings.data.prepare_data()
    with tracked(settings.loggers, settings.description):
        return _run(settings, classifier)


def _check(settings: Settings) -> None:
    if settings.select not in ("best", "last"):
        raise ValueError(f"select must be 'best' or 'last', got {settings.select!r}: choose one of those")
    if settings.quantization is None:
        for name in ("average_bits", "registered_model"):
            if (value := getattr(settings, name)) is not None:
                raise ValueError(f"{name} must be None for a float network, got {value!r}: leave it out, or quantize")
    monitors = [c.monitor for c in settings.callbacks if isinstance(c, ModelCheckpoint)]
    if not settings.test and settings.select == "best" and monitors and monitors[0] != "val/acc":
        raise ValueError(
            f"test must be true where the best epoch is chosen by {monitors[0]!r}, got false: nothing would say "
            "how good it is. Monitor val/acc, or set select=last"
        )


def _run(settings: Settings, classifier: Classifier) -> Outcome:
    float_accuracy, quantization = _float_stage(settings, classifier), settings.quantization
    if quantization is not None and settings.average_bits is not None:
        quantization = _mixed(settings, quantization, classifier, settings.average_bits)
    seed_everything(settings.seed, workers=True, verbose=False)
    trainer = make_trainer(settings, [*([quantization] if quantization else []), *settings.callbacks])
    _say("Quantization-aware training" if quantization else "Float fine-tuning")
    trainer.fit(classifier, settings.data, ckpt_path=settings.ckpt_path, weights_only=True)
    stored = _stored(settings, trainer, classifier)
    store = _store_packed if quantization else _store_float
    figures, packed = store(settings, trainer, stored)
    accuracy = score(settings, stored, "")[0] if settings.test else None
    outcome = Outcome(float_accuracy, accuracy, _held_out(settings, trainer), **packed)
    if trainer.is_global_zero:
        (settings.output_dir / "outcome.json").write_text(outcome.to_json())
        store_files(settings.loggers, [outcome.network] if outcome.network else [], figures)
        log_text(settings.loggers, "lq/outcome.txt", str(outcome))
        if settings.registered_model and outcome.network:
            log_packed_model(settings.loggers, outcome.network, registered_name=settings.registered_model)
    return outcome


def _mixed(
    settings: Settings, quantization: LearnedQuantization, classifier: Classifier, average_bits: float
) -> LearnedQuantization:
    """The callback with a width for every layer."""
    if settings.ckpt_path is not None:
        saved = checkpoint_spec(torch.load(settings.ckpt_path, map_location="cpu", weights_only=True))
        widths = {"overrides": saved.overrides, "first_last_bits": saved.first_last_bits}
        return LearnedQuantization(replace(quantization.spec, **widths), quantization.anneal)
    settings.data.setup("fit")
    batches = settings.data.calibration_batches(_CALIBRATION_IMAGES, held_out=False)  # type: ignore[attr-defined]
    _say("Widths by what each layer loses")
    found = allocate_bits(
        classifier,
        batches,
        quantization.spec,
        average_bits=average_bits,
        widths=settings.widths,
        forward=lambda module, batch: module(batch[0]),
    )
    _say(found)
    log_text(settings.loggers, "lq/allocation.txt", str(found))
    return LearnedQuantization(found.spec, quantization.anneal)


def _store_packed(settings: Settings, trainer: Trainer, stored: Classifier) -> _Stored:
    """Figures to log and fields of the outcome. The packed network replaces the trained one: what is scored ships."""
    network = settings.output_dir / NETWORK
    # packed weights lie on their levels: how well training aligned them is seen before
    alignment, size = network_metrics(stored, layers=False)[metric("alignment")], network_size(stored)
    figures = {}
    if trainer.is_global_zero:
        figures = {"weights.png": weights_figure(stored), "alignment.png": alignment_figure(stored)}
        save(stored, network, input=input_of(settings.data), metrics=_monitored(settings, trainer))
    trainer.strategy.barrier()
    stored.model = load(network)
    return figures, {"alignment": alignment, "size": size, "network": network}


def _store_float(settings: Settings, trainer: Trainer, stored: Classifier) -> _Stored:
    path = settings.output_dir / FLOAT_NETWORK
    _keep(stored, path)
    trainer.strategy.barrier()
    return {}, {"network": path}


def _float_stage(settings: Settings, classifier: Classifier) -> float | None:
    """Accuracy of the float network, trained first where that is asked for; None without a test."""
    if settings.pretrain_epochs and settings.ckpt_path is not None:
        if (stored := _pretrained(settings.ckpt_path)) is None:
            return None  # a run from before it was stored
        dtypes = (tensor.dtype for tensor in load_file(stored).values() if tensor.is_floating_point())
        classifier.model.to(next(dtypes, torch.float32))  # that of trainer.precision: nothing is rounded
        load_model(classifier.model, stored)
    elif settings.pretrain_epochs:
        classifier.prefix, peak = "float/", classifier.settings["lr"]
        classifier.settings["lr"] = settings.pretrain_lr
        _say("Float pre-training")
        trainer = make_trainer(settings, max_epochs=settings.pretrain_epochs, enable_checkpointing=False)
        trainer.fit(classifier, settings.data)
        classifier.prefix, classifier.settings["lr"] = "", peak
    if settings.pretrain_epochs:
        _keep(classifier, settings.output_dir / PRETRAINED)
    return score(settings, classifier, "float/")[0] if settings.test else None


@rank_zero_only
def _keep(classifier: Classifier, path: Path) -> None:
    """Store a float network; a run that is resumed needs the one it began with, where it distills from it."""
    write_whole(path, lambda temporary: save_model(classifier.model, str(temporary)))


def _pretrained(ckpt_path: str) -> Path | None:
    """Where a run that is resumed has stored the float network that it trained first."""
    folder = Path(ckpt_path).parent
    return next((path for path in (folder / PRETRAINED, folder.parent / PRETRAINED) if path.exists()), None)


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


def _held_out(settings: Settings, trainer: Trainer) -> float | None:
    """Accuracy of the stored network on the held-out images."""
    if _checkpoint(settings, trainer) is None:
        found = trainer.callback_metrics.get("val/acc")
        return None if found is None else float(found)
    return _monitored(settings, trainer).get("val/acc")  # of that epoch; unknown where another metric chose it


def _stored(settings: Settings, trainer: Trainer, classifier: Classifier) -> Classifier:
    checkpoint = _checkpoint(settings, trainer)
    if checkpoint is None:
        return copy.deepcopy(classifier).eval()
    if settings.quantization is None:
        return Classifier.load_from_checkpoint(checkpoint.best_model_path, map_location="cpu", weights_only=True)
    return load_from_checkpoint(Classifier, checkpoint.best_model_path, map_location="cpu")
