"""Texts and tables into whatever tracking store a Lightning logger stands for; MLflow first, files elsewhere."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["is_mlflow", "log_rows", "log_text"]


def is_mlflow(logger: Any) -> bool:
    """Whether a logger is Lightning's MLflow logger, told by what it offers and without importing MLflow.

    Args:
        logger: any Lightning logger.

    Returns:
        True for an MLflow logger.
    """
    return hasattr(logger, "run_id") and hasattr(getattr(logger, "experiment", None), "log_artifact")


def log_text(loggers: Iterable[Any], name: str, text: str) -> None:
    """Store a text as an artifact of the run: in MLflow, in TensorBoard, else as a file in the logger's folder.

    Args:
        loggers: Lightning loggers.
        name: file name with folders, for example "lq/swap_report.txt".
        text: the text.
    """
    for logger in loggers:
        if is_mlflow(logger):
            logger.experiment.log_text(logger.run_id, text, name)
        elif hasattr(getattr(logger, "experiment", None), "add_text"):
            logger.experiment.add_text(name, f"<pre>{text}</pre>")
        elif getattr(logger, "log_dir", None):
            path = Path(logger.log_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")


def log_rows(loggers: Iterable[Any], name: str, rows: list[dict[str, Any]]) -> None:
    """Store rows as a table that the MLflow UI shows and compares; other loggers have none.

    Args:
        loggers: Lightning loggers.
        name: file name ending in ".json".
        rows: one dictionary per row, all with the same keys.
    """
    for logger in loggers:
        if is_mlflow(logger):
            columns = {key: [row[key] for row in rows] for key in rows[0]}
            logger.experiment.log_table(logger.run_id, columns, name)
