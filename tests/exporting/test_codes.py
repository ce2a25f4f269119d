import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lq
from lq.exporting import save_codes
from lq.nn import named_quantized_layers
from tests.helpers.modules import small_cnn


@pytest.mark.parametrize("grid", ["mid_tread", "mid_rise"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_codes_and_scales_give_back_the_weights_exactly(tmp_path, grid, granularity):
    model = small_cnn()
    lq.quantize_model(model, lq.QuantSpec(bits=3, grid=grid, granularity=granularity))
    path = save_codes(model, tmp_path / "deep" / "net.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["lq"])["layers"]
    assert set(layers) == set(named_quantized_layers(model))
    for name, layer in named_quantized_layers(model).items():
        codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        assert codes.dtype == torch.int8
        assert layers[name]["lo"] <= codes.min() <= codes.max() <= layers[name]["hi"]
        scale = scale.view(-1, *[1] * (codes.dim() - 1)) if granularity == "channel" else scale
        assert torch.equal((codes.float() + layers[name]["offset"]) * scale, layer.quantized_weight())


def test_codes_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4))
    lq.quantize_model(model)

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    save_codes(model, tmp_path / "codes.safetensors")
    before = (tmp_path / "codes.safetensors").read_bytes()
    monkeypatch.setattr("lq.exporting.codes.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_codes(model, tmp_path / "codes.safetensors")
    assert (tmp_path / "codes.safetensors").read_bytes() == before
