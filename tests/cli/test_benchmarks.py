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
    # what a method sets and what a network sets are lists side by side: each is composed once, not each pair
    for method in table.METHODS:
        assert composed(benchmark, method=method).trainer.max_epochs == 1
    for network in table.NETWORKS:
        assert composed(benchmark, network=network).trainer.max_epochs == 1
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
    assert not begun(tmp_path)
    assert table("--methods", "lsq", "--seeds", "0", "1", "2")[0] == []


def begun(folder):
    """Configurations and seeds of fits that are kept."""
    return sorted(path.parent.name for path in (folder / "fits").glob("*/*/checkpoints"))


def test_a_fit_of_one_seed_keeps_what_others_have_begun(table, tmp_path):
    table("--methods", "lsq", "--seeds", "0", "1", broken=["0", "1"])
    assert begun(tmp_path) == ["0"]  # a sweep ends with the first that fails
    table("--methods", "lsq", "--seeds", "2")
    assert (begun(tmp_path), columns(tmp_path, "seed")) == (["0"], ["2"])
    commands, _ = table("--methods", "lsq", "--seeds", "0", "0")
    assert len(commands) == 1
    assert any(value.startswith("ckpt_path=") for value in commands[0])
    assert (begun(tmp_path), columns(tmp_path, "seed")) == ([], ["2", "0"])


def test_a_fit_goes_on_under_its_own_settings_alone(table, benchmark, monkeypatch, tmp_path):
    table("--methods", "lsq", broken=["lsq"])
    monkeypatch.setitem(benchmark("accuracy").METHODS, "lsq", ["quantizer=lsq", "quantizer.grid=full_range"])
    commands, _ = table("--methods", "lsq")
    assert not any(value.startswith("ckpt_path=") for value in commands[0])


def test_a_seed_is_fitted_by_one_process_at_a_time(table, benchmark, tmp_path):
    table("--methods", "lsq", "--seeds", "1", broken=["1"])
    (own,) = (tmp_path / "fits").glob("*/1")
    folder = own.parent
    with benchmark("accuracy_fits").FileLock(f"{folder}.1.lock"):
        commands, code = table("--methods", "lsq", "--seeds", "1")
    assert commands == []
    assert code.startswith(f"another process is at seed 1 in {folder}: wait for it")
    assert table("--methods", "lsq", "--seeds", "1")[1] is None


def test_a_row_is_added_once_and_never_to_a_broken_file(table, benchmark, tmp_path, capsys):
    table("--methods", "lsq")
    path, rows = tmp_path / "accuracy.csv", benchmark("accuracy_rows")
    whole = path.read_bytes()
    (row,) = rows.rows_of(path)
    rows.append(path, row)
    assert path.read_bytes() == whole
    assert "has a row of resnet20, 2, lsq" in capsys.readouterr().out
    path.write_bytes(whole[:-10])
    commands, code = table("--methods", "lsq", "--seeds", "1")
    assert (commands, path.read_bytes()) == ([], whole[:-10])
    assert "ends in the midst of a row, 'resnet20,2,lsq" in code
    path.write_text("")
    assert "must begin with the line 'network,bits," in table("--methods", "lsq", "--seeds", "1")[1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--epochs", "0"], "--epochs: must be above 0, got 0"),
        (["--lr", "-1"], "--lr: must be above 0, got -1"),
        (["--lr", "nan"], "--lr: must be above 0, got nan"),
        (["--epochs", "two"], "--epochs: invalid int value: 'two'"),
        (["--bits", "1"], "--bits: invalid choice: 1"),
        (["--set", "optimizer.lr=1"], "--set: optimizer.lr is given by --lr, got 'optimizer.lr=1'"),
        (["--set", "test=false"], "--set: test is given by --trial, got 'test=false'"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(table, capsys, arguments, word):
    commands, code = table("--methods", "lsq", *arguments)
    assert (commands, code) == ([], 2)
    assert word in capsys.readouterr().err
