import importlib.util
import re
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

for path in sys.argv[1:]:
    network, x = lq.load(path), torch.randn(1, 3, 32, 32)
    program = to_edge_transform_and_lower(torch.export.export(network, (x,))).to_executorch()
    result = Runtime.get().load_program(program.buffer).load_method("forward").execute([x])[0]
    print("largest difference", float((result - network(x)).abs().max()))
"""


@pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="needs pip install 'lq[executorch]'")
def test_stored_networks_lower_to_executorch_and_run_there(tmp_path):
    paths = []
    for quantizer in ("soft", "subset"):
        spec = {"bits": 4, "granularity": "channel", "quantizer": quantizer}
        model = quantized(create_model("cifar_resnet8"), (3, 32, 32), **spec)
        path = tmp_path / f"{quantizer}.lq.safetensors"
        paths.append(str(lq.save(model, path, architecture={"name": "cifar_resnet8"})))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = re.findall(r"largest difference (\S+)", done.stdout)
    assert len(differences) == len(paths)
    assert max(map(float, differences)) < 0.1  # one code at a tie at most
