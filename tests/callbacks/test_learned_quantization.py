import math
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lq
from lq.calibration import uncalibrated_layers
from lq.callbacks import HoldAtAlignment, HoldAtStep
from lq.callbacks.schedule import Annealing, AnnealSpec
from lq.data import DigitsData
from lq.nn import named_quantized_layers
from lq.tracking import network_metrics
from tests.helpers.modules import TRAINER, Plain, fit, loader, small_cnn


class Recording(Plain):
    """Remembers the batches it was trained on and the random numbers it drew."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen, self.drawn = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].clone())
        self.drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
        return super().training_step(batch, batch_idx)


class Noisy(Dataset):
    """Draws random numbers for every image, as augmentations do."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.randn(8) + np.random.rand() + random.random(), index % 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("generator", [False, True])
def test_training_sees_the_same_data_with_and_without_calibration(workers, generator):
    runs = []
    for callbacks in ([], [lq.LearnedQuantization(bits=4)]):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        module = Recording()
        source = torch.Generator().manual_seed(3) if generator else None
        data = DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=workers, generator=source)
        torch.manual_seed(6)
        fit(module, callbacks, data)
        runs.append(module)
    assert len(runs[0].seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(runs[0].seen, runs[1].seen, strict=True))
    assert runs[0].drawn == runs[1].drawn


def test_calibration_leaves_the_module_untouched():
    class Counting(Plain):
        def __init__(self):
            super().__init__(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))
            self.steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            self.log("train/loss", loss := self.loss(batch))
            return loss

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                self.first = self.steps, self.net[1].num_batches_tracked.item(), uncalibrated_layers(self)

    module = Counting()
    trainer = fit(module, [lq.LearnedQuantization()])
    assert module.first == (0, 0, [])
    assert module.steps == 12
    assert "train/loss" in trainer.callback_metrics


def test_the_ends_are_found_by_executing_a_training_batch_and_the_report_follows(capsys):
    class Backwards(Plain):
        def __init__(self):
            super().__init__(
                nn.ModuleDict({"head": nn.Linear(8, 4), "middle": nn.Linear(8, 8), "stem": nn.Linear(8, 8)})
            )

        def forward(self, x):
            return self.net["head"](self.net["middle"](self.net["stem"](x)))

    module, callback = Backwards(), lq.LearnedQuantization(bits=2)
    fit(module, [callback])
    assert {row.path: (row.bits, row.reason) for row in callback.report.rows} == {
        "net.head": (8, "last block"),
        "net.middle": (2, ""),
        "net.stem": (8, "first block"),
    }
    codes = {path: layer.weight_quantizer.codes.bits for path, layer in named_quantized_layers(module).items()}
    assert codes == {"net.head": 8, "net.middle": 2, "net.stem": 8}
    assert module.net["middle"].input_quantizer.quantizer.codes.bits == 2
    printed = capsys.readouterr().out
    assert printed.count("3 of 3 layers quantized; first and last block by execution order") == 1


class Shuffled(Plain):
    """Executes its layers in another order than it registers them."""

    def __init__(self, example: bool):
        super().__init__(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)]))
        self.example_input_array = torch.randn(1, 8) if example else None

    def forward(self, x):
        return self.net[2](torch.relu(self.net[3](torch.relu(self.net[0](torch.relu(self.net[1](x)))))))


def test_scales_are_set_for_the_widths_that_the_batches_decide():
    scales = []
    for example in (True, False):
        torch.manual_seed(0)
        module = Shuffled(example)
        fit(module, [lq.LearnedQuantization(bits=4)], max_steps=1, limit_train_batches=1)
        scales.append([p.detach().clone() for n, p in module.named_parameters() if n.endswith("scale")])
    assert len(scales[0]) == 8
    for a, b in zip(*scales, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)


def test_an_example_input_decides_the_ends():
    class Two(Plain):
        def __init__(self):
            super().__init__(nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8)]))
            self.example_input_array = torch.randn(1, 8)

        def forward(self, x):
            return self.net[0](self.net[1](self.net[2](x)))

    callback = lq.LearnedQuantization(bits=2)
    fit(Two(), [callback])
    assert [row.reason for row in callback.report.rows] == ["last block", "", "first block"]


