import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import lq
from lq.functional import candidate_points
from lq.nn import named_quantized_layers
from lq.point_search.reconstruct import reconstruct_block
from lq.point_search.report import as_powers
from lq.quantizers import PointQuantizer
from tests.helpers.modules import Plain, fit

needs_data = pytest.mark.skipif("LQ_DATA" not in os.environ, reason="LQ_DATA is not set: no real checkpoints")


def small_cnn(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 3, 8, 8) for _ in range(3)]


def spec(**fields):
    return lq.SearchSpec(**{"bits": 3, "reference": False, **fields})


def search(model, batches=None, **fields):
    return lq.search(model, batches, spec(**fields), progress=False)


TWO = "two_words"
STAGES = {
    "plain": {},
    "tensor": {"granularity": "tensor"},
    "points per channel": {"points_per": "channel"},
    "signed": {"signed_points": True, "bits": 2},
    "L4 zero": {"power": 4, "zero": True},
    "codebook": {"quantizer": "codebook"},
    "uniform": {"quantizer": "lsq"},
    "mid-rise": {"quantizer": "lsq", "grid": "mid_rise"},
    "importance": {"importance": "inputs"},
    "fisher": {"importance": "fisher"},
    "uniform, importance": {"quantizer": "lsq", "importance": "inputs"},
    "equalize": {"equalize": True, "bias_correction": True},
    "unfolded": {"fold_batch_norm": False, "equalize": True},
    "activations": {"activation": "auto", "activation_bits": 4},
    "activation subset": {"activation": "auto", "activation_bits": 4, "activation_levels": "subset"},
    "error feedback": {"rounding": "error_feedback", "bias_correction": True},
    "uniform error feedback": {"quantizer": "lsq", "rounding": "error_feedback"},
    "reconstruct": {"reconstruct": 20},
    "reconstruct uniform": {"quantizer": "lsq", "grid": "mid_rise", "reconstruct": 20, "first_last_bits": None},
    "everything": {
        "importance": "inputs",
        "equalize": True,
        "bias_correction": True,
        "rounding": "error_feedback",
        "reconstruct": 20,
        "activation": "auto",
        "activation_bits": 4,
        "drop": 0.5,
    },
}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_leaves_weights_on_levels_and_stored_codes_exact(name, batches):
    model = small_cnn()
    report = search(model, batches, **STAGES[name])
    layers = named_quantized_layers(model)
    assert [row.path for row in report.rows] == list(layers) == ["0", "3", "6", "10"]
    assert not model.training
    for path, layer in layers.items():
        quantizer = layer.weight_quantizer
        value = layer.quantized_weight()
        assert torch.equal(quantizer.decode(quantizer.encode(layer.float_weight())), value)
        levels = quantizer.level_values()
        rows = quantizer.layout.rows(value)
        for row, own in zip(rows, levels.expand(len(rows), -1), strict=True):
            assert set(row.tolist()) <= set(own.tolist()), path
        kept = any(path in block.layers and block.kept for block in report.blocks)
        if STAGES[name].get("rounding") or (STAGES[name].get("reconstruct") and not kept):
            torch.testing.assert_close(layer.float_weight().detach(), value)
        if isinstance(quantizer, PointQuantizer) and layer.layer_spec.quantizer == "subset":
            allowed = set(candidate_points(None, 3).tolist())
            assert {abs(p) for p in quantizer.points.flatten().tolist()} <= allowed
    calibrated = [layer.input_quantizer.is_calibrated for layer in layers.values() if layer.input_quantizer]
    assert all(calibrated)
    assert len(calibrated) == (4 if "activation" in STAGES[name] else 0)
    assert "of 4 layers quantized" in str(report)


def test_the_report_compares_with_the_references(batches):
    model = small_cnn()
    weights = {p: model.get_submodule(p).weight.detach().clone() for p in ("3", "6")}
    report = search(model, reference=True, fold_batch_norm=False)
    for row in report.rows[1:3]:
        layer = model.get_submodule(row.path)
        error = weights[row.path] - layer.quantized_weight()
        assert row.loss == pytest.approx(float(error.square().sum()), rel=1e-4)
        assert row.sqnr_db == pytest.approx(
            float(10 * torch.log10(weights[row.path].square().sum() / error.square().sum())), rel=1e-4
        )
        assert row.reference_loss <= row.loss
        for grid in ("mid_tread", "mid_rise"):
            uniform = lq.quantizers.LSQQuantizer(
                lq.functional.code_range(3, grid=grid), layout=layer.weight_quantizer.layout
            )
            uniform.calibrate_(weights[row.path], importance=torch.ones(()))
            loss = float((uniform.eval().hard(weights[row.path]) - weights[row.path]).square().sum())
            assert getattr(row, f"{grid}_loss") == pytest.approx(loss, rel=1e-4)
        assert row.powers == as_powers(row.points)
        assert len(row.digest) == 64
    assert report.rows[0].quantizer == "uniform (mid_tread)"
    assert json.dumps(report.to_dicts())
    for column in ("SQNR", "/k-means", "/mid-tread", "seconds"):
        assert column in str(report)


