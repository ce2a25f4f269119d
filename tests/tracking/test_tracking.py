import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import lq
from lq.text import format_table
from lq.tracking import is_mlflow, log_rows, log_text
from lq.tracking.figures import alignment_figure, weights_figure
from lq.tracking.mlflow import default_tracking_uri, mlflow_logger, ui_command


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    lq.quantize_model(model, lq.QuantSpec(bits=3))
    return model


def test_texts_and_tables_reach_each_kind_of_store(tmp_path):
    mlflow = mlflow_logger("texts", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    loggers = [mlflow, CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    assert [is_mlflow(logger) for logger in loggers] == [True, False, False]
    log_text(loggers, "lq/note.txt", "hello")
    log_rows(loggers, "lq/rows.json", [{"a": 1, "b": "x"}, {"a": None, "b": "y"}])
    stored = {f.path for f in mlflow.experiment.list_artifacts(mlflow.run_id, "lq")}
    assert stored == {"lq/note.txt", "lq/rows.json"}
    assert next((tmp_path / "csv").rglob("note.txt")).read_text() == "hello\n"
    assert list((tmp_path / "board").rglob("events*"))


def test_runs_nest_under_the_sweep_that_the_environment_names(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    parent = mlflow_logger("nest", tracking_uri=uri)
    monkeypatch.setenv("LQ_PARENT_RUN_ID", parent.run_id)
    child = mlflow_logger("nest", tracking_uri=uri)
    assert child.experiment.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_where_runs_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert ui_command(default_tracking_uri()) == "mlflow ui"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert default_tracking_uri() == "http://tracking:5000" == ui_command(default_tracking_uri())


def test_figures_show_every_layer(model):
    figure = weights_figure(model)
    assert [axes.get_title() for axes in figure.axes] == ["0 (8 bits)", "1 (3 bits)", "2 (8 bits)"]
    assert len(figure.axes[1].lines) == 8
    assert len(weights_figure(model, most=2).axes) == 2
    bars = alignment_figure(model).axes[0].patches
    assert len(bars) == 3


def test_tables():
    text = format_table(["a", "long title"], [[1, 0.123456], [22, None], [3, 19248.0]])
    assert text.splitlines() == [
        " a  long title",
        "--  ----------",
        " 1      0.1235",
        "22           -",
        " 3       19248",
    ]


def test_an_empty_table_keeps_its_head():
    assert format_table(["a"], []) == "a\n-"
