"""What happens around the search, each against an independent computation."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

import lq.models  # noqa: F401  registers the networks
from lq.nn import CappedReLU, QuantLayer, SubstituteWeight, named_quantized_layers
from lq.point_search.activations import Histogram
from lq.point_search.adopt import adopt
from lq.point_search.bias import correct_biases, mean_inputs
from lq.point_search.blocks import BlockData, find_blocks
from lq.point_search.fold import equalize, fold_batch_norms
from lq.point_search.graph import trace_chains
from lq.point_search.inputs import (
    fisher_importance,
    hessians,
    input_importance,
    input_patches,
    multiplied,
    run,
    with_patches,
)
from lq.spec import QuantSpec
from lq.surgery import quantize_model


def randomized(model):
    """A network whose batch norms do something, one channel of each as good as off, another of negative factor."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            module.weight.data.uniform_(0.3, 1.5)
            module.bias.data.normal_(0, 0.3)
            module.weight.data[0] = -0.7
            module.weight.data[1] = 1e-6
    return model.eval()


@pytest.mark.parametrize(
    ("name", "folds"),
    [
        ("cifar_resnet20", 19),
        ("mobilenetv1_075_same", 27),
        ("resnet18", 20),
        ("mobilenetv2_100", 52),
        ("regnetx_002", 44),
    ],
)
def test_folding_and_equalizing_change_nothing(name, folds):
    model = randomized(timm.create_model(name))
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    chains, obstacle = trace_chains(model)
    assert not obstacle
    folded = fold_batch_norms(model, chains)
    assert list(folded.values()).count("") == folds
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    norms = {id(model.get_submodule(c.norm)): model.get_submodule(c.norm) for c in chains.values() if c.norm}
    for norm in norms.values():  # the factor that is left is a sign
        factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
        torch.testing.assert_close(factor[2:], torch.ones_like(factor[2:]), rtol=1e-4, atol=1e-4)
    equalized = equalize(model, chains)
    assert "" in equalized.values()
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_folding_keeps_the_network_trainable():
    """In training mode, too, it computes what it did: batch norms see scaled channels and their own factor."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    randomized(model)
    x = torch.randn(8, 3, 9, 9)
    expected = model.train()(x)
    randomized(model)
    chains, _ = trace_chains(model)
    fold_batch_norms(model, chains)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-3, atol=1e-3)


def test_equalized_ranges_meet():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU6(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    model[0].weight.data *= torch.logspace(-2, 1, 6).reshape(-1, 1, 1, 1)
    x = torch.randn(2, 2, 9, 9)
    before = model(x)
    done = equalize(model, trace_chains(model)[0])
    assert done == {"0": "", "2": "", "4": "no ReLU leads from it to one layer alone"}
    assert isinstance(model[1], CappedReLU)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    first, depthwise = model[0].weight.flatten(1).abs().amax(1), model[2].weight.flatten(1).abs().amax(1)
    torch.testing.assert_close(first, depthwise, rtol=1e-2, atol=1e-4)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.a(x)
        return self.bn(y) + y + F.relu(self.b(self.b(x)))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_only_what_is_used_alone_is_moved():
    chains, _ = trace_chains(Branching())
    assert chains["a"].norm is None  # its output is added, too
    assert "b" not in chains  # called twice
    chains, obstacle = trace_chains(Untraceable())
    assert chains == {}
    assert "TraceError" in obstacle


LAYERS = {
    "linear": (nn.Linear(5, 4), (7, 5)),
    "tokens": (nn.Linear(5, 4), (2, 7, 5)),
    "conv": (nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), (2, 3, 9, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1, groups=1), (2, 3, 8)),
    "same": (Conv2dSame(3, 4, 3, stride=2), (2, 3, 8, 8)),
    "standardized": (ScaledStdConv2d(3, 4, 3), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_are_what_the_weights_multiply(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    patches = input_patches(layer, x)
    weight = torch.randn_like(layer.weight)
    rows = weight.reshape(len(patches), weight.shape[0] // len(patches), -1)
    by_hand = torch.einsum("gpd,god->gop", patches, rows).sum(-1).flatten()
    with torch.no_grad(), SubstituteWeight(weight.shape, lambda _: weight):
        y = layer(x)
        if layer.bias is not None:
            channels_last = isinstance(layer, nn.Linear)
            y = y - (layer.bias if channels_last else layer.bias.reshape(-1, *[1] * (y.dim() - 2)))
    axis = -1 if isinstance(layer, nn.Linear) else 1
    torch.testing.assert_close(y.movedim(axis, 0).flatten(1).sum(1), by_hand, rtol=1e-4, atol=1e-4)
    # and the sum of what each weight multiplies, channel by channel of the output
    expected = patches.sum(1)[:, None].expand(-1, rows.shape[1], -1).reshape(weight.shape)
    torch.testing.assert_close(multiplied(layer, x), expected, rtol=1e-4, atol=1e-4)


def test_transposed_layers_have_importance_but_no_patches():
    layer = nn.ConvTranspose2d(3, 2, 3, stride=2)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(multiplied(layer, x)[0, 0], x[:, 0].sum().expand(3, 3), rtol=1e-4, atol=1e-4)
    assert with_patches({"a": layer, "b": nn.Conv3d(1, 1, 1), "c": nn.Linear(1, 1)}).keys() == {"c"}


def test_hessians_and_importance_sum_over_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    layers = {"0": model[0], "2": model[2]}
    batches = [torch.randn(5, 4), (torch.randn(3, 4), torch.zeros(3))]
    x = torch.cat([batches[0], batches[1][0]])
    found = hessians(model, layers, batches)
    torch.testing.assert_close(found["0"][0].float(), x.T @ x)
    h = input_importance(model, layers, batches)
    expected = x.square().mean(0) / x.square().mean()
    torch.testing.assert_close(h["0"], expected.expand(3, 4))
    hidden = model[0](x).relu().square().mean(0)
    torch.testing.assert_close(h["2"], (hidden / hidden.mean()).expand(2, 3))


def test_fisher_is_the_mean_square_of_single_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    x = torch.randn(4000, 3)
    h = fisher_importance(model, {"0": model[0]}, [x])["0"]
    p = model(x).softmax(-1).detach()
    # E over classes of (p_o - 1[c = o])^2 x_i^2 = p_o (1 - p_o) x_i^2
    expected = torch.einsum("no,ni->oi", p * (1 - p), x.square())
    torch.testing.assert_close(h, expected / expected.mean(), rtol=0.1, atol=0.02)
    assert model[0].weight.requires_grad
    assert model[0].weight.grad is None
    again = fisher_importance(model, {"0": model[0]}, [(x, torch.zeros(4000))], lambda m, batch: m(batch[0]))["0"]
    torch.testing.assert_close(again, h)
    with pytest.raises(ValueError, match="the model must return logits for importance='fisher', got tuple"):
        fisher_importance(model, {"0": model[0]}, [x], lambda m, batch: (m(batch),))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="layers must hold their weights as parameters"):
        fisher_importance(normed, {"0": normed[0]}, [x])


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got tensors of shapes \[\(2, 7\)\].*Pass batches"):
        run(nn.Linear(3, 2), [torch.zeros(2, 7)])
    with pytest.raises(ValueError, match="at least one batch, got none"):
        run(nn.Linear(3, 2), [])


@pytest.mark.parametrize("sizes", [(1.0, 0.1), (0.01, 300.0), (1.0, 1.0)])
def test_histogram_counts_all_values_whatever_comes_first(sizes):
    torch.manual_seed(0)
    histogram, parts = Histogram(), [torch.randn(5000) * size for size in sizes]
    for part in parts:
        histogram(part)
    values, counts = histogram.points()
    x = torch.cat(parts)
    assert float(counts.sum()) == len(x)
    assert float((values.double() * counts).sum()) == pytest.approx(float(x.double().sum()), abs=1e-2)
    assert histogram.lowest == float(x.min())
    assert histogram.width <= 2 * float(x.abs().max()) / 2048
    with pytest.raises(ValueError, match="activations must be finite"):
        histogram(torch.tensor([float("nan")]))


def test_bias_correction_restores_the_mean_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False))
    randomized(model)
    batches = [torch.rand(16, 3, 10, 10) + 1]
    chains, _ = trace_chains(model)
    floats = {p: model.get_submodule(p).weight.detach().clone() for p in ("0", "3")}
    means = mean_inputs(model, {p: model.get_submodule(p) for p in ("0", "3")}, batches)
    first, second = model[:2](batches[0]), model[3](model[:3](batches[0]))
    hidden = model[:3](batches[0])
    quantize_model(model, QuantSpec(bits=2, activation=None, first_last_bits=None))
    layers = named_quantized_layers(model)
    spoilt = (model[:2](batches[0]) - first).mean((0, 2, 3)).abs().max()
    assert correct_biases(model, layers, floats, means, chains) == ["0", "3"]
    assert spoilt > 0.05
    assert (model[:2](batches[0]) - first).mean((0, 2, 3)).abs().max() < 1e-3
    assert model[0].bias is None  # it went into the running mean
    assert (model[3](hidden) - second).mean((0, 2, 3)).abs().max() < 1e-3
    with pytest.raises(ValueError, match="batches must hold inputs of one size"):
        mean_inputs(model, layers, [batches[0], torch.rand(2, 3, 12, 12)])


def test_blocks_of_real_networks():
    resnet = timm.create_model("cifar_resnet20")
    paths = [p for p, m in resnet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    blocks = find_blocks(resnet, paths)
    assert blocks["layer1.0"] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert blocks["conv1"] == ["conv1"]
    assert len(blocks) == 11
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    paths = [p for p, m in vit.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {"blocks.0.attn", "blocks.0.mlp", "head"} <= set(find_blocks(vit, paths))


class TwiceTheSame(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU6()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


def tied_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
        tied_convolutions(),
        TwiceTheSame(),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Conv2d(3, 3, 1)),
    ],
    ids=["parametrized", "tied", "shared activation", "no statistics"],
)
def test_what_cannot_be_moved_safely_is_left(model):
    model.eval()
    x = torch.randn(4, 3, 5, 5) * 3
    before = model(x)
    chains, _ = trace_chains(model)
    assert all(fold_batch_norms(model, chains).values())
    assert all(equalize(model, chains).values())
    assert torch.equal(model(x), before)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.inner(x))


def test_block_inputs_are_the_same_along_a_chain_and_through_the_network():
    torch.manual_seed(0)
    model = nn.Sequential(Nested(), Nested(), nn.ReLU(), Nested())
    model.eval()
    batches = [torch.randn(6, 3), torch.randn(6, 3)]
    data = BlockData(model, model, ["0", "1", "3"], batches, None)
    assert data.before == {"1": "0"}
    x = torch.cat(batches)
    for path, expected in (("0", x), ("1", model[0](x)), ("3", model[:3](x))):
        inputs, outputs = data.of(path)
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(outputs, model.get_submodule(path)(expected))


def test_an_activation_in_place_between_blocks_is_no_link():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)).eval()
    batches = [torch.randn(2, 3, 5, 5)]
    data = BlockData(model, model, ["0", "2"], batches, None)
    assert data.before == {}
    data.of("0")
    inputs, _ = data.of("2")
    torch.testing.assert_close(inputs, model[:2](batches[0]))


def test_a_block_called_twice_is_left():
    a = nn.Linear(3, 3)
    model = nn.Sequential(a, nn.ReLU(), a).eval()
    assert BlockData(model, model, ["0"], [torch.randn(2, 3)], None).of("0") == (None, None)


def test_blocks_are_the_same_inside_a_wrapper():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("cifar_resnet20")

    paths = [p for p, m in Wrapper().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    blocks = find_blocks(Wrapper(), paths)
    assert len(blocks) == 11
    assert blocks["net.conv1"] == ["net.conv1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_hold_in_half_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    batches = [torch.randn(3, 4, dtype=dtype) * 60 for _ in range(200)]
    x = torch.cat(batches).double()
    h = input_importance(model, {"0": model[0]}, batches)["0"].double()
    torch.testing.assert_close(h, (x.square().mean(0) / x.square().mean()).expand(3, 4), rtol=0.02, atol=0.02)
    products = hessians(model, {"0": model[0]}, batches)["0"][0]
    torch.testing.assert_close(products, x.T @ x, rtol=0.02, atol=1e3)


def test_adopting_keeps_every_module_and_parameter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3, bias=False))
    kept = dict(model.named_modules()), dict(model.named_parameters())
    work = copy.deepcopy(model)
    quantize_model(work, QuantSpec(bits=3, activation=None))
    work[2].bias = nn.Parameter(torch.ones(3))
    work[1] = CappedReLU(torch.ones(3))
    work[0].weight.data.mul_(2)
    adopt(model, work)
    assert isinstance(model[0], QuantLayer)
    assert model[0] is kept[0]["0"]
    assert model[0].weight is kept[1]["0.weight"]
    x = torch.randn(4, 3)
    assert torch.equal(model(x), work.eval()(x))
