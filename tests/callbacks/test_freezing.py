import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lq
from lq.functional.oscillation import start_oscillation, track_oscillation
from tests.helpers.modules import Plain, fit, loader, mlp
from tests.integration.test_resume import run, same_runs

QUANTIZATION = {"bits": 3, "quantizer": "lsq", "regularizer": None, "calibration_batches": 2}


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)  # large steps: weights jump


def module():
    torch.manual_seed(0)
    return Plain(mlp(), optimizer=sgd)


def test_frequency_and_average_equal_a_loop_over_weights():
    torch.manual_seed(0)
    walk = torch.randint(-3, 4, (60, 5)).float()
    state = start_oscillation(walk[0])
    for positions in walk[1:]:
        state = track_oscillation(state, positions, 0.1)
    for j in range(5):
        last, frequency, average = 0, 0.0, float(walk[0, j])
        for before, now in zip(walk[:-1, j].tolist(), walk[1:, j].tolist(), strict=True):
            sign = (now > before) - (now < before)
            frequency = 0.9 * frequency + 0.1 * (sign != 0 and sign == -last)
            average = 0.9 * average + 0.1 * now
            last = sign or last
        assert state.frequency[j].item() == pytest.approx(frequency, abs=1e-5)
        assert state.average[j].item() == pytest.approx(average, abs=1e-5)
    assert not state.frozen.any()