def test_importance_chooses_other_points_and_loses_less_of_what_matters(batches):
    plain, weighted = small_cnn(), small_cnn()
    search(plain)
    report = search(weighted, batches, importance="inputs")
    for row in report.rows[1:3]:
        assert not torch.equal(
            plain.get_submodule(row.path).quantized_weight(), weighted.get_submodule(row.path).quantized_weight()
        )


def test_reconstruction_brings_the_output_nearer(batches):
    x, outputs = torch.cat(batches), {}
    target = small_cnn()(x)
    for steps in (0, 150):
        model = small_cnn()
        report = search(model, batches, bits=2, reconstruct=steps, first_last_bits=None)
        outputs[steps] = float((model(x) - target).square().mean())
    assert outputs[150] < 0.6 * outputs[0]
    assert all(b.after < b.before or b.kept for b in report.blocks)


def test_a_block_that_would_get_worse_stays_as_it_was(batches):
    model = small_cnn()
    search(model, batches, bits=2)
    layer = model[6]
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(32, 8, 8, 8)
    target = layer(x).detach()  # already reached
    _, after = reconstruct_block(layer, {"6": layer}, {"6": layer.weight}, x, target + 1e-6, spec(reconstruct=2))
    assert after >= 0
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_interrupted_search_goes_on_where_it_was(tmp_path, batches, monkeypatch):
    module = sys.modules["lq.point_search.search"]
    model, fields = small_cnn(), spec(importance="inputs", reconstruct=5)
    state = copy.deepcopy(model.state_dict())
    searched = []
    original = module.search_layer

    def dying(path, *rest):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(path)
        return original(path, *rest)

    monkeypatch.setattr(module, "search_layer", dying)
    with pytest.raises(KeyboardInterrupt):
        lq.search(model, batches, fields, folder=tmp_path, progress=False)
    assert type(model[0]) is nn.Conv2d  # untouched
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {p.name for p in tmp_path.iterdir()} == {"layer-0.safetensors", "layer-3.safetensors"}
    monkeypatch.setattr(module, "search_layer", lambda path, *rest: (searched.append(path), original(path, *rest))[1])
    first = lq.search(model, batches, fields, folder=tmp_path, progress=False)
    assert searched == ["0", "3", "6", "10"]  # none twice
    assert len(list(tmp_path.glob("block-*"))) == len(first.blocks)
    again, direct = small_cnn(), small_cnn()
    second = lq.search(again, batches, fields, folder=tmp_path, progress=False)
    assert searched == ["0", "3", "6", "10"]
    assert second.rows == first.rows
    assert second.blocks == first.blocks
    lq.search(direct, batches, fields, progress=False)
    for key, value in direct.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_stale_result_is_never_applied(tmp_path, batches):
    lq.search(small_cnn(), batches, spec(), folder=tmp_path, progress=False)
    other = small_cnn(seed=5)
    with pytest.raises(lq.StaleResultError, match=r"folder must hold results of these weights.*delete the folder"):
        lq.search(other, batches, spec(), folder=tmp_path, progress=False)
    with pytest.raises(lq.StaleResultError):
        lq.search(small_cnn(), batches, spec(bits=2), folder=tmp_path, progress=False)
    assert type(other[0]) is nn.Conv2d


