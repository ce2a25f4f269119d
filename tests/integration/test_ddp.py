"""Two processes on the CPU give what training by hand in two processes gives, the same on each rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.ddp_train import MODES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What every mode left, written by one pair of processes, whose start takes longer than all the training."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests/integration/ddp_train.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=550)
    return folder, done


def test_the_processes_end_well(trained):
    assert trained[1].returncode == 0, trained[1].stderr[-3000:]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_training_by_hand(trained, mode):
    folder, done = trained
    files = [folder / f"{mode}-rank{rank}.pt" for rank in (0, 1)]
    assert all(file.is_file() for file in files), done.stderr[-3000:]
    first, second = (torch.load(file, weights_only=True) for file in files)
    for part in ("callback", "buffers", "by_hand"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), f"{part} {name} differs between ranks"
    for name, value in first["callback"].items():
        torch.testing.assert_close(value, first["by_hand"][name.replace("net.", "", 1)], atol=2e-5, rtol=1e-4, msg=name)
    assert first["alignment"][0] == first["alignment"][1]
    assert first["step"].item() == (4 if mode in ("accumulation-clipping", "manual") else 8)
