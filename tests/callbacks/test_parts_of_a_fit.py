"""What part of a fit is over, however it ends, goes on or steps, and what waits for a better metric meanwhile."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

import lq
from tests.callbacks.test_progressive import QUANTIZATION, SHAPE, Widths, middle, module
from tests.helpers.modules import Plain, fit, loader, small_cnn
from tests.integration.test_resume import run

FORWARD = {"calibration_forward": lambda m, batch: m.net(batch[0])}


class Monitored(Plain):
    """Logs a metric of its epochs."""

    scores = (3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0)  # the last width is worse than the first and does not improve

    def on_train_epoch_end(self):
        self.log("score", self.scores[self.current_epoch])


def test_what_waits_for_a_better_metric_begins_anew_with_each_width():
    torch.manual_seed(0)
    monitored, progress = Monitored(small_cnn()), lq.ProgressiveBits([8, 4], until=0.5)
    stopping = EarlyStopping("score", mode="max", patience=3, check_on_train_epoch_end=True, min_delta=0.0)
    quantization = lq.LearnedQuantization(**QUANTIZATION, hold=lq.HoldOnPlateau("score", mode="max", patience=9))
    with pytest.warns(UserWarning, match="HoldOnPlateau"):  # has no validation
        trainer = fit(monitored, [quantization, progress, stopping], loader(2, shape=SHAPE), epochs=8)
    assert trainer.current_epoch == 8  # a best of 3.0 would have stopped it in the fourth epoch
    assert stopping.best_score == 1.0
    assert progress.stage == 2


def test_the_plateau_of_another_width_holds_no_slope():
    class Validated(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("score", 9.0 if self.current_epoch == 0 else 1.0 + self.current_epoch)

        def val_dataloader(self):
            return loader(1, shape=SHAPE)

    torch.manual_seed(0)
    network = Validated(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    quantization = lq.LearnedQuantization(**QUANTIZATION, hold=lq.HoldOnPlateau("score", mode="max", patience=1))
    callbacks = [quantization, lq.ProgressiveBits([4], until=0.25)]
    fit(network, callbacks, loader(2, shape=SHAPE), epochs=4)
    assert quantization.annealing.held_at is None


def test_a_longer_fit_does_not_go_back_to_more_bits(tmp_path):
    def trained(folder, epochs, ckpt_path=None):
        widths, saver = Widths(f"net.{path}"), ModelCheckpoint(folder, save_last=True)
        callbacks = [lq.LearnedQuantization(**QUANTIZATION), lq.ProgressiveBits([8, 4]), widths, saver]
        run(folder, module(), callbacks, ckpt_path, data=loader(4, shape=SHAPE), epochs=epochs)
        return [bits for bits, *_ in widths.seen]

    probe = module().net
    lq.quantize_model(probe, lq.QuantSpec(bits=2))
    path = middle(probe)
    assert trained(tmp_path / "first", 2) == [8] * 2 + [4] * 2 + [2] * 4
    assert trained(tmp_path / "second", 8, tmp_path / "first" / "last.ckpt") == [2] * 24


class ByHand(Plain):
    """Steps its optimizer itself, once in so many batches."""

    every = 4

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 4}])
def test_parts_of_the_fit_are_known_where_a_module_steps_its_optimizer_itself(limits):
    torch.manual_seed(0)
    by_hand = ByHand(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    progress, delay = lq.ProgressiveBits([8, 4], until=0.5), lq.DelayedActivations(until=0.5)
    freezing, seen = lq.IterativeFreezing(), Widths("net.3")
    quantization = lq.LearnedQuantization(
        **QUANTIZATION,
        first_last_bits=None,
        regularizer=None,
        calibration_forward=lambda m, batch: m.net(batch[0]),
        anneal_steps=4,
    )
    fit(by_hand, [quantization, progress, delay, freezing, seen], loader(8, shape=SHAPE), **limits)
    assert [bits for bits, *_ in seen.seen] == [8] * 4 + [4] * 4 + [2] * 8
    assert delay.switched
    assert (freezing.step, freezing.part) == (4, 1.0)


def test_a_slope_that_never_arrives_is_reported():
    torch.manual_seed(0)
    by_hand = ByHand(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    quantization = lq.LearnedQuantization(**QUANTIZATION, **FORWARD)
    with pytest.warns(UserWarning, match=r"after 2 optimizer steps, before anneal_steps \(step 6\) and strength_start"):
        fit(by_hand, [quantization], loader(8, shape=SHAPE))


def test_a_regularizer_that_never_began_is_reported():
    torch.manual_seed(0)
    by_hand = ByHand(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    with pytest.warns(UserWarning, match=r"after 2 optimizer steps, before strength_start \(step 7\): this module"):
        fit(by_hand, [lq.LearnedQuantization(**QUANTIZATION, anneal_steps=2, **FORWARD)], loader(8, shape=SHAPE))


def test_a_trainer_that_goes_on_begins_anew_with_the_epochs_that_are_left():
    quantization, progress = lq.LearnedQuantization(**QUANTIZATION), lq.ProgressiveBits([8, 4], until=0.5)
    delay, widths, network = lq.DelayedActivations(until=0.5), Widths("net.3"), module()
    trainer = fit(network, [quantization, progress, delay, widths], loader(4, shape=SHAPE), epochs=1)
    assert (quantization.annealing.step, quantization.annealing.steps) == (4, 3)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(network, loader(4, shape=SHAPE))
    assert [bits for bits, *_ in widths.seen] == [8, 4, 2, 2] + [8] * 2 + [4] * 2 + [2] * 4
    assert (quantization.annealing.step, quantization.annealing.steps) == (8, 6)
    assert (progress.part, delay.switched) == (1.0, True)


def test_a_scheduler_that_waits_and_a_stop_that_was_asked_for_begin_anew_too():
    class Schedules(Monitored):
        scores = (3.0, 1.0, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "score"}}

    torch.manual_seed(0)
    stopping = EarlyStopping("score", mode="max", patience=3, check_on_train_epoch_end=True)
    callbacks = [lq.LearnedQuantization(**QUANTIZATION), lq.ProgressiveBits([4], until=0.5), stopping]
    trainer = fit(Schedules(small_cnn()), callbacks, loader(2, shape=SHAPE), epochs=8, min_epochs=5)
    assert trainer.current_epoch == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.02


def test_a_fit_that_ends_before_the_last_stage_is_named():
    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.should_stop = True

    callbacks = [lq.LearnedQuantization(**QUANTIZATION), lq.ProgressiveBits(), Stops()]
    with pytest.warns(UserWarning, match="the fit ended after 1 steps, before its last stage: weights have 8 bits"):
        fit(module(), callbacks, loader(10, shape=SHAPE))


def test_batches_that_are_skipped_are_no_steps():
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    freezing, quantization = lq.IterativeFreezing(), lq.LearnedQuantization(**QUANTIZATION)
    fit(Skips(small_cnn()), [quantization, freezing], loader(8, shape=SHAPE))
    assert freezing.step == quantization.annealing.step == 4
