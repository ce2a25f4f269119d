"""Every method of the registry goes the whole way: trained with the callback, resumed, stored, exported, run."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lq
from lq.exporting.onnx import write_onnx
from lq.nn import named_quantized_layers
from lq.quantizers import REGISTRY
from tests.helpers.modules import Plain, loader, small_cnn
from tests.integration.test_resume import run, same_runs

SHAPE = (3, 8, 8)
SMALL = {"import_path": "tests.helpers.modules:small_cnn"}


def trained(folder, method, saver, ckpt_path=None):
    """A run of three epochs, from the start or from a checkpoint."""
    torch.manual_seed(0)
    module = Plain(small_cnn(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4))
    settings = {"granularity": "channel", "calibration_batches": 2, "strength": 0.2}
    callbacks = [lq.LearnedQuantization(bits=3, quantizer=method, **settings), saver]
    return run(folder, module, callbacks, ckpt_path, data=loader(shape=SHAPE), epochs=3)


@pytest.mark.parametrize("method", REGISTRY)
def test_a_method_goes_the_whole_way(tmp_path, method):
    saver = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer = trained(tmp_path / "whole", method, saver)
    module = trainer.lightning_module
    torch.manual_seed(0)
    before = small_cnn()
    layers = named_quantized_layers(module.net)
    for path, layer in layers.items():
        assert not torch.equal(layer.weight, before.get_submodule(path).weight), f"{path} was not trained"
        assert layer.layer_spec.quantizer in (method, "lsq")
        for name, parameter in layer.weight_quantizer.named_parameters():
            assert bool(torch.isfinite(parameter).all()), name
    other = ModelCheckpoint(tmp_path / "twice", save_top_k=0)
    again = trained(tmp_path / "again", method, other, str(tmp_path / "kept" / "epoch=1.ckpt"))
    same_runs(trainer, again)

    network, x = module.net.eval(), torch.randn(16, *SHAPE)
    with torch.no_grad():
        expected = network(x)
    loaded = lq.load(
        lq.save(network, tmp_path / "net.lq.safetensors", architecture=SMALL), allow=[SMALL["import_path"]]
    )
    assert torch.equal(loaded(x), expected)
    if method not in ("codebook", "dlq", "nulsq"):  # their levels are real numbers
        near = lq.IntegerNetwork(network, SHAPE)(x)
        assert float((near - expected).abs().max()) < 0.1 * float(expected.abs().max())
    runtime = pytest.importorskip("onnxruntime")
    path = write_onnx(network, tmp_path / "net.onnx", SHAPE)
    (y,) = runtime.InferenceSession(path).run(None, {"input": x.numpy()})
    assert np.median(np.abs(y - expected.numpy())) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("method", REGISTRY)
def test_what_is_stored_right_after_a_step_is_that_network(tmp_path, method):
    torch.manual_seed(0)
    network = small_cnn()
    lq.quantize_model(network, lq.QuantSpec(bits=3, quantizer=method, granularity="channel"))
    x = torch.randn(8, *SHAPE)
    lq.calibrate(network, [x])
    network.train()(x).square().sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    path = lq.save(network, tmp_path / "net.lq.safetensors", architecture=SMALL)
    assert torch.equal(lq.load(path, allow=[SMALL["import_path"]])(x), network.eval()(x))


def test_a_constant_weight_cannot_be_normalized():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(ValueError, match=r"normalize must be False for constant weights, layer '1' has such: give it"):
        lq.quantize_model(model, lq.QuantSpec(normalize=True))


@pytest.mark.parametrize("method", REGISTRY)
def test_ends_that_are_found_late_learn_what_their_method_learns(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    granularity = "channel" if method.startswith("a2q") else "tensor"
    lq.quantize_model(model, lq.QuantSpec(bits=3, quantizer=method, granularity=granularity))
    lq.calibrate(model, [torch.randn(16, 8)])
    for layer in named_quantized_layers(model).values():
        fixed = layer.layer_spec.quantizer in ("minmax", "oaq", "pact", "log2", "dlq", "nulsq")
        assert layer.weight_quantizer.scale.requires_grad != fixed
        inputs = layer.input_quantizer.quantizer
        learned = inputs.steps if layer.layer_spec.quantizer == "nulsq" else inputs.scale
        assert learned.requires_grad != (layer.layer_spec.quantizer in ("minmax", "oaq"))
