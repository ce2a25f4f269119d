import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers in every test, no store or sweep inherited from the shell, no process group left over."""
    _forget_stores()
    torch.manual_seed(0)
    yield
    _forget_stores()  # what MLflow leaves there is gone before the next module's fixtures
    assert not torch.distributed.is_initialized(), "a test left its process group behind"


def _forget_stores() -> None:
    for name in ("MLFLOW_TRACKING_URI", "LQ_PARENT_RUN_ID"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data and float checkpoints."""
    root = os.environ.get("LQ_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("LQ_DATA is not set to the folder of real data")
    return Path(root)