def test_killed_while_writing_leaves_no_broken_file(tmp_path):
    (tmp_path / "layer-0.safetensors.partial").write_bytes(b"half")
    report = lq.search(small_cnn(), None, spec(), folder=tmp_path, progress=False)
    assert len(report.rows) == 4
    assert (tmp_path / "layer-0.safetensors").stat().st_size > 100


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"importance": "inputs"}, None, "batches must hold calibration data for what the spec asks for, got none"),
        ({"activation": "auto"}, [], "batches must hold calibration data"),
        ({}, [torch.zeros(2, 5, 8, 8)], r"batches must be inputs that the model runs on, got tensors of shapes"),
        ({"exclude": ["*"]}, None, "model must have a convolution or linear layer to quantize"),
        ({"include": ["nosuch"]}, None, "include glob must match a layer"),
    ],
)
def test_bad_input_is_refused_and_the_model_untouched(fields, given, message):
    model = small_cnn()
    with pytest.raises(ValueError, match=message):
        search(model, given, **fields)
    assert type(model[0]) is nn.Conv2d


def test_bad_weights_are_refused_by_layer():
    model = small_cnn()
    model[6].weight.data.zero_()
    with pytest.raises(ValueError, match="weight of 6 must not be all zero"):
        search(model)
    model[6].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        search(model)
    model = small_cnn()
    model[6].weight.data[3] = 0
    assert "1 channels are all zero" in str(search(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"importance": "hessian"}, r"importance must be one of \(None, 'inputs', 'fisher'\), got 'hessian'"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"reconstruct": -1}, "reconstruct must be an integer of at least 0"),
        ({"equalize": "no"}, "equalize must be True or False, got 'no'"),
        ({"search_seed": "a"}, "search_seed must be an integer, got 'a'"),
        ({"reconstruct_lr": ""}, "reconstruct_lr must be a number and not be negative, got ''"),
        ({"reconstruct_lr": -1.0}, "reconstruct_lr must not be negative"),
        ({"drop": 1.0}, "drop must lie from 0 to below 1"),
        ({"bits": 6}, "candidates must be at least as many as the points chosen"),
        ({"power": 3}, "power must be one of"),
        ({"points_per": "layer"}, "points_per must be one of"),
        (
            {"activation": "auto", "activation_levels": "subset", "activation_bits": 4, "activation_candidates": TWO},
            "got 15 for 16 points",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        spec(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"spec must be an lq.SearchSpec"):
        lq.search(small_cnn(), None, lq.QuantSpec())


def test_what_cannot_be_searched_is_refused_before_anything_happens(tmp_path):
    with pytest.raises(TypeError, match="wrapped in DataParallel: pass its .module"):
        lq.search(nn.DataParallel(small_cnn()))
    with pytest.raises(TypeError, match="batches must be several, got one Tensor: put it into a list"):
        search(small_cnn(), torch.zeros(2, 3, 8, 8))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="must not run under torch.inference_mode"):
        search(small_cnn())
    (tmp_path / "layer-0.safetensors").write_bytes(b"broken")
    with pytest.raises(lq.StaleResultError, match="layer-0.safetensors.*Delete that file"):
        lq.search(small_cnn(), None, spec(), folder=tmp_path, progress=False)


def test_it_works_without_gradients_and_in_half_precision(batches):
    with torch.no_grad():
        report = search(small_cnn(), batches, reconstruct=3)
    assert all(b.after is not None for b in report.blocks)
    half = small_cnn().to(torch.bfloat16)
    report = search(half, [b.to(torch.bfloat16) for b in batches], importance="inputs", reconstruct=3)
    assert all(0 <= b.after < 10 for b in report.blocks)


def test_mappings_as_batches_are_told_apart(tmp_path):
    def forward(model, batch):
        return model(batch["x"])

    torch.manual_seed(0)
    first, second = [{"x": torch.randn(8, 3, 8, 8)}], [{"x": torch.randn(8, 3, 8, 8)}]
    fields = spec(reconstruct=3)
    lq.search(small_cnn(), first, fields, folder=tmp_path, forward=forward, progress=False)
    with pytest.raises(lq.StaleResultError):
        lq.search(small_cnn(), second, fields, folder=tmp_path, forward=forward, progress=False)


def test_layers_that_cannot_take_part_are_named():
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    tied[4].weight = tied[2].weight
    report = search(tied, [torch.randn(8, 6)], rounding="error_feedback", reconstruct=3)
    assert report.fed_back["2"] == "its weight is tied to another layer"
    assert any(b.skipped for b in report.blocks)
    up = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 2), nn.Conv2d(2, 2, 1)).eval()
    report = search(up, [torch.randn(2, 2, 4, 4)], rounding="error_feedback")
    assert "transposed" in report.fed_back["1"]
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    report = search(attention, [torch.randn(2, 5, 8)], bits=3)
    assert any("MultiheadAttention" in row.reason for row in report.swap.skipped)
    with torch.no_grad():
        assert attention(torch.randn(2, 5, 8)).shape == (2, 5, 8)


