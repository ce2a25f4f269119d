"""The recipes' post-training run, from a float network to a searched, tracked, stored one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lq.checkpoints import checkpoint_entry
from lq.classifier import Classifier
from lq.data import ImageData
from lq.exporting import save
from lq.flavour import log_packed_model
from lq.network import NetworkSize, network_size
from lq.point_search import SearchReport, search
from lq.runs import input_of, make_trainer, score, store_files, tracked
from lq.search_spec import SearchSpec
from lq.text import format_table
from lq.tracking import log_rows, log_text, network_metrics
from lq.tracking.search_figures import accuracy_figure, loss_figure, points_figure

__all__ = ["SearchOutcome", "SearchSettings", "run_search"]

PACKED, NETWORK = "network.lq.safetensors", "network.ckpt"


@dataclass
class SearchSettings:
    """Everything a search run needs, built.

    Args:
        model: arguments of `lq.models.create_model`.
        spec: what the search does.
        data: the DataModule.
        trainer: arguments of the Trainer that tests, and trains the float network where asked.
        loggers: Lightning loggers.
        output_dir: folder for the network, the packed one, and what is kept of an interrupted search.
        seed: of everything that is random.
        calibration_images: training images that the search may look at.
        calibration_batch_size: images per batch of those.
        pretrain_epochs: float epochs first; 0 where model.checkpoint holds a float network.
        pretrain_lr: learning rate of those.
        registered_model: name under which MLflow registers the packed network; None registers none.
        description: the whole configuration, for the tracking store.
    """

    model: dict[str, Any]
    spec: SearchSpec
    data: ImageData
    trainer: dict[str, Any]
    loggers: list[Any]
    output_dir: Path
    seed: int = 0
    calibration_images: int = 512
    calibration_batch_size: int = 64
    pretrain_epochs: int = 0
    pretrain_lr: float = 0.1
    registered_model: str | None = None
    description: dict[str, Any] | None = None


@dataclass(frozen=True)
class SearchOutcome:
    """Figures of a finished search.

    Args:
        report: layer by layer.
        float_accuracy: of the float network on the test set.
        quantized_accuracy: of the searched network on the test set.
        size: of its weights.
        packed: the packed network, for `lq.load`.
        network: checkpoint for `lq.load_from_checkpoint`.
    """

    report: SearchReport
    float_accuracy: float
    quantized_accuracy: float
    size: NetworkSize
    packed: Path
    network: Path

    def __str__(self) -> str:
        """A short table."""
        size = self.size
        rows = [
            ("test accuracy, float", f"{self.float_accuracy:.2%}"),
            ("test accuracy, searched", f"{self.quantized_accuracy:.2%}"),
            ("weights, float", f"{size.float_bytes:,} bytes"),
            ("weights, searched", f"{size.packed_bytes:,} bytes ({size.bits_per_weight:.2f} bits each)"),
            ("seconds of search", f"{self.report.seconds:.1f}"),
            ("network, packed", str(self.packed)),
            ("network", str(self.network)),
        ]
        return format_table(("result", "value"), rows)


class _Entry(Callback):
    """Writes into a checkpoint what its quantized layers are."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lq"] = self.entry


def run_search(settings: SearchSettings) -> SearchOutcome:
    """Test the float network, search, test again, store, and log all of it.

    Args:
        settings: what to do.

    Returns:
        The figures.

    Raises:
        ValueError: for a Trainer with several devices.
    """
    if (size := make_trainer(settings).world_size) > 1:
        raise ValueError(f"trainer.devices must be 1, got {size}: a search runs on one device, leave it out")
    seed_everything(settings.seed, workers=True, verbose=False)
    classifier = Classifier(settings.model, lr=settings.pretrain_lr)
    settings.data.prepare_data()
    settings.data.setup("fit")
    with tracked(settings.loggers, settings.description):
        return _run(settings, classifier)


def _run(settings: SearchSettings, classifier: Classifier) -> SearchOutcome:
    if settings.pretrain_epochs:
        classifier.prefix = "float/"
        print("Float pre-training")
        trainer = make_trainer(settings, max_epochs=settings.pretrain_epochs, enable_checkpointing=False)
        trainer.fit(classifier, settings.data)
    float_accuracy, trainer = score(settings, classifier, "float/")
    device = trainer.strategy.root_device
    drawn = settings.data.calibration_batches(settings.calibration_images, settings.calibration_batch_size)
    batches = [tuple(part.to(device) for part in batch) for batch in drawn]
    classifier.to(device)
    report = search(classifier.model, batches, settings.spec, folder=settings.output_dir / "search")
    accuracy, trainer = score(settings, classifier, "", _Entry(checkpoint_entry(classifier, settings.spec)))
    network = settings.output_dir / NETWORK
    trainer.save_checkpoint(network)
    metrics = {"test/acc": accuracy}
    packed = save(classifier, settings.output_dir / PACKED, input=input_of(settings.data), metrics=metrics)
    outcome = SearchOutcome(report, float_accuracy, accuracy, network_size(classifier), packed, network)
    for logger in settings.loggers:
        logger.log_metrics(network_metrics(classifier))
    log_text(settings.loggers, "lq/search_report.txt", str(report))
    log_text(settings.loggers, "lq/outcome.txt", str(outcome))
    if settings.registered_model:
        log_packed_model(settings.loggers, packed, registered_name=settings.registered_model)
    log_rows(settings.loggers, "lq/search_report.json", report.to_dicts())
    figures = {
        "points.png": points_figure(classifier),
        "loss.png": loss_figure(report),
        "accuracy.png": accuracy_figure(float_accuracy, accuracy),
    }
    store_files(settings.loggers, [packed, network], figures)
    return outcome
