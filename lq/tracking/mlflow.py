"""MLflow as it should come out of the box: sqlite beside the work, artifacts beside it, nested runs in a sweep."""

import logging
import os
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger

__all__ = ["PARENT_RUN", "default_tracking_uri", "mlflow_logger", "ui_command"]

PARENT_RUN = "LQ_PARENT_RUN_ID"


def default_tracking_uri() -> str:
    """Where runs go unless told otherwise: MLFLOW_TRACKING_URI, else sqlite in the working directory.

    Returns:
        The URI; a bare ``mlflow ui`` started in the same directory opens it.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def artifact_location(tracking_uri: str) -> str | None:
    """Folder beside a sqlite store, so that it does not depend on where the first run was started.

    Args:
        tracking_uri: of the store.

    Returns:
        A file URI, or None where a server decides.
    """
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return (Path(tracking_uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def mlflow_logger(
    experiment: str = "lq", run_name: str | None = None, tracking_uri: str | None = None, log_model: bool = False
) -> MLFlowLogger:
    """Lightning's MLflow logger with defaults that work without a server.

    Args:
        experiment: name of the experiment; runs are compared within one.
        run_name: name of the run; null lets MLflow make one up.
        tracking_uri: of the store; null takes MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working directory.
        log_model: whether to store the best checkpoint as an artifact.

    Returns:
        The logger; it creates the run when first used, nested under the sweep's run if there is one.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri or default_tracking_uri()
    parent = os.environ.get(PARENT_RUN)
    return MLFlowLogger(
        experiment_name=experiment,
        run_name=run_name,
        tracking_uri=uri,
        tags={"mlflow.parentRunId": parent} if parent else None,
        log_model=log_model,
        artifact_location=artifact_location(uri),
    )


def ui_command(tracking_uri: str) -> str:
    """Shell command that opens the UI on a store.

    Args:
        tracking_uri: of the store.

    Returns:
        The command, or the address of the server.

    >>> ui_command("sqlite:////tmp/somewhere/mlflow.db")
    'mlflow ui --backend-store-uri sqlite:////tmp/somewhere/mlflow.db'
    """
    if tracking_uri.startswith("http"):
        return tracking_uri
    if tracking_uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}":
        return "mlflow ui"
    return f"mlflow ui --backend-store-uri {tracking_uri}"