def test_the_slope_rises_per_optimizer_step_and_holds():
    class Watching(Plain):
        def __init__(self):
            super().__init__()
            self.slopes = []

        def training_step(self, batch, batch_idx):
            self.slopes.append(self.net[0].weight_quantizer.slope.item())
            return super().training_step(batch, batch_idx)

    module, callback = (
        Watching(),
        lq.LearnedQuantization(slope_start=2.0, slope_end=8.0, anneal_steps=6, hold=HoldAtStep(4)),
    )
    fit(module, [callback], accumulate_grad_batches=2, epochs=1)
    assert module.slopes == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6]


def test_a_fraction_of_the_fit_becomes_steps():
    callback = lq.LearnedQuantization(anneal_steps=0.5)
    fit(Plain(), [callback], epochs=3, accumulate_grad_batches=2)
    assert callback.annealing.steps == 9


@pytest.mark.parametrize(("over", "steps"), [({0: 4}, 9), ({0: 1, 1: 5}, 12 + 3 + 3)])
def test_a_scheduler_of_accumulation_is_heeded(over, steps):
    callback, freezing = lq.LearnedQuantization(anneal_steps=0.5), lq.IterativeFreezing()
    ends = []
    freezing.after_step = lambda module: ends.append(freezing.part)
    fit(Plain(), [callback, freezing, GradientAccumulationScheduler(over)], epochs=3)
    assert len(ends) == callback.annealing.step == steps
    assert callback.annealing.steps == round(0.5 * steps)
    assert callback.annealing.start == int(0.9 * steps)
    assert callback.annealing.strength == 1.0
    assert ends[-1] == 1.0


