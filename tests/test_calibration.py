import pytest
import torch
from torch import nn

import lq
from lq.calibration import uncalibrated_layers
from tests.helpers.modules import mlp, small_cnn


def batches(count=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(16, 3, 9, 9, generator=generator) - 0.5 for _ in range(count)]


def test_decides_signs_and_sets_scales_near_the_optimum():
    model = small_cnn()
    lq.quantize_model(model)
    assert len(uncalibrated_layers(model)) == 4
    assert lq.calibrate(model, batches()) == ["0", "3", "6", "10"]
    assert not uncalibrated_layers(model)
    first, second = model[0].input_quantizer, model[3].input_quantizer
    assert first.quantizer.codes.lo == -127
    assert second.quantizer.codes.lo == 0
    x = torch.cat(batches()).flatten()
    error = (first.eval()(x) - x).square().mean()
    assert error < 1.2 * (1 / 254) ** 2 / 12


def test_leaves_mode_statistics_and_random_state_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()
    lq.quantize_model(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" not in k}
    batch, state = torch.randn(16, 8), torch.get_rng_state()
    lq.calibrate(model, [batch])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_is_reproducible():
    scales = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8))
        lq.quantize_model(model)
        lq.calibrate(model, [torch.linspace(-1, 1, 800).view(100, 8)])
        scales.append(model[0].input_quantizer.quantizer.scale.item())
    assert scales[0] == scales[1]


def test_takes_tuples_mappings_and_a_forward_of_the_users():
    for batch, forward in (
        ((torch.rand(4, 8), "label"), None),
        ({"input": torch.rand(4, 8)}, None),
        ("ignored", lambda model, _: model(torch.rand(4, 8))),
    ):
        model = nn.Linear(8, 2)
        wrapper = nn.Sequential(model)
        lq.quantize_model(wrapper)
        target = model if isinstance(batch, dict) else wrapper
        lq.calibrate(target, [batch], forward)
        assert not uncalibrated_layers(wrapper)
        assert model.input_quantizer.observer is None


def test_bad_input():
    model = mlp()
    lq.quantize_model(model)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        lq.calibrate(model, [])
    with pytest.raises(ValueError, match="not finite"):
        lq.calibrate(model, [torch.full((2, 8), float("nan"))])
    assert all(layer.input_quantizer.observer is None for layer in (model[0], model[2], model[4]))


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_layers_that_are_not_reached_are_named():
    model = Half()
    lq.quantize_model(model)
    with pytest.warns(UserWarning, match="calibration did not reach unused: their inputs stay in float"):
        lq.calibrate(model, [torch.rand(2, 4)])
    assert uncalibrated_layers(model) == ["unused"]


def test_batch_norms_are_re_estimated_under_hard_quantization():
    model = small_cnn().train()
    lq.quantize_model(model, lq.QuantSpec(bits=2, first_last_bits=None))
    lq.calibrate(model, batches())
    lq.set_slope(model, 1.0)
    data = batches(4)
    assert lq.reestimate_batch_norm(model, data) == 2
    assert model.training
    assert model[1].momentum == 0.1
    model.eval()
    means = torch.stack([model[0](x).mean(dim=(0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)


def test_no_batch_leaves_the_statistics_as_they_were():
    norm = nn.BatchNorm1d(2)
    norm(torch.randn(8, 2))
    before = norm.running_mean.clone()
    with pytest.raises(ValueError, match="at least one batch"):
        lq.reestimate_batch_norm(nn.Sequential(norm), [])
    assert torch.equal(norm.running_mean, before)
    assert lq.reestimate_batch_norm(nn.Linear(2, 2), []) == 0
