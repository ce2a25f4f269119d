import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import lq
from lq.callbacks.progressive import _widened
from lq.nn import named_quantized_layers
from lq.quantizers.a2q import limit_of
from lq.spec import LayerSpec
from tests.helpers.modules import Plain, fit, loader, small_cnn
from tests.integration.test_resume import run, same_runs

SHAPE = (3, 8, 8)
QUANTIZATION = {"bits": 2, "calibration_batches": 2, "slope_end": 6.0}


def module():
    torch.manual_seed(0)
    return Plain(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.05))


class Widths(Callback):
    """Keeps the widths and slope of a middle layer on every batch, and whether values changed with them."""

    def __init__(self, path="net.3"):
        self.path, self.seen = path, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        layer = pl_module.get_submodule(self.path)
        weight, inputs = layer.weight_quantizer, layer.input_quantizer.quantizer
        slope = float(weight.slope) if hasattr(weight, "slope") else None
        self.seen.append((weight.codes.bits, inputs.codes.bits, slope, float(inputs.scale)))


def middle(module_):
    return next(path for path, layer in named_quantized_layers(module_).items() if layer.layer_spec.bits == 2)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("quantizer", ["soft", "lsq", "codebook", "subset", "dsq", "pact", "qn"])
def test_widths_fall_to_those_of_the_spec(quantizer, first):
    progress, quantization = (
        lq.ProgressiveBits([8, 4], until=0.5),
        lq.LearnedQuantization(**QUANTIZATION, quantizer=quantizer),
    )
    probe = module()
    lq.quantize_model(probe.net, lq.QuantSpec(bits=2))
    widths = Widths(f"net.{middle(probe.net)}")
    callbacks = [progress, quantization] if first else [quantization, progress]
    trainer = fit(module(), [*callbacks, widths], loader(20, shape=SHAPE))
    assert [w for w, *_ in widths.seen] == [8] * 5 + [4] * 5 + [2] * 10
    assert [a for _, a, *_ in widths.seen] == [8] * 5 + [4] * 5 + [2] * 10
    slopes = [s for *_, s, _ in widths.seen if s is not None]
    assert slopes == sorted(slopes)
    assert all(s > 0 for s in slopes)
    scales = [s for *_, s in widths.seen]
    assert scales[5] > 4 * scales[4]  # fewer steps to the same range
    for layer in named_quantized_layers(trainer.lightning_module).values():
        assert layer.layer_spec.bits in (2, 8)
        assert layer.weight_quantizer.codes == layer.layer_spec.weight_codes or quantizer in ("codebook", "subset")
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in trainer.lightning_module.parameters()}


@pytest.mark.parametrize("by_bits", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, epoch, by_bits):
    def trained(folder, saver, ckpt_path=None):
        callbacks = [
            lq.LearnedQuantization(**QUANTIZATION, weight_decay_by_bits=by_bits),
            lq.ProgressiveBits(until=0.6),
            lq.IterativeFreezing(),
            saver,
        ]
        return run(folder, module(), callbacks, ckpt_path, data=loader(shape=SHAPE), epochs=3)

    saver = ModelCheckpoint(tmp_path / "kept", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole = trained(tmp_path / "whole", saver)
    again = trained(tmp_path / "again", ModelCheckpoint(tmp_path / "b"), tmp_path / "kept" / f"epoch={epoch}.ckpt")
    same_runs(whole, again)


def test_weight_decay_follows_the_width():
    network, rates = module(), []
    probe = module().net
    lq.quantize_model(probe, lq.QuantSpec(bits=2))
    path = f"net.{middle(probe)}"

    def note(optimizer, *_):
        found = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        rates.append(found[id(network.get_submodule(path).weight)])

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_pre_hook(note)  # after those that set the rates

    quantization = lq.LearnedQuantization(**QUANTIZATION, weight_decay_by_bits=True)
    fit(network, [quantization, lq.ProgressiveBits([8, 3], until=0.5), Watch()], loader(20, shape=SHAPE))
    assert rates == pytest.approx([0.05] * 5 + [0.025] * 5 + [0.0125] * 10)


class Falling(Plain):
    """Its monitored metric gets worse with every epoch."""

    def on_train_epoch_end(self):
        self.log("score", float(-self.current_epoch))


def test_the_best_is_chosen_among_networks_of_the_last_width(tmp_path):
    torch.manual_seed(0)
    falling = Falling(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02))
    saver = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}")
    callbacks = [lq.LearnedQuantization(**QUANTIZATION), lq.ProgressiveBits([4], until=0.5), saver]
    fit(falling, callbacks, loader(4, shape=SHAPE), epochs=4, enable_checkpointing=True)
    assert saver.best_model_path.endswith("epoch=2.ckpt")
    loaded = lq.load_from_checkpoint(Falling, saver.best_model_path, net=small_cnn())
    assert {layer.weight_quantizer.codes.bits for layer in named_quantized_layers(loaded).values()} == {2, 8}


