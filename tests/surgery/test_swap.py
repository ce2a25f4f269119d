import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torchmetrics import Metric

import lq
from lq.nn import QuantLayer, named_quantized_layers
from lq.surgery import find_layers, layer_specs, set_widths
from tests.helpers.modules import mlp, small_cnn

# convolution and linear layers of ten timm networks, counted by hand once
NETWORKS = {
    "resnet18": 21,
    "mobilenetv3_small_050": 54,
    "tf_efficientnet_b0": 82,
    "convnext_atto": 41,
    "vit_tiny_patch16_224": 50,
    "nf_regnet_b0": 87,
    "mobilevit_xxs": 72,
    "swin_tiny_patch4_window7_224": 53,
    "resnetv2_50": 54,
    "regnety_002": 71,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_networks_are_quantized_whole_and_train(name):
    options = {"img_size": 64} if "vit_tiny" in name or "swin" in name else {}
    model, x = timm.create_model(name, num_classes=10, **options), torch.randn(2, 3, 64, 64)
    report = lq.quantize_model(model, lq.QuantSpec(), x[:1])
    assert len(report.quantized) == len(report.rows) == NETWORKS[name]
    assert report.order == "execution order"
    lq.calibrate(model.train(), [x])
    lq.set_slope(model, 4.0)
    loss = model(x).square().mean()
    loss.backward()
    assert bool(torch.isfinite(loss))
    scales = [p for n, p in model.named_parameters() if n.endswith("scale") and "quantizer" in n]
    assert len(scales) == 2 * NETWORKS[name]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in scales)


class Backwards(nn.Module):
    """Registers its layers in the opposite order of execution."""

    def __init__(self):
        super().__init__()
        self.head, self.middle, self.stem = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x, *, twice=False):
        x = self.head(self.middle(self.stem(x)))
        return x * 2 if twice else x


@pytest.mark.parametrize("example", [torch.ones(1, 4), (torch.ones(1, 4),), {"x": torch.ones(1, 4), "twice": True}])
def test_first_and_last_follow_execution_where_an_example_is_given(example):
    model = Backwards().train()
    report = lq.quantize_model(model, lq.QuantSpec(bits=2), example)
    assert {row.path: (row.bits, row.reason) for row in report.rows} == {
        "stem": (8, "first block"),
        "middle": (2, ""),
        "head": (8, "last block"),
    }
    assert model.training


def test_first_and_last_follow_registration_otherwise_and_the_report_says_so():
    report = lq.quantize_model(Backwards(), lq.QuantSpec(bits=2))
    assert [row.reason for row in report.rows] == ["first block", "", "last block"]
    assert report.rows[0].path == "head"
    assert "registration order" in str(report)


def test_include_exclude_by_path_and_by_type():
    report = lq.quantize_model(small_cnn(), lq.QuantSpec(include=["type:Conv2d"], exclude=["3"]))
    assert {row.path: row.reason for row in report.skipped} == {"3": "excluded", "10": "not included"}
    assert {row.path for row in report.quantized} == {"0", "6"}
    assert lq.quantize_model(small_cnn(), lq.QuantSpec(exclude=[nn.Linear])).skipped[0].path == "10"


@pytest.mark.parametrize("field", ["include", "exclude", "overrides"])
def test_a_glob_without_a_match_is_an_error_and_changes_nothing(field):
    model = mlp()
    value = {"layer9.*": {"bits": 8}} if field == "overrides" else ["layer9.*"]
    with pytest.raises(
        ValueError, match=rf"{field} glob must match a layer, got 'layer9.\*' which matches none of: 0, 2"
    ):
        lq.quantize_model(model, lq.QuantSpec(**{field: value}))
    assert not named_quantized_layers(model)


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.MultiheadAttention(4, 2))])
def test_nothing_to_quantize_is_an_error(model):
    with pytest.raises(ValueError, match="model must have a convolution or linear layer to quantize, got Sequential"):
        lq.quantize_model(model)


def test_everything_excluded_is_an_error_that_lists_the_layers():
    with pytest.raises(ValueError, match="0: excluded; 2: excluded; 4: excluded"):
        lq.quantize_model(mlp(), lq.QuantSpec(exclude=["*"]))


