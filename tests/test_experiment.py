"""The recipes' run, called as the command calls it."""

import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger

import lq
from lq.data import DigitsData
from lq.experiment import Settings, run
from lq.models import create_model
from lq.outcome import Outcome
from lq.runs import tracked


def settings(folder, quantization=True, monitor="val/acc", **changes):
    folder.mkdir(exist_ok=True)
    saver = ModelCheckpoint(folder / "checkpoints", monitor=monitor, mode="max", save_last=True)
    spec = lq.QuantSpec(quantizer="lsq", overrides={"model.layer1.*": {"granularity": "channel"}})
    return Settings(
        model={"name": "cifar_resnet8", "in_chans": 1},
        optimizer={"lr": 0.02},
        quantization=lq.LearnedQuantization(changes.pop("spec", spec), regularizer=None) if quantization else None,
        data=DigitsData(),
        trainer={
            "max_epochs": 2,
            "limit_train_batches": 8,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        loggers=[CSVLogger(folder, name="", version="")],
        callbacks=[saver],
        output_dir=folder,
        **changes,
    )


def logged(folder):
    header, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return {name: [float(row[i]) for row in rows if row[i]] for i, name in enumerate(header)}


def test_a_trial_never_reads_the_test_set(tmp_path):
    outcome = run(settings(tmp_path, test=False))
    metrics = logged(tmp_path)
    assert not {name for name in metrics if "test" in name}
    text = (tmp_path / "outcome.json").read_text()
    assert Outcome.from_json(text) == outcome
    found = json.loads(text)
    assert found["accuracy"] is None
    assert found["float_accuracy"] is None
    assert found["held_out_accuracy"] == outcome.objective == pytest.approx(max(metrics["val/acc"]))


@pytest.mark.parametrize("select", ["best", "last"])
def test_the_float_network_is_fine_tuned_for_comparison(tmp_path, select, capsys):
    outcome = run(settings(tmp_path, quantization=False, select=select))
    assert "Float fine-tuning" in capsys.readouterr().out
    metrics = logged(tmp_path)
    assert not {name for name in metrics if name.startswith("lq/")}
    assert outcome.held_out_accuracy == pytest.approx(
        max(metrics["val/acc"]) if select == "best" else metrics["val/acc"][-1]
    )
    model = create_model("cifar_resnet8", in_chans=1, checkpoint=str(outcome.network)).eval()
    data = DigitsData()
    data.setup("fit")
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    assert metrics["test/acc"] == pytest.approx([right / len(data.test)])
    assert outcome.accuracy == pytest.approx(right / len(data.test))
    assert "network, float" in str(outcome)


def test_mixed_widths_are_found_trained_and_resumed(tmp_path, capsys):
    outcome = run(settings(tmp_path / "one", average_bits=3.5, widths=[2, 3, 4, 8]))
    assert "bits per weight" in capsys.readouterr().out
    assert outcome.size is not None
    assert 3.2 < outcome.size.bits_per_weight < 3.6
    last = str(tmp_path / "one" / "checkpoints" / "last.ckpt")
    again = run(settings(tmp_path / "two", average_bits=3.5, ckpt_path=last))
    assert again.size == outcome.size
    assert again.float_accuracy == outcome.float_accuracy is not None
    pretrained = settings(tmp_path / "three", average_bits=3.5, ckpt_path=last, pretrain_epochs=1)
    assert run(pretrained).float_accuracy is None
    other = lq.QuantSpec(quantizer="lsq", grid="mid_rise", overrides={"model.layer1.*": {"granularity": "channel"}})
    with pytest.raises(ValueError, match="they differ in grid: checkpoint 'auto', callback 'mid_rise'"):
        run(settings(tmp_path / "three", average_bits=3.5, ckpt_path=last, spec=other))


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_resumed_run_distills_from_the_float_network_that_it_trained(tmp_path, precision):
    def trained(folder, epochs, **changes):
        made = settings(folder, pretrain_epochs=1, **changes)
        made.trainer |= {"max_epochs": epochs, "precision": precision}
        made.callbacks.append(lq.SelfDistillation("model"))
        return run(made)

    one = trained(tmp_path / "one", 1)
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    two = trained(tmp_path / "two", 2, ckpt_path=str(last))
    assert two.float_accuracy == one.float_accuracy is not None
    names = [tmp_path / folder / "pretrained.safetensors" for folder in ("one", "two")]
    assert names[0].read_bytes() == names[1].read_bytes()
    names[0].unlink()
    with pytest.raises(ValueError, match="the teacher must be that of the run that is resumed"):
        trained(tmp_path / "three", 2, ckpt_path=str(last))


def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path):
    for changes, message in (
        ({"quantization": False, "average_bits": 3.0}, "average_bits must be None for a float network, got 3.0"),
        (
            {"quantization": False, "registered_model": "x"},
            "registered_model must be None for a float network, got 'x'",
        ),
        ({"test": False, "monitor": "val/loss"}, "test must be true where the best epoch is chosen by 'val/loss'"),
        ({"select": "first"}, "select must be 'best' or 'last', got 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(settings(tmp_path, **changes))
    assert not (tmp_path / "metrics.csv").exists()


def test_globs_are_described_as_text_which_stores_take_for_no_names(tmp_path):
    logger = MLFlowLogger("globs", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with tracked([logger], {"quantizer": {"bits": 2, "overrides": {"model.layer1.*": {"bits": 8}}}}):
        pass
    params = logger.experiment.get_run(logger.run_id).data.params
    assert params == {"quantizer/bits": "2", "quantizer/overrides": "{'model.layer1.*': {'bits': 8}}"}
