"""Run the command line as a user would, in a process of its own."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[2]
QUICK = [
    "pretrain_epochs=1",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=8",
    "trainer.enable_progress_bar=false",
]


def lq(*arguments: str, cwd: Path, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """``lq`` with arguments, from the package in ``path``; from that of the tests without its long start."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-m", "lq", *arguments]
    if path != ROOT:
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        files = {file.name: str(file) for file in said}
        status = _ask({"arguments": arguments, "cwd": str(cwd), "environment": environment, **files})
        return subprocess.CompletedProcess(command, status, *(file.read_text() for file in said))


def _ask(command: dict[str, Any]) -> int:
    """Exit status of a command that the server has run; one that does not answer is ended and not asked again."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], 500)[0]:
            raise TimeoutError(f"lq {command['arguments']} did not end in 500 s")
        return int(server.stdout.readline())
    except BaseException:
        _server.cache_clear()
        _end(server)
        raise


@cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.helpers.server"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """End it, and a command that it still runs."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def tracked_run(folder: Path, experiment: str) -> tuple[MlflowClient, Run]:
    """The one run of an experiment in the database that lies in a folder."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return client, run