def test_overrides_reach_the_layer():
    model = mlp()
    lq.quantize_model(
        model,
        lq.QuantSpec(overrides={"2": {"bits": 3, "quantizer": "lsq", "granularity": "channel", "activation": None}}),
    )
    assert type(model[2].weight_quantizer).__name__ == "LSQQuantizer"
    assert model[2].weight_quantizer.scale.shape == (16,)
    assert model[2].input_quantizer is None
    assert model[2].weight_quantizer.codes.bits == 3


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared)
    report = lq.quantize_model(model)
    assert model[1] is model[3] is shared
    assert [row.path for row in report.rows] == ["0", "1"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.first = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.b.weight = self.a.weight
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.first(self.embedding(x)))))


def test_tied_weights_stay_tied_with_one_scale():
    model = Tied()
    report = lq.quantize_model(model, lq.QuantSpec(bits=3), torch.tensor([[1, 2]]))
    assert model.a.weight is model.b.weight
    assert model.a.weight_quantizer is model.b.weight_quantizer
    assert model.head.weight is model.embedding.weight
    assert {row.path: row.reason for row in report.rows}["b"] == "weight tied to a"
    model(torch.tensor([[1, 2]])).sum().backward()
    names = [n for n, _ in model.named_parameters()]
    assert len(names) == len(set(names))
    twin = Tied()
    lq.quantize_model(twin, lq.QuantSpec(bits=3), torch.tensor([[1, 2]]))
    twin.load_state_dict(model.state_dict())
    value = lq.scale_regularizer(model)
    assert value.item() == pytest.approx(lq.scale_regularizer(twin).item())


def test_parametrized_layers_are_not_taken_for_tied():
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(6)))
    report = lq.quantize_model(model, lq.QuantSpec(bits=3))
    assert [row.bits for row in report.rows] == [8, 3, 3, 3, 3, 8]
    assert len({id(layer.weight_quantizer) for layer in model}) == 6
    assert lq.network_size(model).weights == 6 * 64


def test_dequantizing_leaves_floats_that_share_the_weight_alone():
    model = Tied()
    lq.quantize_model(model, lq.QuantSpec(bits=2, activation=None, exclude=["b"]))
    x = torch.tensor([[1, 2]])
    y = model.eval()(x)
    lq.dequantize_model(model)
    assert torch.equal(model(x), y)


def test_transformer_layers_with_one_linear_excluded_are_quantized_in_evaluation_too():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 1).eval()
    lq.quantize_model(encoder, lq.QuantSpec(bits=2, first_last_bits=None, activation=None, exclude=["*.linear1"]))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        inferred = encoder(x)
    torch.testing.assert_close(inferred, encoder(x.requires_grad_()).detach())


class AfterRecurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.a, self.b, self.c = nn.LSTM(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(self.rnn(x)[0])))


def test_ends_are_found_among_layers_that_can_be_quantized():
    report = lq.quantize_model(AfterRecurrence(), lq.QuantSpec(bits=3), torch.randn(1, 2, 4))
    assert {row.path: row.bits for row in report.quantized} == {"a": 8, "b": 3, "c": 8}


def test_tied_ends_take_the_wider_codes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[2].weight
    report = lq.quantize_model(model, lq.QuantSpec(bits=2))
    assert [row.bits for row in report.rows] == [8, 8, 8]


def test_attention_is_listed_with_the_reason():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    report = lq.quantize_model(model)
    skipped = {row.path: row.reason for row in report.skipped}
    assert "without calling its children" in skipped["layers.0.self_attn"]
    assert "without calling the layer" in skipped["layers.0.self_attn.out_proj"]
    assert [row.path for row in report.quantized][:2] == ["layers.0.linear1", "layers.0.linear2"]


def test_transformer_layers_are_quantized_in_evaluation_too():
    """Their inference fast path would read the float weights past the quantized layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x = torch.randn(2, 5, 8)
    lq.quantize_model(encoder, lq.QuantSpec(bits=2, first_last_bits=None, activation=None))
    with torch.no_grad():
        inferred = encoder(x)
    quantized = encoder(x.requires_grad_()).detach()  # gradients rule the fast path out
    torch.testing.assert_close(inferred, quantized)
    lq.dequantize_model(encoder)
    torch.testing.assert_close(encoder(x).detach(), quantized)


class Unprobeable(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x * mask)


class NoOperator(nn.Linear):
    def forward(self, x):
        return (x.unsqueeze(-2) * self.weight).sum(-1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Unprobeable(4, 4), "cannot run its own forward on a probe input: .*mask"),
        (NoOperator(4, 4), "gives its weight to 0 convolution or linear operators"),
        (nn.LazyLinear(4), "its shape is not known yet"),
        (nn.Linear(4, 4, device="meta"), "meta device"),
        (weight_norm(nn.Linear(4, 4)), "use torch.nn.utils.parametrizations"),
        (nn.Bilinear(4, 4, 4), "Bilinear is no convolution or linear layer"),
        (nn.LSTM(4, 4), "LSTM is no convolution or linear layer"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_what_cannot_be_quantized_is_listed_with_the_reason(layer, reason):
    import re

    report = lq.quantize_model(nn.ModuleList([nn.Linear(4, 4), layer]))
    assert [row.path for row in report.skipped] == ["1"]
    assert re.search(reason, report.skipped[0].reason)


class Perceptual(Metric):
    """A metric with a network of its own, as LPIPS and FID have."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def update(self): ...

    def compute(self): ...


