import importlib.util
import subprocess
import sys

import pytest

import lq
from lq.models import create_model
from tests.helpers.quantized import quantized

SCRIPT = """
import sys, torch, lq
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

network, x = lq.load(sys.argv[1]), torch.randn(1, 3, 32, 32)
program = to_edge_transform_and_lower(torch.export.export(network, (x,))).to_executorch()
result = Runtime.get().load_program(program.buffer).load_method("forward").execute([x])[0]
print("largest difference", float((result - network(x)).abs().max()))
"""


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="needs pip install 'lq[executorch]'")
@pytest.mark.parametrize("quantizer", ["soft", "subset"])
def test_a_stored_network_lowers_to_executorch_and_runs_there(tmp_path, quantizer):
    model = quantized(create_model("cifar_resnet8"), (3, 32, 32), bits=4, granularity="channel", quantizer=quantizer)
    path = lq.save(model, tmp_path / "net.lq.safetensors", architecture={"name": "cifar_resnet8"})
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.rsplit(" ", 1)[1]) < 0.1  # one code at a tie at most
