import pytest
import torch
from torch import nn

import lq
from lq.metrics import Alignment, QuantizationLoss
from lq.network import layer_statistics, scale_parameters
from lq.nn import named_quantized_layers
from lq.tracking import layer_metric, metric, network_metrics
from tests.helpers import numpy_reference
from tests.helpers.modules import mlp


@pytest.fixture
def model():
    model = mlp()
    lq.quantize_model(model, lq.QuantSpec(bits=3))
    lq.set_slope(model, 3.0)
    return model


@pytest.mark.parametrize("kind", ["nearest", "l1", "sine"])
def test_regularizer_is_the_sum_over_layers(model, kind):
    expected = sum(
        numpy_reference.regularizer(
            layer.weight.detach().double().numpy(),
            layer.weight_quantizer.scale.item(),
            *layer.weight_quantizer.codes,
            kind=kind,
        )
        for layer in named_quantized_layers(model).values()
    )
    assert lq.scale_regularizer(model, kind=kind).item() == pytest.approx(expected, rel=1e-4)


def test_regularizer_on_the_quantized_weight_fades_as_the_slope_grows():
    layer = nn.Linear(1, 1, bias=False)
    model = nn.Sequential(layer)
    lq.quantize_model(model, lq.QuantSpec(first_last_bits=None, slope_backward_max=None))
    with torch.no_grad():
        layer.weight.fill_(1.25 * layer.weight_quantizer.scale.item())
    sizes = []
    for slope in (4.0, 12.0, 60.0):
        lq.set_slope(model, slope)
        sizes.append(torch.autograd.grad(lq.scale_regularizer(model, on="quantized"), layer.weight)[0].abs().item())
    latent = torch.autograd.grad(lq.scale_regularizer(model), layer.weight)[0].abs().item()
    assert latent > sizes[0] > sizes[1] > 1e3 * sizes[2]


def test_regularizer_bad_input(model):
    with pytest.raises(ValueError, match="regularizer_on must be 'latent' or 'quantized', got 'soft'"):
        lq.scale_regularizer(model, on="soft")
    with pytest.raises(ValueError, match="model must have quantized layers, got none: call lq.quantize_model"):
        lq.scale_regularizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="slope must not be negative, got -1"):
        lq.set_slope(model, -1)


def test_descending_the_regularizer_alone_aligns_the_weights(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        lq.scale_regularizer(model).backward()
        optimizer.step()
    assert network_metrics(model)["lq/alignment"] > 0.999


def test_parameter_groups_split_scales_from_the_rest(model):
    rest, scales = lq.parameter_groups(model, weight_decay=0.1, scale_lr=1e-3)
    assert (rest["weight_decay"], scales["weight_decay"], scales["lr"]) == (0.1, 0.0, 1e-3)
    assert {id(p) for p in scales["params"]} == {id(p) for p in scale_parameters(model)}
    assert len(rest["params"]) + len(scales["params"]) == len(list(model.parameters()))
    torch.optim.SGD([rest, scales], lr=0.1)


def test_size_counts_packed_codes_and_scales(model):
    size = lq.network_size(model)
    assert size.weights == 8 * 16 + 16 * 16 + 16 * 4
    assert size.packed_bytes == (8 * 16) + (16 * 16 * 3) // 8 + (16 * 4) + 3 * 4
    assert size.float_bytes == 4 * size.weights
    assert size.rest_bytes == 4 * (16 + 16 + 4)


def test_metrics_of_the_network_are_those_of_its_layers_together(model):
    values = network_metrics(model)
    layers = layer_statistics(model)
    loss = sum(float(s.loss) for s in layers.values())
    assert values["lq/quantization_loss"] == pytest.approx(loss)
    assert set(values) == {
        *(metric(n) for n in ("alignment", "alignment_soft", "quantization_loss", "sqnr_db")),
        *(metric(n) for n in ("clipped_fraction", "zero_fraction", "size_bytes", "bits_per_weight")),
        *(
            layer_metric(n, path)
            for path in layers
            for n in (
                "alignment",
                "alignment_soft",
                "quantization_loss",
                "sqnr_db",
                "clipped_fraction",
                "zero_fraction",
            )
        ),
    }
    assert values["lq/alignment_soft"] > values["lq/alignment"]


def test_soft_alignment_rises_with_the_slope_alone(model):
    values = []
    for slope in (0.0, 4.0, 30.0):
        lq.set_slope(model, slope)
        values.append(network_metrics(model))
    assert values[0]["lq/alignment_soft"] < values[1]["lq/alignment_soft"] < values[2]["lq/alignment_soft"]
    assert values[0]["lq/alignment"] == values[2]["lq/alignment"]


def test_torchmetrics_agree_with_the_statistics_and_add_up(model):
    alignment, loss, ratio = Alignment(), QuantizationLoss(), QuantizationLoss(sqnr=True)
    for layer in named_quantized_layers(model).values():
        for m in (alignment, loss, ratio):
            m.update(layer.weight, layer.weight_quantizer)
    values = network_metrics(model)
    assert alignment.compute().item() == pytest.approx(values["lq/alignment"], rel=1e-5)
    assert loss.compute().item() == pytest.approx(values["lq/quantization_loss"], rel=1e-5)
    assert ratio.compute().item() == pytest.approx(values["lq/sqnr_db"], rel=1e-5)
    with pytest.raises(ValueError, match="power must be 2 or 4, got 3"):
        QuantizationLoss(power=3)


def test_unknown_metric_name():
    with pytest.raises(ValueError, match="metric name must be one of .* got 'aligment'"):
        metric("aligment")
