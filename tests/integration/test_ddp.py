"""Two processes on the CPU give what training by hand in two processes gives, the same on each rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["plain", "accumulation-clipping", "manual", "compiled", "rounded", "distilled"])
def test_two_processes_equal_training_by_hand(tmp_path, mode):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "tests/integration/ddp_train.py"), str(tmp_path), mode]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in ("callback", "buffers", "by_hand"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), f"{part} {name} differs between ranks"
    for name, value in first["callback"].items():
        torch.testing.assert_close(value, first["by_hand"][name.replace("net.", "", 1)], atol=2e-5, rtol=1e-4, msg=name)
    assert first["alignment"][0] == first["alignment"][1]
    assert first["step"].item() == (4 if mode in ("accumulation-clipping", "manual") else 8)
