import argparse
import importlib
import json
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
    return compose("config", ["output_dir=/tmp/unused", *benchmark("accuracy").overrides(given, method, [0])])


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


def test_a_fit_that_fails_keeps_no_other_method_from_its_row(benchmark, monkeypatch, tmp_path, capsys):
    table = benchmark("accuracy")

    def train(command, check):
        if "quantizer=minmax" in command:
            raise table.subprocess.CalledProcessError(1, command)
        folder = next(value for value in command if value.startswith("hydra.sweep.dir=")).split("=")[1]
        (Path(folder) / "0").mkdir()
        outcome = {"held_out_accuracy": 0.9, "accuracy": 0.8, "float_accuracy": 0.95}
        (Path(folder) / "0" / "outcome.json").write_text(json.dumps(outcome))

    monkeypatch.setattr(table.subprocess, "run", train)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["accuracy.py", "--methods", "minmax", "lsq"])
    with pytest.raises(SystemExit, match="fits of minmax did not end"):
        table.main()
    assert "| lsq | 80.00 |" in capsys.readouterr().out
    assert table.unfinished([]) is None
