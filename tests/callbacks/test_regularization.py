"""Where the regularizer has something to pull."""

import pytest
import torch

import lq
from lq.callbacks.regularization import add_regularizer
from lq.quantizers import REGISTRY
from tests.helpers.modules import Plain, fit


@pytest.mark.parametrize("quantizer", REGISTRY)
def test_quantized_weights_are_pulled_where_training_sees_them_between_levels_and_refused_elsewhere(quantizer):
    torch.manual_seed(0)
    module = Plain()
    granularity = "channel" if quantizer.startswith("a2q") else "tensor"
    given = {"bits": 3, "quantizer": quantizer, "granularity": granularity, "regularizer_on": "quantized"}
    callback = lq.LearnedQuantization(**given, first_last_bits=None, calibration_batches=2, strength_start=0)
    if quantizer not in ("soft", "subset", "codebook", "qn", "dsq"):
        with pytest.raises(ValueError, match="regularizer_on must be 'latent' for weight quantizers without a soft"):
            fit(module, [callback])
        return
    fit(module, [callback])
    weight = module.net[2].weight.detach().clone().requires_grad_()
    value = module.net[2].weight_quantizer.regularizer(weight, kind="nearest", on="quantized")
    assert value > 0
    assert torch.autograd.grad(value, weight)[0].abs().sum() > 0
    module.zero_grad()
    parameters = dict(module.named_parameters())
    assert add_regularizer(module, [{"params": list(parameters.values())}], callback.anneal, 1.0) > 0
    learns = {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learns == {"net.0.weight", "net.2.weight", "net.4.weight"}
