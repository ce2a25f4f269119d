import argparse
import csv
import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lq._paths import home
from lq.cli.config import register


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(home() / "benchmarks"))
    monkeypatch.setenv("LQ_HOME", str(home()))
    monkeypatch.setenv("LQ_DATA", "/nowhere")
    register()
    with initialize_config_dir(str(home() / "conf"), version_base="1.3"):
        yield importlib.import_module


def composed(benchmark, change="unchanged", method="soft", network="resnet20_unseen", extras="distill"):
    options = argparse.Namespace(network=network, method=method, bits=2, extras=extras, epochs=1, lr=0.01)
    given = benchmark("ablation").settings(options, change)
    return compose("config", ["output_dir=/tmp/unused", *benchmark("accuracy").overrides(given, method)])


def test_every_change_of_the_ablation_is_one_of_settings_that_exist(benchmark):
    changes = benchmark("ablation").CHANGES
    assert len(changes) >= 30
    plain = composed(benchmark)
    for change in changes:
        config = composed(benchmark, change)
        assert (config == plain) == (change == "unchanged"), change
        assert all(instantiate(part) for part in config.callbacks.values()), change


def test_every_row_of_the_table_is_one_of_settings_that_exist(benchmark):
    table = benchmark("accuracy")
    for network in table.NETWORKS:
        for method in table.METHODS:
            assert composed(benchmark, method=method, network=network).trainer.max_epochs == 1
    for extras in table.EXTRAS:
        assert composed(benchmark, extras=extras).quantizer.bits == 2


class Fits:
    """Takes the place of ``lq train``: writes what a fit leaves behind, or breaks off."""

    def __init__(self, broken):
        self.broken, self.commands = set(broken), []

    def __call__(self, command, check):
        assert check
        self.commands.append(command)
        given = dict(value.split("=", 1) for value in command if "=" in value)
        for seed in given["seed"].split(","):
            own = Path(given["hydra.sweep.dir"]) / seed
            for file in (own / ".hydra" / "config.yaml", own / "checkpoints" / "last.ckpt"):
                file.parent.mkdir(parents=True, exist_ok=True)
                if "ckpt_path" not in given or file.suffix == ".yaml":  # resumed, it breaks off in its first epoch
                    file.write_text(seed)
            if self.broken & {given["quantizer"], seed}:
                raise subprocess.CalledProcessError(1, command)
            outcome = {"held_out_accuracy": 0.9, "accuracy": 0.8, "float_accuracy": 0.95}
            (own / "outcome.json").write_text(json.dumps(outcome))


@pytest.fixture
def table(benchmark, monkeypatch, tmp_path):
    """Called with arguments and what breaks off, gives the commands that ran and how the benchmark ended."""
    module = benchmark("accuracy")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "FITS", tmp_path / "fits")

    def call(*arguments, broken=()):
        trainer = Fits(broken)
        monkeypatch.setattr(subprocess, "run", trainer)
        monkeypatch.setattr("sys.argv", ["accuracy.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            module.main()
        return trainer.commands, ended.value.code

    return call


def test_a_fit_that_fails_keeps_no_other_method_from_its_row(table, capsys):
    _, code = table("--methods", "minmax", "lsq", broken=["minmax"])
    assert code == "fits of minmax did not end: what they printed says why"
    assert "| lsq | 80.00 |" in capsys.readouterr().out


def columns(folder, name):
    with (folder / "accuracy.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_an_interrupted_fit_goes_on_from_its_last_epoch(table, tmp_path, capsys):
    table("--methods", "lsq", "--seeds", "0", "1", broken=["1"])
    assert columns(tmp_path, "seed") == ["0"]
    (own,) = (tmp_path / "fits").glob("*/*")  # of seed 0 nothing is left
    config, checkpoint = own / ".hydra" / "config.yaml", own / "checkpoints" / "last.ckpt"
    for file, seconds in ((config, 100), (checkpoint, 30)):
        os.utime(file, (file.stat().st_mtime - seconds,) * 2)
    table("--methods", "lsq", "--seeds", "1", broken=["1"])
    commands, code = table("--methods", "lsq", "--seeds", "0", "1", "2")
    assert code is None
    assert [[v for v in c if v.startswith(("seed", "ckpt"))] for c in commands] == [
        ["seed=1", f"ckpt_path={checkpoint}"],
        ["seed=2"],
    ]
    assert f"goes on from {checkpoint}" in capsys.readouterr().out
    assert columns(tmp_path, "seed") == ["0", "1", "2"]
    assert columns(tmp_path, "seconds") == ["0", "70", "0"]
    assert not list((tmp_path / "fits").iterdir())
    assert table("--methods", "lsq", "--seeds", "0", "1", "2")[0] == []
