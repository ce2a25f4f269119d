"""Training with the callback equals training with quantizers, schedule and loss term written out by hand."""

import copy
import csv
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

import lq
from tests.helpers.by_hand import SETTINGS, STRENGTH, ByHand, ByHandManual, HandLinear, by_hand_net, weights_of
from tests.helpers.modules import Manual, Plain, fit, loader, mlp

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=2e-4, weight_decay=0.0)


def half_scaler():
    return [MixedPrecision("16-mixed", device="cpu")]


MODES = {
    "float32": {},
    "adamw": {"optimizer": ADAMW},
    "accumulation": {"every": 4, "trainer": {"accumulate_grad_batches": 4}},
    "clipping": {"trainer": {"gradient_clip_val": 0.05}},
    "accumulation-clipping": {"every": 2, "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}, "tolerance": 2e-2},
    "16-mixed": {"plugins": half_scaler, "tolerance": 2e-2},
    "16-mixed-accumulation-clipping": {
        "plugins": half_scaler,
        "every": 2,
        "trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        "tolerance": 2e-2,
    },
    "16-mixed-fused": {"plugins": half_scaler, "optimizer": partial(ADAMW, fused=True), "tolerance": 2e-2},
    "manual": {"manual": True, "every": 2},
    "manual-16-mixed": {"manual": True, "every": 2, "plugins": half_scaler, "tolerance": 2e-2},
    "compiled-module": {"compile": "module", "tolerance": 1e-4},
    "compiled-network": {"compile": "network", "tolerance": 1e-4},
}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return (sum((a[k] - b[k]).square().sum() for k in a) ** 0.5).item()


def train(mode: dict, module, callbacks) -> dict:
    trainer = dict(mode.get("trainer", {}))
    if "plugins" in mode:
        trainer["plugins"] = mode["plugins"]()
    target = torch.compile(module, backend="aot_eager") if mode.get("compile") == "module" else module
    fit(target, callbacks, **trainer)
    return weights_of(module)


@pytest.mark.parametrize("name", MODES)
def test_callback_equals_training_by_hand(name):
    mode = MODES[name]
    torch.compiler.reset()
    net = mlp()
    batches = list(islice(loader(), SETTINGS["calibration_batches"]))
    optimizer = mode.get("optimizer", SGD)
    plain_kind, hand_kind = (Manual, ByHandManual) if mode.get("manual") else (Plain, ByHand)

    user_net = copy.deepcopy(net)
    module = plain_kind(user_net, optimizer=optimizer)
    if mode.get("compile") == "network":
        module.net = torch.compile(module.net, backend="aot_eager")
    with_callback = train(mode, module, [lq.LearnedQuantization(**SETTINGS)])

    twin = by_hand_net(net, batches)
    by_hand = train({**mode, "compile": None}, hand_kind(twin, optimizer=optimizer, every=mode.get("every", 1)), [])

    # the size of what the regularizer does, so that leaving it out could not pass
    without = plain_kind(copy.deepcopy(net), optimizer=optimizer)
    no_term = train({**mode, "compile": None}, without, [lq.LearnedQuantization(**{**SETTINGS, "regularizer": None})])
    effect = distance(by_hand, no_term)
    assert effect > 1e-3
    assert distance(with_callback, by_hand) < mode.get("tolerance", 1e-4) * max(effect, 1.0)
    assert distance(with_callback, by_hand) < 0.2 * effect


def test_the_default_gradients_and_widths_equal_training_by_hand(monkeypatch):
    defaults = {
        k: v
        for k, v in SETTINGS.items()
        if k not in ("forward", "first_last_bits", "scale_gradient", "slope_backward_max")
    }
    monkeypatch.setattr(HandLinear, "exact", False)
    net = mlp()
    batches = list(islice(loader(), SETTINGS["calibration_batches"]))
    module, hand = Plain(copy.deepcopy(net), optimizer=SGD), ByHand(by_hand_net(net, batches, 8), optimizer=SGD)
    fit(module, [lq.LearnedQuantization(**defaults)])
    fit(hand)
    assert distance(weights_of(module), weights_of(hand)) < 1e-3


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
        partial(torch.optim.AdamW, lr=0.02, weight_decay=0.5),
    ],
)
@pytest.mark.parametrize("schedule", ["none", "onecycle", "lambda"])
def test_scales_get_no_decay_and_their_own_rate(optimizer, schedule):
    schedulers = {
        "none": None,
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=12),
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    }
    net, factor = mlp(), 0.25
    batches = list(islice(loader(), SETTINGS["calibration_batches"]))

    def grouped(params):
        """By hand: scales in a group without decay, their rate set before every step."""
        del params
        named = dict(twin.named_parameters())
        scales = [p for n, p in named.items() if "scale" in n]
        rest = [p for n, p in named.items() if "scale" not in n]
        return optimizer([{"params": rest}, {"params": scales, "weight_decay": 0.0}])

    class Rated(ByHand):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            group = optimizer.param_groups[1]
            lr, group["lr"] = group["lr"], group["lr"] * factor
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            group["lr"] = lr

    module = Plain(copy.deepcopy(net), optimizer=optimizer, scheduler=schedulers[schedule])
    trainer = fit(module, [lq.LearnedQuantization(**SETTINGS, scale_lr_factor=factor)])
    assert len(trainer.optimizers[0].param_groups) == 1
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(list(module.parameters()))
    twin = by_hand_net(net, batches)
    hand = Rated(twin, optimizer=grouped, scheduler=schedulers[schedule])
    fit(hand)
    assert distance(weights_of(module), weights_of(hand)) < 1e-4


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weights_of_few_bits_decay_less(optimizer):
    """3 bits: half of the decay for weights, all of it for biases, none for scales."""
    net, decay = mlp(), 0.4
    batches = list(islice(loader(), SETTINGS["calibration_batches"]))

    def grouped(params):
        del params
        kinds = {"weight": [], "scale": [], "bias": []}
        for name, parameter in twin.named_parameters():
            kinds["scale" if "scale" in name else name.rpartition(".")[2]].append(parameter)
        factors = {"weight": 0.5, "scale": 0.0, "bias": 1.0}
        return optimizer([{"params": p, "weight_decay": decay * factors[k]} for k, p in kinds.items()], lr=0.02)

    module = Plain(copy.deepcopy(net), optimizer=partial(optimizer, lr=0.02, weight_decay=decay))
    trainer = fit(module, [lq.LearnedQuantization(**SETTINGS, weight_decay_by_bits=True)])
    assert len(trainer.optimizers[0].param_groups) == 1
    twin = by_hand_net(net, batches)
    hand = ByHand(twin, optimizer=grouped)
    fit(hand)
    assert distance(weights_of(module), weights_of(hand)) < 1e-4
    module = Plain(copy.deepcopy(net), optimizer=partial(optimizer, lr=0.02, weight_decay=decay))
    fit(module, [lq.LearnedQuantization(**SETTINGS)])
    assert distance(weights_of(module), weights_of(hand)) > 1e-3


