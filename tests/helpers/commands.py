"""Run the command line as a user would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
QUICK = [
    "pretrain_epochs=1",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=8",
    "trainer.enable_progress_bar=false",
]


def lq(*arguments: str, cwd: Path, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """``lq`` with arguments, from the package in ``path``."""
    return subprocess.run(
        [sys.executable, "-m", "lq", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def tracked_run(folder: Path, experiment: str) -> tuple[MlflowClient, Run]:
    """The one run of an experiment in the database that lies in a folder."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return client, run