def test_networks_inside_metrics_are_left_alone():
    report = lq.quantize_model(nn.ModuleDict({"net": nn.Linear(4, 4), "metric": Perceptual()}))
    assert [(row.path, row.reason) for row in report.skipped] == [("metric.net", "it belongs to a metric")]


def test_embeddings_and_norms_are_not_listed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4), nn.LayerNorm((3, 4)), nn.BatchNorm2d(4))
    assert [f.path for f in find_layers(model)] == ["0"]


def test_weights_that_are_not_finite_are_refused():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight of Linear holds NaN or infinite values"):
        lq.quantize_model(model)


def test_a_wrapped_model_and_a_wrong_spec_are_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="must not be wrapped in DistributedDataParallel: quantize it first"):
            lq.quantize_model(nn.parallel.DistributedDataParallel(mlp()))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(TypeError, match="spec must be an lq.QuantSpec, got"):
        lq.quantize_model(mlp(), {"bits": 4})


def test_a_second_call_leaves_quantized_layers_and_takes_new_ones():
    model = mlp()
    lq.quantize_model(model)
    scales = {n: p for n, p in model.named_parameters() if "scale" in n}
    model.append(nn.Linear(4, 4))
    report = lq.quantize_model(model)
    assert isinstance(model[5], QuantLayer)
    assert all(dict(model.named_parameters())[n] is p for n, p in scales.items())
    assert len(report.quantized) == 4


def test_dequantized_network_equals_the_quantized_one_exactly():
    model, x = small_cnn(), torch.randn(4, 3, 9, 9)
    lq.quantize_model(model, lq.QuantSpec(activation=None, granularity="channel", grid="mid_rise"))
    model.eval()
    y = model(x)
    twin = copy.deepcopy(model)
    assert lq.dequantize_model(twin) == ["0", "3", "6", "10"]
    assert torch.equal(twin(x), y)
    for path, layer in named_quantized_layers(model).items():
        assert torch.equal(twin.get_submodule(path).weight, layer.quantized_weight())
    assert lq.dequantize_model(twin) == []


def test_specs_of_a_model_are_kept_by_its_layers():
    model = mlp()
    lq.quantize_model(model, lq.QuantSpec(bits=3))
    assert [spec.bits for spec in layer_specs(model).values()] == [8, 3, 8]


def test_report_as_rows_and_text():
    report = lq.quantize_model(mlp(), lq.QuantSpec(bits=3, activation_bits=5, exclude=["4"]))
    rows = report.to_dicts()
    assert rows[1]["weight_shape"] == "16x16"
    assert (rows[1]["levels"], rows[1]["activation_bits"]) == (8, 5)
    assert "2 of 3 layers quantized" in str(report)


def test_zero_initialised_layers_get_a_positive_scale():
    model = mlp()
    nn.init.zeros_(model[4].weight)
    lq.quantize_model(model)
    assert model[4].weight_quantizer.scale.item() > 0


@pytest.mark.parametrize("method", ["apot", "log2", "dlq", "qn", "lsq", "subset"])
@pytest.mark.parametrize("frozen", [True, False])
def test_another_width_makes_nothing_learn_that_did_not(method, frozen):
    model = mlp()
    lq.quantize_model(model, lq.QuantSpec(quantizer=method, bits=3, first_last_bits=None))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and not frozen)
    before = {name: p.requires_grad for name, p in model.named_parameters() if "scale" in name}
    set_widths(model, {path: replace(spec, bits=4) for path, spec in layer_specs(model).items()})
    assert {name: p.requires_grad for name, p in model.named_parameters() if "scale" in name} == before