def test_weight_averaging_equals_averaging_by_hand():
    net = mlp()
    batches = list(islice(loader(), SETTINGS["calibration_batches"]))
    results = []
    for module, callbacks in (
        (Plain(copy.deepcopy(net)), [lq.LearnedQuantization(**SETTINGS)]),
        (ByHand(by_hand_net(net, batches)), []),
    ):
        fit(module, [*callbacks, EMAWeightAveraging(decay=0.8)])
        results.append(weights_of(module))
    assert distance(*results) < 1e-4


def test_regularizer_value_and_total_loss_are_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    module = Plain()
    fit(module, [lq.LearnedQuantization(**SETTINGS)], logger=logger, log_every_n_steps=1)
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len(rows) == 12
    for i, row in enumerate(rows):
        strength = STRENGTH * min(i / 8, 1)
        assert row["lq/slope"] == pytest.approx(1 + 8 * min(i / 8, 1))
        assert row["step"] == i + 1
        if strength:
            assert row["lq/loss_total"] > strength * row["lq/regularizer"] > 0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_total_loss_is_that_of_the_batch_however_many_are_accumulated(tmp_path, accumulate):
    class Constant(Plain):
        def loss(self, batch):
            return super().loss(batch) * 0 + 5.0

    module = Constant()
    trainer = fit(
        module,
        [lq.LearnedQuantization(**{**SETTINGS, "regularizer": None}, log_every_n_steps=1)],
        accumulate_grad_batches=accumulate,
    )
    assert trainer.callback_metrics["lq/loss_total"].item() == pytest.approx(5.0)


def test_two_optimizers_step_the_schedule_once_per_batch():
    class Two(Manual):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.step()

        def configure_optimizers(self):
            return SGD(self.net[:2].parameters()), SGD(self.net[2:].parameters())

    callback = lq.LearnedQuantization(**SETTINGS)
    trainer = fit(Two(), [callback])
    assert trainer.global_step == 24
    assert callback.annealing.step == 12


@pytest.mark.parametrize("on", ["latent", "quantized"])
@pytest.mark.parametrize("kind", ["nearest", "l1", "sine"])
def test_every_regularizer_aligns_the_weights(kind, on):
    from lq.tracking import network_metrics

    results = []
    for strength in (0.0, 3.0):
        torch.manual_seed(0)
        module = Plain(mlp())
        settings = {**SETTINGS, "regularizer": kind, "regularizer_on": on, "strength": strength}
        fit(module, [lq.LearnedQuantization(**settings, strength_schedule="constant")], epochs=3)
        results.append(network_metrics(module)["lq/alignment"])
    assert results[1] > results[0] + 0.1


def test_scale_learns_from_the_regularizer_only_when_asked():
    scales = []
    for flag in (False, True):
        torch.manual_seed(0)
        module = Plain(mlp())
        settings = {**SETTINGS, "strength": 0.05, "regularizer_scale_gradient": flag}
        fit(module, [lq.LearnedQuantization(**settings)])
        scales.append(module.net[2].weight_quantizer.scale.item())
    assert scales[0] != scales[1]


def test_validation_sees_hard_weights():
    seen = []

    class Watching(Plain):
        def validation_step(self, batch, batch_idx):
            layer = self.net[2]
            seen.append(set(layer.weight_quantizer(layer.weight).flatten().tolist()))

    module = Watching()
    from lightning.pytorch import Trainer

    from tests.helpers.modules import TRAINER

    trainer = Trainer(**{**TRAINER, "max_epochs": 1, "callbacks": [lq.LearnedQuantization(**SETTINGS)]})
    trainer.fit(module, loader(), loader(1))
    assert len(seen) == 1
    assert len(seen[0]) <= 7
    nn.Module.train(module)
    assert len(set(module.net[2].weight_quantizer(module.net[2].weight).flatten().tolist())) > 7
