"""Which batch norms are re-estimated before validation, from which data, and what that leaves alone."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lq
from tests.helpers.modules import TRAINER, Plain, fit, loader, small_cnn

SHAPE = (3, 9, 9)


class Frozen(Plain):
    """Its batch norm stays in evaluation mode; it has a teacher, and a part that no batch reaches."""

    def __init__(self):
        super().__init__(small_cnn())
        self.teacher, self.unused = small_cnn().requires_grad_(False), nn.BatchNorm2d(3)
        for norm in (self.net[1], self.teacher[1], self.unused):
            norm.running_mean.fill_(0.25)
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.net[1].eval()
        self.teacher.eval()
        return self

    def training_step(self, batch, batch_idx):
        self.teacher(batch[0])
        return super().training_step(batch, batch_idx)


def test_frozen_ones_those_of_a_teacher_and_those_that_no_batch_reaches_are_left_alone():
    module = Frozen()
    fit(module, [lq.LearnedQuantization(exclude=["teacher.*"])], loader(shape=SHAPE))
    for norm in (module.net[1], module.teacher[1], module.unused):
        assert norm.running_mean.eq(0.25).all()
        assert norm.num_batches_tracked == 0
    assert module.net[4].num_batches_tracked == 12


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "training_step"])
def test_norms_that_the_module_freezes_in_a_hook_of_its_own_are_left_alone(hook):
    class Freezes(Plain):
        def freeze(self, *args):
            self.net[1].eval()
            return super().training_step(*args) if hook == "training_step" else None

    setattr(Freezes, hook, Freezes.freeze)
    torch.manual_seed(0)
    module = Freezes(small_cnn())
    module.net[1].running_mean.fill_(0.25)
    fit(module, [lq.LearnedQuantization()], loader(shape=SHAPE))
    assert module.net[1].running_mean.eq(0.25).all()
    assert module.net[4].num_batches_tracked == 12


def test_a_module_without_batch_norms_is_not_copied_for_them():
    class Keeps(Plain):
        def training_step(self, batch, batch_idx):
            self.kept = self(batch[0])  # part of a graph: a copy is refused
            return nn.functional.cross_entropy(self.kept, batch[1])

    fit(Keeps(), [lq.LearnedQuantization()])


def test_data_that_can_be_read_once_is_left_to_training():
    def generated():
        yield from loader(shape=SHAPE)

    class Once(Plain):
        def train_dataloader(self):
            return generated()

    callback = lq.LearnedQuantization(anneal_steps=5, calibration_batches=2)
    trainer = Trainer(**TRAINER, max_epochs=1, callbacks=[callback])
    with pytest.warns(UserWarning, match="batch norms keep the statistics of training: generator cannot be copied"):
        trainer.fit(Once(small_cnn()))
    assert trainer.global_step == 10  # calibration has read the rest, with a warning of its own


def test_the_last_checkpoint_holds_them_without_a_validation_loop_too(tmp_path):
    module = Plain(small_cnn())
    callbacks = [lq.LearnedQuantization(), ModelCheckpoint(tmp_path, save_last=True)]
    fit(module, callbacks, loader(shape=SHAPE), enable_checkpointing=True)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["net.1.running_mean"], module.net[1].running_mean)
    assert stored["net.1.num_batches_tracked"] == 12  # re-estimated from the loader, whose batches training saw, too


@pytest.mark.parametrize(
    ("validation", "settings", "stopped"),
    [
        (False, {}, 1),
        (True, {}, 1),
        (True, {"check_val_every_n_epoch": 2, "max_epochs": 3}, 3),
        (True, {"max_steps": 20, "max_epochs": -1}, 2),
        (True, {"val_check_interval": 5}, 1),
        (True, {"limit_val_batches": 0}, 1),
    ],
)
def test_the_last_epoch_ends_with_them_wherever_validation_lies(validation, settings, stopped):
    module = Plain(small_cnn())
    seen = []

    class Watching(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(int(pl_module.net[1].num_batches_tracked))

    callbacks = [lq.LearnedQuantization(reestimate_bn=5), Watching()]
    trainer = Trainer(**{**TRAINER, "max_epochs": 1, "callbacks": callbacks, **settings})
    trainer.fit(module, loader(shape=SHAPE), loader(2, shape=SHAPE) if validation else None)
    assert seen == [5] * stopped


def test_batches_without_a_step_move_statistics_too():
    class Skips(Plain):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx < 8 else None

    module = Skips(small_cnn())
    trainer = Trainer(
        **TRAINER, max_epochs=1, val_check_interval=8, callbacks=[lq.LearnedQuantization(reestimate_bn=5)]
    )
    trainer.fit(module, loader(shape=SHAPE), loader(2, shape=SHAPE))
    assert module.net[1].num_batches_tracked == 5


def test_a_second_fit_of_as_many_steps_ends_with_them_too():
    module, callback = Plain(small_cnn()), lq.LearnedQuantization(reestimate_bn=5)
    for _ in range(2):
        fit(module, [callback], loader(shape=SHAPE))
        assert module.net[1].num_batches_tracked == 5


class Endless(IterableDataset):
    def __iter__(self):
        return iter(loader(shape=(8,)).dataset)


def test_data_without_a_length_asks_for_steps():
    with pytest.raises(
        ValueError, match="anneal_steps must be an integer for a fit of unknown length, got the fraction"
    ):
        fit(Plain(), [lq.LearnedQuantization()], DataLoader(Endless(), batch_size=8))
    callback = lq.LearnedQuantization(anneal_steps=5)
    fit(Plain(), [callback], DataLoader(Endless(), batch_size=8))
    assert callback.annealing.start == 5
