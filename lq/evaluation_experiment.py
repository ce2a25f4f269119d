"""A tracked run that compares deployed networks on the test images of a DataModule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule

from lq.deployed import Deployed
from lq.evaluation import EvaluationReport, evaluate
from lq.runs import store_files, tracked
from lq.tracking import log_rows, log_text
from lq.tracking.evaluation_figure import evaluation_figure

__all__ = ["EvaluationSettings", "run_evaluation"]


@dataclass(frozen=True)
class EvaluationSettings:
    """What to compare, on what.

    Args:
        networks: opened.
        data: set up; its test images are shown to all.
        images: how many; None for all.
        loggers: of Lightning, where figures go.
        description: parameters of the tracked run.
    """

    networks: Sequence[Deployed]
    data: LightningDataModule
    images: int | None = None
    loggers: Sequence[Any] = ()
    description: Mapping[str, Any] | None = None


def run_evaluation(settings: EvaluationSettings) -> EvaluationReport:
    """Run, compare and log.

    Args:
        settings: what to compare.

    Returns:
        The figures.
    """
    with tracked(settings.loggers, settings.description):
        report = evaluate(settings.networks, settings.data.test_dataloader(), images=settings.images)
        rows = report.to_dicts()
        for logger in settings.loggers:
            for i, row in enumerate(rows):
                numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
                logger.log_metrics({f"network_{i + 1}/{name}": value for name, value in numbers.items()})
        log_text(settings.loggers, "lq/evaluation.txt", str(report))
        log_rows(settings.loggers, "lq/evaluation.json", rows)
        store_files(settings.loggers, [], {"evaluation.png": evaluation_figure(rows)})
    return report
