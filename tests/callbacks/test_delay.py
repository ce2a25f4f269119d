import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

import lq
from lq.calibration import uncalibrated_layers
from lq.nn import named_quantized_layers
from tests.helpers.modules import Plain, fit, loader, small_cnn
from tests.integration.test_resume import run, same_runs

SHAPE = (3, 8, 8)


def module():
    torch.manual_seed(0)
    return Plain(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9))


class Inputs(Callback):
    """Counts the layers whose input is in float, on every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(len(uncalibrated_layers(pl_module)))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("quantizer", ["minmax", "lsq", "lsq_plus", "qn", "nulsq"])
def test_inputs_stay_in_float_until_their_time(quantizer, first):
    delay, seen = lq.DelayedActivations(until=0.4), Inputs()
    quantization = lq.LearnedQuantization(bits=3, quantizer=quantizer, calibration_batches=2)
    callbacks = [delay, quantization] if first else [quantization, delay]
    trainer = fit(module(), [*callbacks, seen], loader(10, shape=SHAPE))
    layers = named_quantized_layers(trainer.lightning_module)
    assert seen.seen == [len(layers)] * 4 + [0] * 6
    x = torch.randn(4, *SHAPE)
    assert not torch.equal(trainer.lightning_module.net[0].input_quantizer.eval()(x), x)


@pytest.mark.parametrize("after", [0, 1])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, after):
    def whole(folder, ckpt_path=None):
        saver = ModelCheckpoint(folder, save_top_k=-1, every_n_epochs=1, filename="{epoch}")
        callbacks = [lq.LearnedQuantization(bits=3, calibration_batches=2), lq.DelayedActivations(until=0.5), saver]
        return run(folder, module(), callbacks, ckpt_path, data=loader(shape=SHAPE), epochs=3)

    first = whole(tmp_path / "first")
    same_runs(first, whole(tmp_path / "second", str(tmp_path / "first" / f"epoch={after}.ckpt")))


def test_the_best_of_float_activations_is_forgotten(tmp_path):
    class Falls(Plain):
        def on_train_epoch_end(self):
            self.log("score", 1.0 / (1 + self.current_epoch))

    torch.manual_seed(0)
    net = Falls(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    saver = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}", save_on_train_epoch_end=True)
    callbacks = [lq.LearnedQuantization(bits=3, calibration_batches=2), lq.DelayedActivations(until=0.5), saver]
    run(tmp_path, net, callbacks, None, data=loader(4, shape=SHAPE), epochs=4)
    assert "epoch=2" in saver.best_model_path


@pytest.mark.parametrize(("until", "steps"), [(0.95, 10), (0.7, 3), (0.5, 1)])
def test_the_last_step_is_quantized_at_the_latest(until, steps):
    seen = Inputs()
    quantization = lq.LearnedQuantization(bits=3, calibration_batches=1)
    fit(module(), [quantization, lq.DelayedActivations(until=until), seen], loader(steps, shape=SHAPE))
    assert seen.seen[-1] == 0
    assert seen.seen[:-1] == [4] * (steps - 1)


def test_a_fit_that_ends_before_its_time_is_named():
    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.should_stop = True

    quantization = lq.LearnedQuantization(bits=3, calibration_batches=1)
    with pytest.warns(UserWarning, match="the fit ended after 1 steps, before activations were quantized"):
        fit(module(), [quantization, lq.DelayedActivations(), Stops()], loader(10, shape=SHAPE))


@pytest.mark.parametrize(("until", "longer"), [(0.5, 8), (0.3, 14)])
def test_activations_that_are_quantized_stay_so_in_a_longer_fit(tmp_path, until, longer):
    def trained(folder, epochs, ckpt_path=None):
        seen, saver = Inputs(), ModelCheckpoint(folder, save_last=True)
        quantization = lq.LearnedQuantization(bits=3, calibration_batches=2)
        callbacks = [quantization, lq.DelayedActivations(until=until), seen, saver]
        run(folder, module(), callbacks, ckpt_path, data=loader(4, shape=SHAPE), epochs=epochs)
        return seen.seen

    assert trained(tmp_path / "first", 4)[-1] == 0
    assert set(trained(tmp_path / "second", longer, tmp_path / "first" / "last.ckpt")) == {0}


def test_the_last_step_of_a_resumed_fit_is_no_earlier(tmp_path):
    def trained(folder, ckpt_path=None):
        seen, saver = Inputs(), ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        quantization = lq.LearnedQuantization(bits=3, calibration_batches=2)
        callbacks = [quantization, lq.DelayedActivations(until=0.99), seen, saver]
        run(folder, module(), callbacks, ckpt_path, data=loader(5, shape=SHAPE), epochs=2)
        return seen.seen

    assert trained(tmp_path / "first") == [4] * 9 + [0]
    assert trained(tmp_path / "second", tmp_path / "first" / "epoch=0.ckpt") == [4] * 4 + [0]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="until must lie between 0 and 1, got 1"):
        lq.DelayedActivations(until=1)
    with pytest.raises(ValueError, match="calibration_batches must be an integer of at least 1, got 0"):
        lq.DelayedActivations(calibration_batches=0)
    for averaging in EMAWeightAveraging(), StochasticWeightAveraging(1e-3):
        callbacks = [lq.LearnedQuantization(bits=3, calibration_batches=2), averaging, lq.DelayedActivations()]
        with pytest.raises(ValueError, match="DelayedActivations cannot change averaged networks"):
            fit(module(), callbacks, loader(4, shape=SHAPE))
    callbacks = [lq.LearnedQuantization(bits=3, calibration_batches=2), lq.DelayedActivations(), lq.ProgressiveBits()]
    with pytest.raises(ValueError, match="DelayedActivations must come after ProgressiveBits"):
        fit(module(), callbacks, loader(4, shape=SHAPE))
