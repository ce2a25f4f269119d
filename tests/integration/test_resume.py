"""A crash and a resume give, bit for bit, what an undisturbed run gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.callbacks import HoldAtAlignment, HoldAtStep, HoldOnPlateau
from lq.data import DigitsData
from lq.nn import named_quantized_layers
from tests.helpers.modules import TRAINER, Plain, fit, loader, small_cnn

SETTINGS = {"bits": 3, "slope_end": 10.0, "strength": 0.5, "strength_start": 0, "calibration_batches": 2}


class Crash(Exception):
    """Raised in the middle of a run."""


class Fragile(Plain):
    """Raises at a given epoch or batch."""

    def __init__(self, epoch: int = -1, batch: int = -1) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
        super().__init__(net, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.01))
        self.at = epoch, batch

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == self.at:
            raise Crash
        return super().training_step(batch, batch_idx)


def run(folder: Path, module, callbacks, ckpt_path=None, epochs: int = 4, data=None, **changes):
    torch.manual_seed(7)
    settings = {**TRAINER, "enable_checkpointing": True, "max_epochs": epochs, "default_root_dir": folder, **changes}
    trainer = Trainer(**settings, callbacks=callbacks)
    trainer.fit(
        module, DigitsData(batch_size=64, seed=3) if data is None else data, ckpt_path=ckpt_path, weights_only=True
    )
    return trainer


def same(a, b) -> None:
    for (name, x), (other, y) in zip(a.items(), b.items(), strict=True):
        assert name == other
        assert torch.equal(x, y), name


def same_runs(one, two) -> None:
    same(one.lightning_module.state_dict(), two.lightning_module.state_dict())
    states = [trainer.optimizers[0].state_dict() for trainer in (one, two)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, state in states[0]["state"].items():
        same(state, states[1]["state"][index])


HOLDS = {
    "none": None,
    "step": HoldAtStep(33),
    "alignment": HoldAtAlignment(0.05),  # is reached early, however sums are rounded
    "plateau": HoldOnPlateau("val/loss", patience=0, mode="min", min_delta=10.0),
}


@pytest.mark.parametrize("hold", HOLDS)
def test_from_an_epoch_boundary(tmp_path, hold):
    def callbacks(folder):
        quantization = lq.LearnedQuantization(**SETTINGS, hold=HOLDS[hold], log_every_n_steps=5)
        return [quantization, ModelCheckpoint(tmp_path / folder, save_last=True)]

    torch.manual_seed(1)
    whole = run(tmp_path, Fragile(), callbacks("whole"))
    torch.manual_seed(1)
    with pytest.raises(Crash):
        run(tmp_path, Fragile(epoch=2, batch=7), callbacks("crashed"))
    torch.manual_seed(99)  # the fresh module starts from other weights, which the checkpoint replaces
    again = callbacks("resumed")
    resumed = run(tmp_path, Fragile(), again, ckpt_path=tmp_path / "crashed" / "last.ckpt")
    same_runs(whole, resumed)
    annealings = [t.callbacks[0].annealing for t in (whole, resumed)]
    assert annealings[0].state_dict() == annealings[1].state_dict()
    assert annealings[0].step == 80
    held = annealings[0].held_at
    assert (held is None) == (hold == "none")
    if held is not None:
        assert held < 80
        assert annealings[1].slope == annealings[0].slope < 10.0


class Stateful(DataLoader):
    """A loader that can say where it is and go on from there."""

    def __init__(self, source):
        super().__init__(source.dataset, batch_size=source.batch_size)
        self.position, self.start = 0, 0

    def __iter__(self):
        start, self.start = self.start, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= start:
                self.position = i + 1
                yield batch
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.start = self.position = state["position"]


def test_from_the_middle_of_an_epoch_where_the_loader_knows_its_place(tmp_path):
    def stateful():
        source = loader(20, 16)
        return Stateful(source)

    def callbacks(folder):
        checkpoint = ModelCheckpoint(tmp_path / folder, every_n_train_steps=6, save_top_k=-1)
        return [lq.LearnedQuantization(**SETTINGS), checkpoint]

    class Small(Fragile):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)
            self.net = nn.Sequential(*layers)

    torch.manual_seed(1)
    whole = run(tmp_path, Small(), callbacks("whole"), data=stateful(), epochs=2)
    torch.manual_seed(1)
    with pytest.raises(Crash):
        run(tmp_path, Small(epoch=1, batch=9), callbacks("crashed"), data=stateful(), epochs=2)
    newest = max((tmp_path / "crashed").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    assert "step=24" in newest.name
    torch.manual_seed(99)
    resumed = run(tmp_path, Small(), callbacks("resumed"), ckpt_path=newest, data=stateful(), epochs=2)
    assert resumed.global_step == whole.global_step == 40
    same_runs(whole, resumed)


def test_a_checkpoint_written_because_of_an_exception_resumes(tmp_path):
    exception = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Crash):
        run(tmp_path, Fragile(epoch=1, batch=3), [lq.LearnedQuantization(**SETTINGS), exception])
    resumed = run(tmp_path, Fragile(), [lq.LearnedQuantization(**SETTINGS)], ckpt_path=exception.ckpt_path)
    assert len(resumed.optimizers[0].param_groups) == 1


def test_averaged_weights_resume_too(tmp_path):
    def callbacks(folder):
        checkpoint = ModelCheckpoint(tmp_path / folder, save_last=True)
        return [lq.LearnedQuantization(**SETTINGS), EMAWeightAveraging(decay=0.9), checkpoint]

    torch.manual_seed(1)
    whole = run(tmp_path, Fragile(), callbacks("whole"))
    torch.manual_seed(1)
    with pytest.raises(Crash):
        run(tmp_path, Fragile(epoch=2, batch=3), callbacks("crashed"))
    resumed = run(tmp_path, Fragile(), callbacks("resumed"), ckpt_path=tmp_path / "crashed" / "last.ckpt")
    same_runs(whole, resumed)


class InSetup(Plain):
    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        if self.net is None:
            self.net = small_cnn()


class InConfigureModel(Plain):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = small_cnn()


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
def test_networks_built_late_are_swapped_trained_tested_and_resumed(tmp_path, kind):
    data = loader(shape=(3, 9, 9))
    module, callback = kind(), lq.LearnedQuantization(**SETTINGS)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    settings = {**TRAINER, "enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = Trainer(**settings, max_epochs=2, callbacks=[callback, checkpoint])
    trainer.fit(module, data, data)
    assert len(named_quantized_layers(module)) == 4
    optimized = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert all(id(p) in optimized for p in module.parameters())
    assert "configure_model" not in vars(module)
    assert "on_load_checkpoint" not in vars(module)
    best = trainer.test(module, data, ckpt_path="best", verbose=False, weights_only=True)[0]["test/loss"]

    fresh = kind()
    other = Trainer(**settings, callbacks=[lq.LearnedQuantization(**SETTINGS)])
    again = other.test(fresh, data, ckpt_path=checkpoint.best_model_path, verbose=False, weights_only=True)
    assert again[0]["test/loss"] == best

    longer = Trainer(**settings, max_epochs=3, callbacks=[lq.LearnedQuantization(**SETTINGS)])
    longer.fit(kind(), data, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert longer.global_step == 36


def test_test_with_the_best_checkpoint_and_a_fresh_loader(tmp_path):
    data = loader()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    settings = {**TRAINER, "enable_checkpointing": True, "default_root_dir": tmp_path, "max_epochs": 2}
    trainer = Trainer(**settings, callbacks=[lq.LearnedQuantization(**SETTINGS), checkpoint])
    module = Plain()
    trainer.fit(module, data, data)
    best = trainer.test(module, data, ckpt_path="best", verbose=False, weights_only=True)[0]["test/loss"]

    loaded = lq.load_from_checkpoint(Plain, checkpoint.best_model_path)
    assert type(loaded) is Plain
    assert not loaded.training
    assert Trainer(**TRAINER).test(loaded, data, verbose=False)[0]["test/loss"] == best


def test_loads_strictly_in_a_fresh_process(tmp_path):
    module, data = Plain(), loader()
    trainer = fit(module, [lq.LearnedQuantization(**SETTINGS)], data)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    x = next(iter(data))[0]
    torch.save(module.eval()(x), tmp_path / "expected.pt")
    code = (
        "import lq, torch, sys\n"
        "from tests.helpers.modules import Plain, loader\n"
        f"module = lq.load_from_checkpoint(Plain, {str(tmp_path / 'net.ckpt')!r}, strict=True)\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r}, weights_only=True)\n"
        "assert torch.equal(module(next(iter(loader()))[0]), expected)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(("bits", "grid"), [(4, "mid_tread"), (2, "mid_rise"), (2, "mid_tread")])  # ends have 8 bits
def test_a_grid_that_was_named_goes_on_as_the_default_that_means_it(tmp_path, bits, grid):
    settings = {**SETTINGS, "bits": bits, "quantizer": "soft"}
    fit(Plain(), [lq.LearnedQuantization(**settings, grid=grid)]).save_checkpoint(tmp_path / "net.ckpt")
    trainer = Trainer(**TRAINER, max_epochs=3, callbacks=[lq.LearnedQuantization(**settings)])
    if bits == 2:
        with pytest.raises(ValueError, match=f"differ in grid: checkpoint '{grid}', callback 'auto'"):
            trainer.fit(Plain(), loader(), ckpt_path=tmp_path / "net.ckpt")
    else:
        trainer.fit(Plain(), loader(), ckpt_path=tmp_path / "net.ckpt")
        assert trainer.current_epoch == 3


def test_a_checkpoint_keeps_its_levels_where_auto_has_come_to_mean_others(tmp_path):
    path = tmp_path / "net.ckpt"
    fit(Plain(), [lq.LearnedQuantization(bits=3, grid="mid_tread")]).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lq"]["spec"]["grid"] = "auto"  # as a version wrote it for which that was mid-tread at 3 bits
    torch.save(checkpoint, path)
    resumed, loaded = Plain(), lq.load_from_checkpoint(Plain, path)
    trainer = Trainer(**TRAINER, max_epochs=2, callbacks=[lq.LearnedQuantization(bits=3)])
    trainer.fit(resumed, loader(), ckpt_path=path)
    assert trainer.current_epoch == 2
    for module in (resumed, loaded):
        assert module.net[2].layer_spec.grid == "mid_tread"
        assert module.net[2].weight_quantizer.codes.offset == 0


def test_a_checkpoint_of_another_spec_says_what_differs(tmp_path):
    trainer = fit(Plain(), [lq.LearnedQuantization(**SETTINGS)])
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    other = lq.LearnedQuantization(**{**SETTINGS, "bits": 5}, grid="mid_rise")
    with pytest.raises(ValueError, match="differ in bits: checkpoint 3, callback 5; grid: checkpoint 'auto', callb"):
        Trainer(**TRAINER, max_epochs=2, callbacks=[other]).fit(Plain(), loader(), ckpt_path=tmp_path / "net.ckpt")


def test_a_fit_that_goes_on_under_another_schedule_says_what_differs(tmp_path):
    fit(Plain(), [lq.LearnedQuantization(**SETTINGS)]).save_checkpoint(tmp_path / "net.ckpt")
    other = lq.LearnedQuantization(**{**SETTINGS, "slope_end": 12.0}, hold=HoldAtStep(3))
    told = r"slope_end: checkpoint 10.0, callback 12.0; hold: checkpoint None, callback \{'criterion': 'HoldAtStep', "
    with pytest.warns(UserWarning, match=told):
        Trainer(**{**TRAINER, "max_epochs": 2}, callbacks=[other]).fit(
            Plain(), loader(), ckpt_path=tmp_path / "net.ckpt"
        )


def test_a_float_checkpoint_says_how_to_start_from_it(tmp_path):
    fit(Plain()).save_checkpoint(tmp_path / "float.ckpt")
    quantization = lq.LearnedQuantization(**SETTINGS)
    with pytest.raises(
        ValueError, match="must be one that LearnedQuantization wrote, got one of a float model: load its"
    ):
        Trainer(**TRAINER, max_epochs=2, callbacks=[quantization]).fit(
            Plain(), loader(), ckpt_path=tmp_path / "float.ckpt"
        )
    with pytest.raises(ValueError, match="got one of a float model"):
        lq.load_from_checkpoint(Plain, tmp_path / "float.ckpt")


def test_a_checkpoint_with_other_layers_names_them(tmp_path):
    fit(Plain(), [lq.LearnedQuantization(**SETTINGS)]).save_checkpoint(tmp_path / "net.ckpt")
    deeper = Plain(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    with pytest.raises(ValueError, match=r"only in the model \[\], only in the checkpoint \['net.4'\]"):
        Trainer(**TRAINER, callbacks=[lq.LearnedQuantization(**SETTINGS)]).test(
            deeper, loader(), ckpt_path=tmp_path / "net.ckpt"
        )


def test_a_second_fit_starts_a_new_schedule_on_the_same_layers():
    module, callback = Plain(), lq.LearnedQuantization(**SETTINGS)
    fit(module, [callback])
    layers = {path: layer.weight_quantizer.scale for path, layer in named_quantized_layers(module).items()}
    fit(module, [callback])
    assert callback.annealing.step == 12
    assert all(named_quantized_layers(module)[path].weight_quantizer.scale is scale for path, scale in layers.items())