def test_a_network_that_cannot_be_traced_is_searched_unfolded():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > -1e9 else x

    report = search(Stubborn(), first_last_bits=None)
    assert "cannot be traced" in str(report)
    assert report.rows[0].quantizer == "subset"


def test_a_network_trained_with_the_callback_is_searched_from_its_weights(batches):
    model = small_cnn()
    lq.quantize_model(model, lq.QuantSpec(bits=4))
    lq.calibrate(model, batches)
    report = search(model, batches)
    assert "4 layers were quantized" in str(report)
    assert model[3].layer_spec.quantizer == "subset"
    assert model[3].input_quantizer is None


def test_ten_networks_of_timm_are_searched_whole():
    for name in ("resnet18", "mobilenetv3_small_100", "convnext_atto", "regnetx_002"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4)
        report = search(model, [torch.randn(1, 3, 64, 64)], granularity="tensor", bits=2)
        assert not report.swap.skipped
        with torch.no_grad():
            assert bool(torch.isfinite(model(torch.randn(2, 3, 64, 64))).all())


@pytest.mark.parametrize("quantizer", ["subset", "codebook"])
def test_a_searched_network_is_trained_further_with_the_callback(quantizer, tmp_path):
    module = Plain()
    search(module, quantizer=quantizer, first_last_bits=None)
    points = {p: m.weight_quantizer.points.clone() for p, m in named_quantized_layers(module).items()}
    before = {p: m.weight.detach().clone() for p, m in named_quantized_layers(module).items()}
    callback = lq.LearnedQuantization(quantizer=quantizer, bits=3, activation=None, first_last_bits=None)
    fit(module, [callback])
    for path, layer in named_quantized_layers(module).items():
        assert torch.equal(layer.weight_quantizer.points, points[path])
        assert not torch.equal(layer.weight, before[path])


def test_the_callback_searches_points_by_itself():
    module = Plain()
    fit(module, [lq.LearnedQuantization(quantizer="subset", bits=3)])
    kinds = [type(m.weight_quantizer).__name__ for m in named_quantized_layers(module).values()]
    assert "SubsetQuantizer" in kinds
    assert kinds[0] == kinds[-1] == "LSQQuantizer"  # the ends are uniform


def test_a_searched_network_is_stored_and_comes_back(tmp_path):
    model = small_cnn()
    search(model)
    target = {"import_path": f"{small_cnn.__module__}:small_cnn"}
    loaded = lq.load(lq.save(model, tmp_path / "net.lq.safetensors", architecture=target), allow=target.values())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))


@needs_data
def test_resnet20_at_three_bits_keeps_its_accuracy():
    from lq.data import CIFAR10Data
    from lq.models import create_model

    root = os.environ["LQ_DATA"]
    data = CIFAR10Data(root, batch_size=250)
    data.setup("fit")
    test = [batch for batch, _ in zip(data.test_dataloader(), range(4), strict=False)]
    calibration = data.calibration_batches(128)

    def accuracy(**fields):
        model = create_model("cifar_resnet20", checkpoint=f"{root}/cifar10_resnet20.safetensors").eval()
        if fields:
            search(model, calibration, granularity="tensor", **fields)
        with torch.inference_mode():
            return sum(int((model(x).argmax(1) == y).sum()) for x, y in test) / 10

    whole = accuracy()
    assert whole > 90
    subset, uniform = accuracy(bits=4), accuracy(bits=4, quantizer="lsq")
    fed_back = accuracy(bits=4, rounding="error_feedback", bias_correction=True)
    assert subset > uniform
    assert fed_back > subset - 0.5
    assert fed_back > whole - 2


def test_the_hash_depends_on_everything():
    from lq.point_search.store import digest_of

    w = torch.arange(4.0)
    digests = {
        digest_of([w], {"a": 1}),
        digest_of([w + 1], {"a": 1}),
        digest_of([w], {"a": 2}),
        digest_of([w.reshape(2, 2)], {"a": 1}),
        digest_of([w, None], {"a": 1}),
        digest_of([w.double()], {"a": 1}),
    }
    assert len(digests) == 6
    code = "import torch; from lq.point_search.store import digest_of as d; print(d([torch.arange(4.0)], {'a': 1}))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(lq.__file__).parents[1]
    )
    assert done.stdout.strip() == digest_of([w], {"a": 1})
