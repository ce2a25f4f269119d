import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.callbacks import HoldAtAlignment, HoldAtStep, HoldOnPlateau
from lq.callbacks.guards import check_same_spec
from lq.group_rules import decay_rules
from lq.nn import named_quantized_layers
from lq.surgery import find_layers
from tests.helpers.modules import TRAINER, Manual, Plain, fit, loader, mlp, small_cnn


@pytest.mark.parametrize("other", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(1e-3)])
def test_averaging_before_quantization_is_refused_with_the_order_to_write(other):
    kind = type(other).__name__
    with pytest.raises(ValueError, match=rf"callbacks must list LearnedQuantization before {kind}, got the reverse"):
        fit(Plain(), [other, lq.LearnedQuantization()])


def test_averaging_after_quantization_averages_the_scales():
    class Remembering(Plain):
        def on_train_batch_end(self, *_):
            self.last = self.net[2].weight_quantizer.scale.detach().clone()

    module = Remembering()
    fit(module, [lq.LearnedQuantization(bits=3), EMAWeightAveraging(decay=0.9)])
    assert not torch.equal(module.net[2].weight_quantizer.scale, module.last)
    assert all(layer.input_quantizer.is_calibrated for layer in named_quantized_layers(module).values())


def test_an_average_that_starts_late_is_warned_of():
    late = EMAWeightAveraging(decay=0.9, update_starting_at_step=5)
    with pytest.warns(UserWarning, match=r"EMAWeightAveraging\(update_starting_at_step=...\) validates the start"):
        fit(Plain(), [lq.LearnedQuantization(), late])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8, got 1"),
        ({"slope_start": 9.0, "slope_end": 3.0}, "slope_start must lie from 0 to slope_end, 3.0, got 9.0"),
        ({"anneal_steps": 0}, "anneal_steps must be an integer of at least 1 or a fraction"),
        ({"strength_start": 1.0}, "strength_start must be an integer of at least 0, a fraction in"),
        ({"strength_start": -1}, "strength_start must be an integer of at least 0, a fraction in"),
        ({"anneal_steps": 1.5}, "anneal_steps must be an integer of at least 1 or a fraction"),
        ({"regularizer": "l2"}, "regularizer must be one of .* got 'l2'"),
        ({"regularizer_on": "soft"}, "regularizer_on must be one of .* got 'soft'"),
        ({"strength": -1.0}, "strength must not be negative, got -1.0: use 0"),
        ({"strength": float("nan")}, "strength must not be negative, got nan"),
        ({"scale_lr_factor": -0.1}, "scale_lr_factor must not be negative"),
        ({"calibration_batches": 0}, "calibration_batches must be an integer of at least 1, got 0"),
        ({"strength_schedule": "step"}, "strength_schedule must be one of"),
        ({"start_rounding": "nearest"}, "start_rounding must be one of"),
        ({"slope_end": float("nan")}, "slope_end must be a number of at least 0, got nan"),
        ({"slope_start": "1"}, "slope_start must be a number and lie from 0 to slope_end, 16.0, got '1'"),
        (
            {"anneal_steps": "all"},
            "anneal_steps must be a number and be an integer .*, got 'all'",
        ),
        ({"strength_start": "0"}, "strength_start must be a number and be an integer of at least 0, .*, got '0'"),
        ({"strength": "1"}, "strength must be a number and not be negative, got '1'"),
        ({"reestimate_bn": 2.5}, "reestimate_bn must be an integer of at least 0, got 2.5: use 0"),
        ({"calibration_batches": 1.5}, "calibration_batches must be an integer of at least 1, got 1.5"),
        ({"weight_decay_by_bits": "no"}, "weight_decay_by_bits must be True or False, got 'no'"),
        ({"hold": 100}, "hold must be HoldAtStep, HoldAtAlignment, HoldOnPlateau or None, got 100"),
        ({"log_every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0: try 50, or None"),
    ],
)
def test_bad_settings_name_field_value_and_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        lq.LearnedQuantization(**settings)


