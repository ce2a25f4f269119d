"""The main job, and a sweep of it, as a user runs them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from torchmetrics.classification import MulticlassAccuracy

import lq as package
from lq.classifier import Classifier
from lq.cli.compare import compare
from lq.data import DigitsData
from lq.exporting import read_header
from lq.nn import named_quantized_layers
from tests.helpers.commands import QUICK, lq, tracked_run

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One quick run of the default recipe."""
    folder = tmp_path_factory.mktemp("run")
    done = lq("train", *QUICK, "output_dir=out", "registered_model=digits", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_table_says_what_was_promised(finished):
    _, out = finished
    for what in (r"float +\d+\.\d\d%", r"quantized +\d+\.\d\d%", r"weights, float +298,048 bytes", r"37,680 bytes"):
        assert re.search(what, out), what
    aligned = re.search(r"alignment +(-?\d\.\d+)", out)
    assert aligned is not None
    assert float(aligned[1]) < 0.999  # of the weights as they were trained: the packed ones lie on their levels
    assert out.rstrip().endswith("mlflow ui")


def test_the_figures_are_there_for_programs(finished):
    folder, out = finished
    found = json.loads((folder / "out" / "outcome.json").read_text())
    assert f"{found['accuracy']:.2%}" in out
    assert f"{found['held_out_accuracy']:.2%}" in out
    assert found["size"]["packed_bytes"] == 37680
    assert found["network"] == "out/network.lq.safetensors"


def test_the_run_is_tracked_beside_the_work(finished):
    folder, _ = finished
    client, run = tracked_run(folder, "digits")
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.artifact_location == (folder / "mlartifacts").as_uri()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "cifar_resnet8 soft W4A4"
    assert {"float/test/acc", "test/acc", "val/acc", "lq/alignment", "lq/slope", "lq/loss_total"} <= set(
        run.data.metrics
    )
    assert "lq/sqnr_db/model.layer1.0.conv1" in run.data.metrics
    assert run.data.params["quantizer/bits"] == "4"
    files = {f.path for f in client.list_artifacts(run.info.run_id, "lq")}
    pictures = {"lq/weights.png", "lq/alignment.png"}
    assert (
        files == {"lq/swap_report.txt", "lq/swap_report.json", "lq/outcome.txt", "lq/network.lq.safetensors"} | pictures
    )


def test_the_packed_file_is_the_best_network_and_scores_what_was_logged(finished):
    folder, _ = finished
    best = next((folder / "out" / "checkpoints").glob("epoch*.ckpt"))
    module = package.load_from_checkpoint(Classifier, best)
    packed = package.load(folder / "out" / "network.lq.safetensors")
    for path, layer in named_quantized_layers(packed).items():
        assert torch.equal(layer.weight, module.model.get_submodule(path).quantized_weight())
    header = read_header(folder / "out" / "network.lq.safetensors")[1]
    assert header["input"]["shape"] == [1, 8, 8]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert [v.version for v in client.search_model_versions("name='digits'")] in ([1], ["1"])
    data = DigitsData()
    data.setup("fit")
    accuracy = MulticlassAccuracy(10, average="micro")
    with torch.no_grad():
        for x, y in data.val_dataloader():
            accuracy.update(packed(x), y)
    assert float(accuracy.compute()) == header["metrics"]["val/acc"]


def test_a_run_resumes_from_its_last_checkpoint(finished):
    folder, first = finished
    last = folder / "out" / "checkpoints" / "last.ckpt"
    longer = [q for q in QUICK if "max_epochs" not in q]
    done = lq(
        "train", *longer, "trainer.max_epochs=2", f"ckpt_path={last}", "logger=csv", "output_dir=more", cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    floats = [re.search(r"test accuracy, float +(\d+\.\d+%)", out) for out in (first, done.stdout)]
    assert floats[0]
    assert floats[1]
    assert floats[0][1] == floats[1][1]  # the first has stored it


def test_a_sweep_on_two_devices_leaves_one_run_and_one_file_per_job(tmp_path):
    mine = tmp_path / "own folder" / "recipes" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndefaults: [digits]\nquantizer:\n  bits: 3\n")
    several = ["trainer.devices=2", "trainer.strategy=ddp", "pretrain_epochs=0", "output_dir=out/${hydra:job.num}"]
    own = ["--config-dir", str(mine.parents[1]), "recipes=mine", "seed=3,4", "hydra.sweep.dir=a sweep"]
    done = lq("train", "-m", *own, *QUICK, *several, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test accuracy, quantized") == 2
    for job in "01":
        layers = named_quantized_layers(package.load(tmp_path / "out" / job / "network.lq.safetensors"))
        assert [layer.weight_quantizer.codes.bits for layer in layers.values()] == [8, *[3] * 6, 8]
        assert {path.name for path in (tmp_path / "a sweep" / job).iterdir()} >= {".hydra", "train.log"}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    (sweep,) = [run for run in runs if run.data.tags.get("lq.sweep")]
    assert "output_dir=out/${hydra:job.num}" in sweep.info.run_name
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    assert {run.data.params["trainer/devices"] for run in nested} == {"2"}
    assert {run.data.params["seed"] for run in nested} == {"3", "4"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quantizer.bits=12", "bits must be an integer from 2 to 8, got 12"),
        ("quantizer.exclude=[head]", "exclude glob must match a layer, got 'head'"),
        ("model.name=resnet1", "model.name must be a timm model, got 'resnet1'"),
        ("model.checkpoint=none.safetensors", "model.checkpoint must be a file of weights"),
        ("select=first", "select must be 'best' or 'last', got 'first'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_tracked(tmp_path, override, message):
    done = lq("train", *QUICK, override, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "mlflow.db").exists() or not MlflowClient(
        f"sqlite:///{tmp_path / 'mlflow.db'}"
    ).search_experiments(filter_string="name = 'digits'")


def test_commands_and_their_help(tmp_path):
    assert "{train,search,export,evaluate,inspect,compare,quantizers}" in lq(cwd=tmp_path).stdout
    unknown = lq("trian", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "inspect, compare or quantizers, got 'trian'" in unknown.stderr
    assert "side by side" in lq("compare", "--help", cwd=tmp_path).stdout
    assert "lq evaluate files=[FILE,...]" in lq("evaluate", "--help", cwd=tmp_path).stdout


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of four jobs."""
    folder = tmp_path_factory.mktemp("sweep")
    done = lq("train", "-m", "quantizer=soft,lsq", "quantizer.bits=2,3", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_compare_prints_the_runs_of_the_sweep(sweep):
    done = lq("compare", "--sweep", "last", cwd=sweep)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert [row.split("  ")[0] for row in rows[2:6]] == [
        f"cifar_resnet8 {method} W{bits}A{bits}" for method in ("soft", "lsq") for bits in (2, 3)
    ]
    assert "quantizer=soft quantizer.bits=2 " in rows[2]
    assert "pretrain_epochs" not in done.stdout
    wrong = lq("compare", "--experiment", "digit", cwd=sweep)
    assert wrong.returncode == 2
    assert "experiment must be one of" in wrong.stderr
    unknown = lq("compare", "--sweep", "none", cwd=sweep)
    assert unknown.returncode == 2
    assert re.search(r"sweep must be one of \['\w+'\], or last, got 'none'", unknown.stderr)


def test_compare_reads_all_pages(sweep, monkeypatch):
    whole, search = compare(f"sqlite:///{sweep / 'mlflow.db'}", sweep="last"), MlflowClient.search_runs
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *a, **k: search(*a, **k, max_results=2))
    assert compare(f"sqlite:///{sweep / 'mlflow.db'}", sweep="last") == whole


@contextmanager
def mlflow_server(folder: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "art"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        [*command, *stores],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None, "the server died"
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def server(sweep):
    with mlflow_server(sweep) as address:
        yield address


def test_a_real_server_has_one_parent_with_a_nested_run_per_job(server):
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags.get("lq.sweep")]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == 4 == len(runs) - 1
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {(run.data.params["quantizer/quantizer"], run.data.params["quantizer/bits"]) for run in children} == {
        (method, bits) for method in ("soft", "lsq") for bits in ("2", "3")
    }
    assert len(client.get_metric_history(children[0].info.run_id, "lq/slope")) >= 1


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs a browser at /usr/bin/chromium")
def test_a_real_browser_shows_the_runs_by_name(server):
    from playwright.sync_api import sync_playwright

    experiment = MlflowClient(server).get_experiment_by_name("digits")
    assert experiment is not None
    with sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.add_init_script(
            "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
            "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
        )
        flat = "orderByKey=metrics.%60test/acc%60&orderByAsc=false"  # sorted by a metric, jobs are not folded away
        page.goto(f"{server}/#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&{flat}")
        page.get_by_text("cifar_resnet8 soft W2A2").first.wait_for(timeout=60_000)
        for name in ("cifar_resnet8 soft W3A3", "cifar_resnet8 lsq W2A2", "cifar_resnet8 lsq W3A3"):
            assert page.get_by_text(name).count() >= 1, name
        browser.close()


def test_a_failed_job_is_marked_and_the_others_run(tmp_path):
    done = lq("train", "-m", "quantizer.bits=12,2", *QUICK, cwd=tmp_path)
    assert done.returncode != 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    status = {run.info.run_name: run.info.status for run in runs}
    assert status.pop("cifar_resnet8 soft W2A2") == "FINISHED"
    assert list(status.values()) == ["FAILED"]  # the parent; the bad job left no run behind
