import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger

import lq
from lq.flavour import PackedModel, log_packed_model
from lq.models import create_model
from tests.helpers.quantized import quantized

INPUT = {"shape": [3, 16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    model = quantized(create_model("cifar_resnet8"), (3, 16, 16), bits=4)
    path = lq.save(model, folder / "net.lq.safetensors", architecture={"name": "cifar_resnet8"}, input=INPUT)
    logger = MLFlowLogger("models", tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", artifact_location=folder.as_uri())
    log_packed_model([logger], path, registered_name="small")
    return folder, model, path


def test_a_packed_model_normalises_and_predicts(logged):
    _, model, path = logged
    x = np.random.default_rng(0).random((3, 3, 16, 16), dtype=np.float32)
    mean, std = (torch.tensor(INPUT[k]).reshape(-1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = model((torch.from_numpy(x) - mean) / std).numpy()
    np.testing.assert_array_equal(PackedModel(path).predict(x), expected)


def test_the_registered_model_runs_from_the_packed_file_alone_in_a_fresh_process(logged):
    folder, _, path = logged
    code = (
        "import mlflow, numpy, sys; mlflow.set_tracking_uri(sys.argv[1]); "
        "model = mlflow.pyfunc.load_model('models:/small/1'); "
        "x = numpy.linspace(0, 1, 768, dtype=numpy.float32).reshape(1, 3, 16, 16); "
        "print(model.predict(x).tolist())"
    )
    command = [sys.executable, "-c", code, f"sqlite:///{folder / 'mlflow.db'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    x = np.linspace(0, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)
    printed = np.array(json.loads(done.stdout.strip().splitlines()[-1]))
    np.testing.assert_allclose(printed, PackedModel(path).predict(x), rtol=1e-5, atol=1e-5)


def test_a_real_server_serves_the_packed_model(logged):
    folder, _, path = logged
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/small/1", "--env-manager", "local"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    x = np.linspace(0, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)
    body = json.dumps({"inputs": x.tolist()}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"})
    log = (folder / "serve.log").open("w")
    server = subprocess.Popen(
        [*serve, "--port", str(port)], env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True
    )
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    served = np.array(json.load(answer)["predictions"])
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (folder / "serve.log").read_text()
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        log.close()
    np.testing.assert_allclose(served, PackedModel(path).predict(x), rtol=1e-5, atol=1e-5)


def test_no_pickle_is_stored(logged):
    folder, _, _ = logged
    stored = {p.name for p in folder.rglob("*") if p.is_file() and p.name != "mlflow.db"}
    assert "net.lq.safetensors" in stored
    assert not any(name.endswith((".pkl", ".pickle", ".pt", ".pth")) for name in stored)
