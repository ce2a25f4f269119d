import os

import pytest
import timm
import torch
from safetensors.torch import save_file

import lq
from lq.data import ImagePackData
from lq.data.cifar10 import MEAN, STD, read_pack
from lq.models import create_model, load_weights


@pytest.mark.parametrize(("name", "layers"), [("cifar_resnet8", 8), ("cifar_resnet20", 20), ("cifar_resnet56", 56)])
def test_cifar_resnets_are_timm_models(name, layers):
    assert timm.is_model(name)
    model = timm.create_model(name, num_classes=7, in_chans=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert len(lq.quantize_model(model).rows) == layers


def test_channels_last_changes_how_weights_lie_and_nothing_else():
    torch.manual_seed(0)
    plain = create_model("cifar_resnet8").eval()
    other = create_model("cifar_resnet8", channels_last=True).eval()
    other.load_state_dict(plain.state_dict())
    assert other.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(x), plain(x), rtol=1e-4, atol=1e-5)


def test_bad_names_arguments_and_files(tmp_path):
    with pytest.raises(ValueError, match=r"model.name must be a timm model, got 'cifar_resnet21': did you .*resnet20"):
        create_model("cifar_resnet21")
    with pytest.raises(ValueError, match="pretrained must be False"):
        create_model("cifar_resnet8", pretrained=True)
    with pytest.raises(TypeError, match="take num_classes and in_chans, got"):
        create_model("cifar_resnet8", options={"width": 2})
    with pytest.raises(FileNotFoundError, match="model.checkpoint must be a file of weights, got .* does not exist"):
        create_model("cifar_resnet8", checkpoint=str(tmp_path / "none.pt"))
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"(?s)model.checkpoint 'other.safetensors' does not fit .*Missing key"):
        create_model("cifar_resnet8", checkpoint=str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
def test_torch_files_load_without_unpickling_code(tmp_path, wrap):
    model = create_model("cifar_resnet8")
    torch.save(wrap(model.state_dict()), tmp_path / "w.pt")
    other = create_model("cifar_resnet8", checkpoint=str(tmp_path / "w.pt"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_weights(create_model("cifar_resnet8"), tmp_path / "evil.pt")


@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.9173), (32, 0.9263), (56, 0.9339)])
def test_real_checkpoints_keep_their_accuracy(data_root, depth, accuracy):
    model = create_model(f"cifar_resnet{depth}", checkpoint=str(data_root / f"cifar10_resnet{depth}.safetensors"))
    pixels, classes = read_pack(data_root / "cifar10_test.npz")
    x = (pixels[:1000].float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        hits = (model.eval()(x).argmax(1) == classes[:1000]).float().mean().item()
    assert hits == pytest.approx(accuracy, abs=0.02)


def test_eight_bits_after_calibration_cost_a_real_network_nothing(data_root):
    model = create_model("cifar_resnet20", checkpoint=str(data_root / "cifar10_resnet20.safetensors")).eval()
    pixels, _ = read_pack(data_root / "cifar10_test.npz")
    x = (pixels[:500].float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        floats = model(x).argmax(1)
        lq.quantize_model(model, lq.QuantSpec(bits=8), x[:1])
        lq.calibrate(model, [x[:250]])
        assert (model(x).argmax(1) == floats).float().mean() > 0.985


def test_mobilenet_v1_is_a_timm_model_with_the_keys_of_timms_own():
    model = timm.create_model("mobilenetv1_075_same", num_classes=7)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    theirs = timm.create_model("mobilenetv1_100", num_classes=7)
    assert model.state_dict().keys() == theirs.state_dict().keys()
    assert len(lq.quantize_model(model).rows) == 28
    with pytest.raises(ValueError, match="pretrained must be False"):
        create_model("mobilenetv1_075_same", pretrained=True)
    with pytest.raises(TypeError, match="takes num_classes and in_chans, got"):
        create_model("mobilenetv1_075_same", options={"width": 2})


@pytest.mark.skipif("LQ_DATA" not in os.environ, reason="LQ_DATA is not set: no real checkpoints")
def test_the_real_mobilenet_classifies_real_images():
    root = os.environ["LQ_DATA"]
    data = ImagePackData(f"{root}/in1k_sample1000_256.npz", batch_size=50)
    data.setup("test")
    assert len(data.train) == len(data.test) == 500
    path = f"{root}/in1k_mobilenetv1_075.safetensors"
    model = create_model("mobilenetv1_075_same", num_classes=1000, checkpoint=path).eval()
    images, classes = next(iter(data.test_dataloader()))
    with torch.inference_mode():
        assert int((model(images).argmax(1) == classes).sum()) >= 38  # 86 % of all 500