class Levels(lq.callbacks.QuantizationTracker):
    """Keeps the codes of the first layer, by rank, after every step; stands behind the freezing."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        quantizer = pl_module.net[0].weight_quantizer
        self.seen.append(quantizer.rank(quantizer.encode(pl_module.net[0].weight)).float())


class Remembering(lq.IterativeFreezing):
    """Keeps which weights of the first layer were frozen after every step."""

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.history = [*getattr(self, "history", []), self.states["net.0"].frozen]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    "spec", [{}, {"granularity": "channel"}, {"quantizer": "subset"}, {"grid": "mid_rise"}, {"quantizer": "nulsq"}]
)
def test_what_is_frozen_stays_on_its_level_while_the_level_learns(tmp_path, spec, precision):
    freezing, levels = Remembering(0.05, 0.02, momentum=0.2), Levels()
    given = {**QUANTIZATION, "first_last_bits": None, **spec}
    callbacks = [lq.LearnedQuantization(**given), freezing, levels]
    trainer = fit(module(), callbacks, loader(40), logger=CSVLogger(tmp_path), precision=precision)
    layer = trainer.lightning_module.net[0]
    frozen = freezing.states["net.0"].frozen
    assert 0 < frozen.float().mean() < 1
    weight = layer.weight.detach()
    assert torch.equal(weight[frozen], layer.quantized_weight()[frozen])
    every = torch.cat([s.frozen.flatten() for s in freezing.states.values()]).float()
    assert float(trainer.callback_metrics["lq/frozen_fraction"]) == pytest.approx(float(every.mean()), abs=1e-3)
    before = freezing.history[-5]
    assert bool(before.any())
    recent = torch.stack(levels.seen[-5:])
    assert bool((recent == recent[-1]).all(0)[before].all())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("quantizer", ["lsq", "nulsq"])
def test_weights_whose_codes_never_change_are_not_frozen(quantizer, precision):
    """Scales and steps drift; that is no oscillation."""
    torch.manual_seed(0)
    still = Plain(mlp(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-4))
    freezing, levels = lq.IterativeFreezing(0.05, 0.02, momentum=0.2), Levels()
    given = {**QUANTIZATION, "quantizer": quantizer, "first_last_bits": None}
    fit(still, [lq.LearnedQuantization(**given), freezing, levels], loader(40), precision=precision)
    unchanged = (torch.stack(levels.seen) == levels.seen[0]).all(0)
    assert unchanged.float().mean() > 0.5
    assert not freezing.states["net.0"].frozen[unchanged].any()


def test_a_second_fit_starts_anew():
    freezing, quantization = lq.IterativeFreezing(0.05, 0.02, momentum=0.2), lq.LearnedQuantization(**QUANTIZATION)
    fit(module(), [quantization, freezing], loader(40))
    assert any(bool(state.frozen.any()) for state in freezing.states.values())
    fit(module(), [quantization, freezing], loader(2))
    assert freezing.step == 2
    assert not any(bool(state.frozen.any()) for state in freezing.states.values())


def test_without_freezing_more_weights_oscillate():
    def turns(callbacks):
        levels = Levels()
        fit(module(), [lq.LearnedQuantization(**QUANTIZATION, first_last_bits=None), *callbacks, levels], loader(60))
        state = start_oscillation(levels.seen[20])
        for positions in levels.seen[21:]:
            state = track_oscillation(state, positions, 0.1)
        return float(state.frequency.mean())

    assert turns([lq.IterativeFreezing(0.05, 0.01, momentum=0.2)]) < 0.7 * turns([])


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    def trained(folder, saver, ckpt_path=None):
        freezing = lq.IterativeFreezing(0.05, 0.02, momentum=0.2)
        callbacks = [lq.LearnedQuantization(**QUANTIZATION), freezing, saver]
        return run(folder, module(), callbacks, ckpt_path, data=loader(), epochs=3), freezing

    saver = ModelCheckpoint(tmp_path / "kept", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole, one = trained(tmp_path / "whole", saver)
    assert any(bool(state.frozen.any()) for state in one.states.values())
    again, two = trained(tmp_path / "again", ModelCheckpoint(tmp_path / "b"), tmp_path / "kept" / "epoch=0.ckpt")
    same_runs(whole, again)
    for path, state in one.states.items():
        assert all(torch.equal(a, b) for a, b in zip(state, two.states[path], strict=True))
    assert one.step == two.step == 36


def test_steps_are_counted_once_per_update():
    freezing = lq.IterativeFreezing()
    fit(module(), [lq.LearnedQuantization(**QUANTIZATION), freezing], accumulate_grad_batches=3)
    assert freezing.step == 4


def test_layers_that_compute_their_weight_are_left_alone_and_named():
    freezing = lq.IterativeFreezing()
    with pytest.warns(UserWarning, match=r"cannot be frozen and are left alone: \['net.2'"):
        fit(module(), [lq.LearnedQuantization(**QUANTIZATION, normalize=True), freezing])
    assert set(freezing.states) == {"net.0", "net.4"}  # the ends are not normalized


def test_weights_are_not_held_at_codes_whose_scale_widens_with_their_sums():
    oaq = {**QUANTIZATION, "quantizer": "oaq", "bits": 8, "accumulator_bits": 10, "first_last_bits": None}
    freezing = lq.IterativeFreezing(threshold_start=0.02, momentum=0.2)
    one = module()
    with pytest.warns(UserWarning, match="scale would move with weights that are held, .* left alone"):
        fit(one, [lq.LearnedQuantization(**oaq), freezing], epochs=3)
    assert one.net[2].weight_quantizer.range_factor > 1
    assert not freezing.states
    alone = module()
    fit(alone, [lq.LearnedQuantization(**oaq)], epochs=3)
    assert torch.equal(one.net[2].weight, alone.net[2].weight)


FOLLOWING = {
    "pact": {"quantizer": "pact", "bits": 2, "grid": "mid_rise"},
    "minmax": {"quantizer": "minmax", "bits": 3},
    "minmax, folded": {"quantizer": "minmax", "fold_norms": True},
    "log2": {"quantizer": "log2"},
    "dlq": {"quantizer": "dlq"},
}


@pytest.mark.parametrize("settings", FOLLOWING.values(), ids=list(FOLLOWING))
def test_weights_are_not_held_at_codes_whose_scale_they_would_move(settings):
    """The scale would fall or rise with every weight that is frozen, and the frozen weights with it."""
    given = {**QUANTIZATION, **settings, "first_last_bits": None}
    freezing = lq.IterativeFreezing(threshold_start=0.02, momentum=0.2)
    one, alone = module(), module()
    with pytest.warns(UserWarning, match="would move with weights that are held, cannot be frozen and are left alone"):
        fit(one, [lq.LearnedQuantization(**given), freezing], epochs=3)
    fit(alone, [lq.LearnedQuantization(**given)], epochs=3)
    assert not freezing.states
    assert torch.equal(one.net[2].weight, alone.net[2].weight)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"threshold_end must lie above 0 and not above threshold_start, 0.1, got 0.2"):
        lq.IterativeFreezing(threshold_start=0.1, threshold_end=0.2)
    with pytest.raises(ValueError, match="threshold_start must be a number and lie above 0 .*, got 'often'"):
        lq.IterativeFreezing(threshold_start="often")
    with pytest.raises(ValueError, match="momentum must lie above 0"):
        lq.IterativeFreezing(momentum=0)
    callbacks = [lq.LearnedQuantization(**QUANTIZATION, anneal_steps=5), lq.IterativeFreezing()]
    with pytest.raises(ValueError, match="needs a fit of known length"):
        fit(module(), callbacks, max_epochs=-1, max_steps=-1)