def test_layers_of_a_resumed_fit_are_not_rounded_again(tmp_path, monkeypatch):
    rounded = []
    name = "lq.callbacks.learned_quantization.round_on_training_batches"
    monkeypatch.setattr(name, lambda *_: rounded.append(1))

    def quantization():
        return lq.LearnedQuantization(bits=3, start_rounding="error_feedback", calibration_batches=2)

    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(Plain(), [quantization(), saver], epochs=1, enable_checkpointing=True)
    assert rounded == [1]
    callback, module = quantization(), Plain()
    Trainer(**TRAINER, max_epochs=2, callbacks=[callback]).fit(
        module, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    fit(module, [callback])
    assert rounded == [1]


def test_a_trainer_that_logs_nothing_is_heeded(tmp_path):
    logger, rows = CSVLogger(tmp_path), []
    logger.log_metrics = lambda m, step=None: rows.append(m)
    callback = lq.LearnedQuantization(bits=3, hold=HoldAtAlignment(-1.0))
    fit(Plain(), [callback], logger=logger, log_every_n_steps=0)
    assert not any("lq/alignment" in row for row in rows)
    assert callback.annealing.held_at == 12  # seen at the end of the epoch


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_metrics_and_report_reach_any_logger(tmp_path, kind, monkeypatch):
    logger, rows = kind(tmp_path), []
    write = logger.log_metrics
    monkeypatch.setattr(logger, "log_metrics", lambda m, step=None: (rows.append((step, dict(m))), write(m, step))[1])
    module = Plain()
    fit(module, [lq.LearnedQuantization(bits=3)], logger=logger, log_every_n_steps=5, epochs=2)
    steps = [step for step, row in rows if "lq/alignment" in row]
    assert steps == [5, 10, 12, 15, 20, 24]  # and the end of each epoch
    last = next(row for step, row in reversed(rows) if "lq/alignment" in row)
    assert last["lq/alignment"] == pytest.approx(network_metrics(module)["lq/alignment"])
    assert {"lq/slope", "lq/regularizer", "lq/loss_total", "lq/alignment/net.2", "lq/sqnr_db/net.4"} <= set(last)
    if kind is CSVLogger:
        assert "3 of 3 layers quantized" in next(tmp_path.rglob("swap_report.txt")).read_text()


def test_layers_can_be_left_out_of_the_log(tmp_path):
    logger, rows = CSVLogger(tmp_path), []
    logger.log_metrics = lambda m, step=None: rows.append(m)
    fit(Plain(), [lq.LearnedQuantization(log_layers=False)], logger=logger)
    assert rows
    assert not any("net." in name for row in rows for name in row)


def test_figures_can_be_monitored(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="lq/alignment", mode="max")
    fit(Plain(), [lq.LearnedQuantization(bits=3), checkpoint], enable_checkpointing=True, epochs=2)
    assert checkpoint.best_model_score is not None


def test_the_tracker_follows_a_model_quantized_by_hand(tmp_path):
    module, logger = Plain(), CSVLogger(tmp_path)
    lq.quantize_model(module, lq.QuantSpec(bits=4))
    lq.set_slope(module, 4.0)
    trainer = fit(module, [lq.QuantizationTracker(every_n_steps=4)], logger=logger)
    assert trainer.callback_metrics["lq/alignment"].item() == pytest.approx(
        network_metrics(module)["lq/alignment"], rel=1e-4
    )


def test_weight_only_quantization():
    module = Plain()
    callback = lq.LearnedQuantization(bits=4, activation=None)
    fit(module, [callback])
    assert all(layer.input_quantizer is None for layer in named_quantized_layers(module).values())
    assert [row.activation_bits for row in callback.report.rows] == [None] * 3


def test_soft_activations_and_hard_weights_follow_the_slope_too():
    module = Plain()
    fit(module, [lq.LearnedQuantization(bits=3, activation_forward="soft", forward="hard", slope_end=12.0)])
    middle = module.net[2]
    assert middle.input_quantizer.quantizer.slope.item() > 10
    x = torch.rand(64, 16)
    soft, hard = middle.train().input_quantizer(x), middle.eval().input_quantizer(x)
    assert soft.unique().numel() > 8 >= hard.unique().numel()
    assert middle.train().weight_quantizer(middle.weight).unique().numel() <= 8


def test_batch_norms_are_re_estimated_before_validation():
    means = []

    class Watching(Plain):
        def __init__(self):
            super().__init__(small_cnn())

        def validation_step(self, batch, batch_idx):
            means.append(self.net[1].running_mean.clone())

    results = []
    for batches in (0, 12):
        torch.manual_seed(0)
        means.clear()
        module, data = Watching(), loader(shape=(3, 9, 9))
        callback = lq.LearnedQuantization(bits=2, first_last_bits=None, reestimate_bn=batches)
        Trainer(**TRAINER, max_epochs=1, callbacks=[callback]).fit(module, data, loader(2, shape=(3, 9, 9)))
        assert torch.equal(means[0], means[1])
        results.append(module)
    module = results[1].eval()
    expected = torch.stack([module.net[0](x).mean(dim=(0, 2, 3)) for x, _ in data]).mean(0)
    torch.testing.assert_close(module.net[1].running_mean, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(results[0].net[1].running_mean, expected, atol=1e-5)


@pytest.mark.parametrize("before", ["on_before_batch_transfer", "precision"])
def test_calibration_sees_what_training_sees(before):
    class Larger(Plain):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 100, batch[1]]

    module = Larger() if before == "on_before_batch_transfer" else Plain()
    changes = {} if before == "on_before_batch_transfer" else {"precision": "bf16-true"}
    fit(module, [lq.LearnedQuantization()], max_steps=1, **changes)
    top = module.net[0].input_quantizer.quantizer.level_values()[-1].item()
    assert top > (100 if before == "on_before_batch_transfer" else 1)


def test_parts_in_evaluation_mode_learn_as_they_do_in_float():
    class Frozen(Plain):
        def on_train_epoch_start(self):
            self.net.eval()

    module = Frozen()
    before = module.net[2].weight.detach().clone()
    fit(module, [lq.LearnedQuantization(regularizer=None)])
    assert (module.net[2].weight - before).abs().max() > 1e-3


def test_a_second_fit_keeps_learned_input_scales():
    module = Plain()
    fit(module, [lq.LearnedQuantization()])
    with torch.no_grad():
        module.net[2].input_quantizer.quantizer.scale.fill_(0.123)
    module.make_optimizer = lambda params: torch.optim.SGD(params, lr=0.0)
    fit(module, [lq.LearnedQuantization()])
    assert module.net[2].input_quantizer.quantizer.scale.item() == pytest.approx(0.123)


def test_stages_after_the_fit_change_nothing_where_layers_are_excluded():
    module, callback = Plain(), lq.LearnedQuantization(exclude=["net.4"], slope_end=9.0)
    trainer = fit(module, [callback])
    report = callback.report
    trainer.test(module, loader(2), verbose=False)
    assert module.net[0].weight_quantizer.slope.item() == pytest.approx(9.0)
    assert callback.report is report
    with pytest.raises(ValueError, match="layer 'net.0' differs in bits"):
        fit(module, [lq.LearnedQuantization(bits=2, first_last_bits=None, exclude=["net.4"])])


def test_layers_that_training_never_calls_are_refused_by_name():
    class Reads(Plain):
        def forward(self, x):
            first, act, middle, act2, last = self.net
            return last(act2(nn.functional.linear(act(first(x)), middle.weight, middle.bias)))

    with pytest.raises(ValueError, match=r"got no call of \['net.2'\].* exclude=\['net.2'\]"):
        fit(Reads(), [lq.LearnedQuantization(activation=None)])
    fit(Reads(), [lq.LearnedQuantization(exclude=["net.2"])])
    module = Reads()
    module.example_input_array = torch.randn(1, 8)
    callback = lq.LearnedQuantization()
    fit(module, [callback])
    assert [(row.path, row.reason[:27]) for row in callback.report.skipped] == [
        ("net.2", "the example never calls it:")
    ]


def test_samplers_and_iterables_with_a_state_of_their_own_are_left_alone():
    class Ordered(torch.utils.data.Sampler):
        def __init__(self):
            self.numbers = np.random.default_rng(0)

        def __iter__(self):
            return iter(self.numbers.permutation(64).tolist())

        def __len__(self):
            return 64

    class Fixed(Noisy):
        def __getitem__(self, index):
            return torch.full((8,), index / 64), index % 4

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self):
            self.left = 64

        def __iter__(self):
            while self.left:
                self.left -= 1
                yield torch.full((8,), self.left / 64), self.left % 4

    for make in (
        lambda: DataLoader(Fixed(), batch_size=8, sampler=Ordered()),
        lambda: DataLoader(Stream(), batch_size=8),
    ):
        seen = []
        for callbacks in ([], [lq.LearnedQuantization(anneal_steps=8)]):
            module = Recording()
            fit(module, callbacks, make())
            seen.append(torch.cat(module.seen))
        assert len(seen[0]) == 64
        assert torch.equal(*seen)