def test_unknown_and_doubled_settings():
    with pytest.raises(TypeError, match=r"unknown settings \['weight_bits'\]: allowed are .*'bits'.*'slope_start'"):
        lq.LearnedQuantization(weight_bits=4)
    with pytest.raises(TypeError, match="spec must be given whole or as fields, got both: move"):
        lq.LearnedQuantization(lq.QuantSpec(), bits=4)
    with pytest.raises(TypeError, match="spec must be a QuantSpec, got 4: write"):
        lq.LearnedQuantization(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HoldAtStep(-1), "step must be an integer of at least 0, got -1"),
        (lambda: HoldAtAlignment(1.5), "threshold must be an alignment from -1 to 1, got 1.5"),
        (lambda: HoldAtAlignment("high"), "threshold must be a number and be an alignment from -1 to 1, got 'high'"),
        (lambda: HoldOnPlateau("val/acc", mode="up"), "mode must be one of .*'min', 'max'.*, got 'up'"),
        (lambda: HoldOnPlateau("val/acc", patience=-1), "patience must be an integer of at least 0, got -1"),
    ],
)
def test_bad_hold_criteria(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plateau_of_a_metric_that_is_not_logged_names_those_that_are():
    callback = lq.LearnedQuantization(hold=HoldOnPlateau("val/acc"))
    with pytest.raises(ValueError, match=r"hold.monitor must be a logged metric, got 'val/acc'; logged are .*val/loss"):
        Trainer(**TRAINER, max_epochs=1, callbacks=[callback]).fit(Plain(), loader(), loader(2))


def test_nothing_to_quantize():
    class Empty(Plain):
        def __init__(self):
            super().__init__(nn.Sequential(nn.BatchNorm1d(8)))

    with pytest.raises(ValueError, match="model must have a convolution or linear layer to quantize, got Empty"):
        fit(Empty(), [lq.LearnedQuantization()])


def test_a_module_quantized_by_another_spec_is_refused():
    module = Plain()
    lq.quantize_model(module, lq.QuantSpec(bits=4))
    with pytest.raises(ValueError, match="layer 'net.2' differs in bits: module 4, callback 5. Give the"):
        fit(module, [lq.LearnedQuantization(bits=5)])
    fit(module, [lq.LearnedQuantization(bits=4)])
    lq.dequantize_model(module, keep_latent=True)
    fit(module, [lq.LearnedQuantization(bits=5)])


def test_a_glob_without_a_match_leaves_the_module_float():
    module = Plain()
    with pytest.raises(ValueError, match=r"exclude glob must match a layer, got 'head\*'"):
        fit(module, [lq.LearnedQuantization(exclude=["head*"])])
    assert not named_quantized_layers(module)


class Diverging(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 18 else loss


def test_a_nan_loss_stops_with_the_last_good_checkpoint_intact(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    trainer = Trainer(
        **{**TRAINER, "enable_checkpointing": True},
        default_root_dir=tmp_path,
        max_epochs=2,
        callbacks=[lq.LearnedQuantization(bits=3), checkpoint],
    )
    with pytest.raises(
        ValueError, match="the training loss must be finite, got nan at optimizer step 18: lower the learn"
    ):
        trainer.fit(Diverging(), loader())
    loaded = lq.load_from_checkpoint(Diverging, tmp_path / "last.ckpt")
    assert all(bool(torch.isfinite(p).all()) for p in loaded.parameters())


@pytest.mark.parametrize(("factor", "what"), [(1e4, "100.0% are zero"), (1e-6, "of its weights are clipped")])
def test_a_collapsed_scale_names_layer_and_fix(factor, what):
    def still(params):  # a large gradient would bring a scale near zero back
        return torch.optim.SGD(params, lr=0.0)

    class Pushed(Plain):
        def on_train_batch_end(self, *_):
            if self.global_step == 5:
                with torch.no_grad():
                    self.net[2].weight_quantizer.scale.mul_(factor)

    with pytest.raises(ValueError, match=rf"the scale of layer 'net.2' has collapsed: .*{what}.*overrides="):
        fit(Pushed(optimizer=still), [lq.LearnedQuantization(bits=4, log_every_n_steps=1)])


def test_layers_that_start_at_zero_are_no_collapse():
    net = mlp()
    nn.init.zeros_(net[4].weight)
    fit(Plain(net), [lq.LearnedQuantization(bits=3, log_every_n_steps=1)])


def test_manual_steps_past_lightning_are_noticed():
    class Past(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()

    with pytest.raises(
        ValueError, match="at least one optimizer step through Lightning, got none: step self.optimizers"
    ):
        fit(Past(), [lq.LearnedQuantization()])


def test_batches_that_a_forward_does_not_take_ask_for_a_calibration_forward():
    class Named(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step((batch["image"], batch["label"]), batch_idx)

    rows = [{"image": torch.randn(8), "label": torch.tensor(1)}] * 32
    data = DataLoader(rows, batch_size=8)
    with pytest.raises(ValueError, match="calibration_forward must be given for Named, whose forward does not take"):
        fit(Named(), [lq.LearnedQuantization()], data)
    given = lq.LearnedQuantization(
        anneal_steps=2, strength_start=1, calibration_forward=lambda m, batch: m(batch["image"])
    )
    fit(Named(), [given], data)


def test_an_empty_loader_is_refused():
    empty = DataLoader(TensorDataset(torch.empty(0, 8), torch.empty(0)), batch_size=4)
    with pytest.raises(ValueError, match="train_dataloader must yield at least one batch, got an empty one"):
        fit(Plain(), [lq.LearnedQuantization()], empty)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(8), torch.tensor(1)


def test_an_endless_fit_needs_steps():
    with pytest.raises(
        ValueError, match="anneal_steps must be an integer for a fit of unknown length, got the fraction 0.8"
    ):
        fit(Plain(), [lq.LearnedQuantization()], DataLoader(Endless(), batch_size=4), epochs=-1)
    callback = lq.LearnedQuantization(anneal_steps=5, bits=3)
    fit(Plain(), [callback], DataLoader(Endless(), batch_size=4), epochs=-1, max_steps=7)
    assert callback.annealing.slope == 16.0


def test_optimizers_without_the_scales():
    class Head(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([self.net[0].weight], lr=0.1)

    with pytest.raises(ValueError, match="the optimizer must hold the learned scales, got none of them"):
        fit(Head(), [lq.LearnedQuantization()])

    class Some(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"4 learned scales are in no optimizer and stay fixed \(net.0"):
        fit(Some(), [lq.LearnedQuantization()])


class ManualWithoutForward(LightningModule):
    """Optimizes manually and calls its network in training_step alone."""

    def __init__(self):
        super().__init__()
        self.net, self.automatic_optimization = mlp(), False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_manual_optimization_without_a_forward_asks_for_one():
    with pytest.raises(ValueError, match="calibration_forward must be given for ManualWithoutForward"):
        fit(ManualWithoutForward(), [lq.LearnedQuantization()])
    module = ManualWithoutForward()
    fit(module, [lq.LearnedQuantization(calibration_forward=lambda m, batch: m.net(batch[0]))])
    assert module.net[0].input_quantizer.is_calibrated


class HeadFirst(Plain):
    """Its head is registered before its body, and nothing says so before the first batch."""

    def __init__(self):
        net = nn.ModuleDict({"head": nn.Linear(8, 4), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
        super().__init__(net)

    def forward(self, x):
        return self.net["head"](self.net["c"](self.net["b"](self.net["a"](x).relu()).relu()).relu())


def test_what_ends_learn_must_be_in_the_optimizer():
    fit(HeadFirst(), [lq.LearnedQuantization(quantizer="lsq", regularizer=None)])
    with pytest.raises(
        ValueError, match=r"example_input_array must be set for quantizer='nulsq': .* 'net.a' and 'net.h"
    ):
        fit(HeadFirst(), [lq.LearnedQuantization(quantizer="nulsq", regularizer=None)])


def test_parametrized_weights_of_few_bits_decay_less_too():
    layers = [nn.Linear(4, 4) for _ in range(4)]
    parametrizations.weight_norm(layers[2])
    model = nn.Sequential(*layers)
    lq.quantize_model(model, lq.QuantSpec(bits=2))
    (rule,) = decay_rules(layer for layer in model)
    own = {id(p) for p in model[2].parametrizations.weight.parameters() if p.dim() > 1}
    assert own
    assert {id(p) for p in rule.parameters} == {id(model[1].weight)} | own


def test_twins_whose_width_came_from_one_of_them_come_back():
    wide = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
    module = Plain(nn.Sequential(*wide, nn.Linear(8, 4)))
    module.net[4].weight = module.net[2].weight
    trainer = fit(module, [lq.LearnedQuantization(bits=2, overrides={"net.2": {"bits": 8}})])
    assert module.net[4].weight_quantizer.codes.bits == 8
    trainer.test(module, loader(), verbose=False)


@pytest.mark.parametrize("quantizer", ["qn", "nulsq", "apot", "log2"])
def test_a_network_of_the_same_spec_comes_back_and_another_is_named(quantizer):
    spec = {"quantizer": quantizer, "bits": 3}
    model = Plain(small_cnn())
    lq.quantize_model(model, lq.QuantSpec(**spec))
    check_same_spec(find_layers(model), lq.QuantSpec(**spec))
    with pytest.raises(ValueError, match="differs in granularity: module .tensor., callback .channel."):
        check_same_spec(find_layers(model), lq.QuantSpec(**spec, granularity="channel"))


@pytest.mark.parametrize("callback", [lq.IterativeFreezing, lq.ProgressiveBits])
def test_schedules_over_data_without_a_length_name_what_gives_them_one(callback):
    data = DataLoader(Endless(), batch_size=4)
    callbacks = [lq.LearnedQuantization(anneal_steps=5, bits=3), callback()]
    with pytest.raises(ValueError, match=r"needs a fit of known length, got none: .*integer limit_train_batches"):
        fit(Plain(), callbacks, data, epochs=2)
    fit(Plain(), callbacks, data, epochs=2, limit_train_batches=4)


def test_a_plateau_needs_a_validation():
    quantization = lq.LearnedQuantization(bits=3, hold=HoldOnPlateau("val/loss"))
    with pytest.warns(UserWarning, match=r"HoldOnPlateau\('val/loss'\) looks at its metric .* this fit has none"):
        fit(Plain(), [quantization])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="HoldOnPlateau")
        Trainer(**TRAINER, max_epochs=1, callbacks=[quantization]).fit(Plain(), loader(), loader())