def test_bad_values_and_partners_are_named():
    with pytest.raises(ValueError, match=r"bits must fall from stage to stage, got \[4, 8\]"):
        lq.ProgressiveBits([4, 8])
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 16"):
        lq.ProgressiveBits([16, 8])
    with pytest.raises(ValueError, match="bits must be a list of widths, got 8: try"):
        lq.ProgressiveBits(8)
    for callback in (lq.ProgressiveBits(), lq.IterativeFreezing(), lq.DelayedActivations()):
        with pytest.raises(
            ValueError, match=f"{type(callback).__name__} needs quantized layers, got a network without"
        ):
            fit(module(), [callback], loader(8, shape=SHAPE))
    with pytest.raises(ValueError, match="until must be a number and lie between 0 and 1, got 'half'"):
        lq.ProgressiveBits([8, 4], until="half")
    with pytest.raises(ValueError, match="until must lie between 0 and 1, got 1"):
        lq.ProgressiveBits(until=1)
    with pytest.raises(ValueError, match="calibration_batches must be an integer of at least 1, got 0"):
        lq.ProgressiveBits(calibration_batches=0)
    averaging = StochasticWeightAveraging(1e-3)
    for callbacks, changes, message in (
        ([lq.LearnedQuantization(**QUANTIZATION), EMAWeightAveraging()], {}, "cannot change the widths of averaged"),
        ([lq.LearnedQuantization(**QUANTIZATION), averaging], {}, "cannot change the widths of averaged"),
        (
            [lq.LearnedQuantization(**QUANTIZATION, quantizer="nulsq")],
            {},
            "parameters do not depend on the width",
        ),
        ([lq.LearnedQuantization(**QUANTIZATION, anneal_steps=3)], {"max_epochs": -1}, "needs a fit of known length"),
        ([lq.LearnedQuantization(**QUANTIZATION, start_rounding="error_feedback")], {}, "start_rounding must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(module(), [*callbacks, lq.ProgressiveBits()], loader(8, shape=SHAPE), **changes)


class Zeros(Callback):
    """Keeps which part of a middle layer's weights is zero on every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        layer = pl_module.net[2]
        self.seen.append(float((layer.quantized_weight() == 0).float().mean()))
        self.last = layer.layer_spec


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_accumulators_have_room_for_codes_of_a_wider_stage(bits):
    spec = LayerSpec(bits=bits, quantizer="a2q", granularity="channel", accumulator_bits=10)
    wide = _widened(spec, 8)
    parts = [limit_of(s, False) / s.weight_codes.largest for s in (spec, wide)]  # of the largest weight
    assert parts[0] <= parts[1] < 2.1 * parts[0]


@pytest.mark.parametrize("quantizer", ["a2q", "a2q_plus"])
def test_bounded_sums_leave_wider_stages_no_fewer_weights(quantizer):
    spec = {**QUANTIZATION, "bits": 4, "granularity": "channel", "accumulator_bits": 14, "first_last_bits": None}
    parts = []
    for stages in ([], [lq.ProgressiveBits([8], until=0.5)]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(4)]
        net, zeros = nn.Sequential(*layers), Zeros()
        net(torch.zeros(1, *SHAPE))
        one = Plain(net, optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
        fit(one, [lq.LearnedQuantization(**spec, quantizer=quantizer), *stages, zeros], loader(8, shape=SHAPE))
        assert zeros.last.accumulator_bits == 14
        parts.append(zeros.seen)
    plain, progressive = parts
    assert max(plain) < 0.5
    assert max(progressive[:4]) < plain[0]
