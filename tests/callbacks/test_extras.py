"""What helps at few bits goes with every quantizer: all of it at once, for each one that there is."""

from contextlib import nullcontext

import pytest
import torch

import lq
from lq.nn import named_quantized_layers
from lq.quantizers import REGISTRY
from lq.spec import LayerSpec
from tests.helpers.modules import Plain, fit, loader, small_cnn

SHAPE = (3, 8, 8)
PULL = {"regularizer": "nearest", "strength": 0.2, "strength_start": 0, "strength_schedule": "cosine"}  # dampening


def callbacks(quantizer, **settings):
    falling = [] if quantizer == "nulsq" else [lq.ProgressiveBits([8, 4], until=0.5)]  # as many steps as levels
    extras = [*falling, lq.SelfDistillation("net"), lq.DelayedActivations(until=0.2), lq.IterativeFreezing(0.5, 0.1)]
    granularity = "channel" if quantizer.startswith("a2q") else "tensor"
    given = {"bits": 3, "quantizer": quantizer, "granularity": granularity, "calibration_batches": 2, **settings}
    return [lq.LearnedQuantization(**given, weight_decay_by_bits=True), *extras]


@pytest.mark.parametrize("quantizer", REGISTRY)
def test_every_quantizer_trains_with_all_extras(quantizer):
    torch.manual_seed(0)
    module = Plain(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-4))
    before = module.net[0].weight.detach().clone()
    # weights that others are computed from stay free, and those that their scale follows
    free = LayerSpec(quantizer=quantizer).normalized or quantizer in ("dlq", "log2", "minmax", "oaq", "pact")
    with pytest.warns(UserWarning, match="cannot be frozen") if free else nullcontext():
        trainer = fit(module, callbacks(quantizer, **PULL), loader(shape=SHAPE), epochs=2)
    assert trainer.global_step == 24
    assert not torch.equal(module.net[0].weight, before)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())
    inner = list(named_quantized_layers(module).values())[1:-1]
    for layer in inner:
        assert layer.weight_quantizer.codes.bits == 3
        assert layer.input_quantizer.is_calibrated
        assert len(layer.quantized_weight().unique()) <= 8 * layer.weight_quantizer.layout.scales
    assert bool(torch.isfinite(module.eval()(torch.randn(2, *SHAPE))).all())