def test_a_skipped_batch_moves_nothing_and_counts_for_nothing():
    class Skipping(Plain):
        def training_step(self, batch, batch_idx):
            return None if self.global_step else super().training_step(batch, batch_idx)

    callback = lq.LearnedQuantization(strength_schedule="constant")
    fit(Skipping(), [callback])
    assert callback.annealing.step == 1


@pytest.mark.parametrize(
    ("settings", "start", "expected"),
    [
        ({"strength_start": 0.5, "anneal_steps": 1.0}, 4, [0, 0, 0, 0, 0, 0.25, 0.5, 0.75]),
        ({"strength_start": 6, "anneal_steps": 4}, 6, [0, 0, 0, 0, 0, 0, 1, 1]),  # a jump: the ramp's end is over
        ({"strength_start": 0.75, "strength_schedule": "constant"}, 6, [0, 0, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_a_regularizer_may_begin_late(settings, start, expected):
    callback, seen = lq.LearnedQuantization(strength=1.0, log_every_n_steps=1, **settings), []

    class Watching(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(callback.annealing.strength)

    fit(Watching(), [callback], epochs=1, limit_train_batches=8)
    assert seen == pytest.approx(expected)
    assert callback.annealing.state_dict()["start"] == start


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [(40, {}, 36), (5, {}, 4), (math.inf, {"anneal_steps": 7}, 7), (40, {"strength_start": 3}, 3)],
)
def test_the_regularizer_begins_in_the_last_tenth_or_where_the_slope_has_risen(steps, settings, expected):
    annealing = Annealing(AnnealSpec(**settings))
    annealing.resolve(steps)
    strengths = []
    for _ in range(expected + 1):
        strengths.append(annealing.strength)
        annealing.advance()
    assert annealing.start == expected
    assert strengths[:-1] == [0.0] * expected
    assert (strengths[-1] == 1.0) == (settings.get("strength_start") is None)  # else a ramp begins


def test_a_checkpoint_from_before_there_were_late_starts_goes_on_with_its_regularizer():
    annealing = Annealing(AnnealSpec())
    annealing.load_state_dict({"step": 50, "held_at": None, "steps": 80, "best": None, "waited": 0})
    annealing.resolve(100)
    assert annealing.strength == 50 / 80


def test_frozen_weights_need_no_regularizer():
    module = Plain()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("bias" in name)
    fit(module, [lq.LearnedQuantization(strength_schedule="constant")])


def test_two_fits_log_alike(tmp_path):
    callback, counts = lq.LearnedQuantization(log_every_n_steps=6), []
    for name in ("a", "b"):
        logger, rows = CSVLogger(tmp_path / name), []
        logger.log_metrics = lambda m, step=None, rows=rows: rows.append(step)
        fit(Plain(), [callback], logger=logger)
        counts.append(len(rows))
    assert counts[0] == counts[1] > 0


def test_batch_norms_are_re_estimated_without_a_validation_loop_too():
    module, data = Plain(small_cnn()), loader(shape=(3, 9, 9))
    fit(module, [lq.LearnedQuantization(reestimate_bn=12)], data)
    module.eval()
    expected = torch.stack([module.net[0](x).mean(dim=(0, 2, 3)) for x, _ in data]).mean(0)
    torch.testing.assert_close(module.net[1].running_mean, expected.detach(), atol=1e-5, rtol=1e-4)


def test_nothing_stays_attached_after_a_fit():
    module, callback = Plain(), lq.LearnedQuantization(scale_lr_factor=0.1)
    trainer = fit(module, [callback])
    assert not {"configure_model", "on_load_checkpoint"} & set(vars(module))
    optimizer = trainer.optimizers[0]
    before = module.net[2].weight_quantizer.scale.item()
    for p in module.parameters():
        p.grad = None
    module.net[2].weight_quantizer.scale.grad = torch.ones(1)
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert module.net[2].weight_quantizer.scale.item() == pytest.approx(
        before - optimizer.param_groups[0]["lr"], rel=1e-3
    )


def test_a_quantized_network_learns_real_digits():
    torch.manual_seed(0)
    from lq.classifier import Classifier

    module = Classifier({"name": "cifar_resnet8", "in_chans": 1}, lr=0.1)
    data = DigitsData()
    settings = {**TRAINER, "enable_progress_bar": False}
    Trainer(**settings, max_epochs=3).fit(module, data)
    floats = Trainer(**settings).test(module, data, verbose=False)[0]["test/acc"]
    Trainer(**settings, max_epochs=3, callbacks=[lq.LearnedQuantization(bits=4)]).fit(module, data)
    hard = Trainer(**settings).test(module, data, verbose=False)[0]["test/acc"]
    assert floats > 0.95
    assert hard > floats - 0.02


def test_callbacks_with_the_whole_spec():
    spec = lq.QuantSpec(bits=5)
    assert lq.LearnedQuantization(spec).spec is spec


class Relative(torch.optim.Optimizer):
    """Chooses its steps itself, as Adafactor does without a learning rate."""

    def __init__(self, params):
        super().__init__(params, {"lr": None, "weight_decay": 0.0})

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(0.01 * parameter.grad)
        return loss


def test_an_optimizer_without_a_learning_rate_is_served():
    trainer = fit(Plain(optimizer=Relative), [lq.LearnedQuantization()])
    assert trainer.global_step == 12
    with pytest.raises(ValueError, match="learning rate must be a number where some parameters learn at 0.1 times it"):
        fit(Plain(optimizer=Relative), [lq.LearnedQuantization(scale_lr_factor=0.1)])
