import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lq.data import CIFAR10Data, DigitsData, ImageFolderData, ImagePackData
from lq.data.sampling import seeded
from tests.helpers.commands import lq


def epoch(data, number, part="train"):
    loader: DataLoader = getattr(data, f"{part}_dataloader")()
    loader.sampler.set_epoch(number)
    return list(loader)


def prepared(**settings):
    data = DigitsData(batch_size=64, **settings)
    data.setup("fit")
    return data


def test_digits_are_split_once_and_for_all():
    data = prepared(seed=1)
    assert [len(part) for part in (data.train, data.val, data.test)] == [1297, 200, 300]
    other = prepared(seed=2)
    assert torch.equal(data.test.pixels, other.test.pixels)
    parts = [set(map(bytes, p.pixels.numpy())) for p in (data.train, data.val, data.test)]
    assert not (parts[0] & parts[2])
    images, classes = epoch(data, 0, "val")[0]
    assert images.shape == (64, 1, 8, 8)
    assert classes.unique().numel() == 10
    assert images.mean().abs() < 0.2
    assert 0.8 < images.std() < 1.2


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    first = epoch(prepared(seed=3), 4)
    torch.manual_seed(99)
    random.seed(99)
    again = epoch(prepared(seed=3), 4)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert not torch.equal(first[0][1], epoch(prepared(seed=3), 5)[0][1])
    assert not torch.equal(first[0][1], epoch(prepared(seed=4), 4)[0][1])


def test_workers_see_what_the_main_process_sees():
    alone, shared = epoch(prepared(seed=3), 2), epoch(prepared(seed=3, num_workers=2), 2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, shared, strict=True))


def test_augmentation_moves_but_keeps_images():
    data = prepared()
    plain, moved = data.train.pixels[7], data.train[7][0] * data.train.std + data.train.mean
    moves = {tuple(data.train[7 + e * len(data.train)][0].flatten().tolist()) for e in range(40)}
    assert 5 <= len(moves) <= 9  # crops of a padding of one pixel
    assert moved.shape == plain.shape


def test_seeded_restores_every_random_state():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with seeded(5, 6, 7):
        inside = torch.rand(1).item(), random.random(), np.random.rand()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    with seeded(5, 6, 7):
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == inside
    with seeded(5, 6, 8):
        assert torch.rand(1).item() != inside[0]


def test_cifar_without_its_files_says_where_to_point(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root must hold CIFAR-10, got .* set data.download=true"):
        CIFAR10Data(str(tmp_path)).prepare_data()


def test_real_cifar10(data_root):
    data = CIFAR10Data(str(data_root))
    data.prepare_data()
    data.setup("fit")
    assert [len(part) for part in (data.train, data.val, data.test)] == [45000, 5000, 10000]
    assert data.test.classes.bincount().tolist() == [1000] * 10
    assert (data.train.classes.bincount() + data.val.classes.bincount()).tolist() == [5000] * 10
    images, _ = epoch(data, 0)[0]
    assert images.shape == (128, 3, 32, 32)
    means = data.test.pixels.float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.494, 0.485, 0.451]), atol=2e-3, rtol=0)


def test_held_out_cifar10_trains_too_where_asked(data_root):
    data = CIFAR10Data(str(data_root), train_on_all=True)
    data.setup("fit")
    assert [len(part) for part in (data.train, data.val)] == [50000, 5000]
    assert data.train.classes.bincount().tolist() == [5000] * 10


@pytest.fixture
def folder(tmp_path):
    """An ImageNet-style folder of two easy classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for name, base in (("dark", 40), ("light", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(base - 30, base + 30, (70, 60, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_image_folders_are_seeded_too(folder):
    def batches(number):
        data = ImageFolderData(str(folder), image_size=32, batch_size=8, num_workers=0, held_out=8, seed=1)
        data.setup("fit")
        return epoch(data, number)

    first, again, later = batches(0), batches(0), batches(1)
    assert len(first) == 5
    assert first[0][0].shape == (8, 3, 32, 32)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], later[0][0])


def test_image_folder_bad_input(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="data.root must hold the folders train and val, got .* without train"):
        ImageFolderData(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(ValueError, match="data.held_out must lie from 1 to 47 here, got 10000: lower it"):
        ImageFolderData(str(folder)).setup("fit")


def test_the_imagenet_recipe_runs_on_a_folder(folder, tmp_path):
    small = [
        "model.name=resnet10t",
        "model.num_classes=2",
        "model.pretrained=false",
        "data.image_size=32",
        "data.held_out=8",
        "logger=csv",
    ]
    settings = ["data.batch_size=8", "data.num_workers=0", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    quiet = ["trainer.enable_progress_bar=false", "output_dir=out"]
    done = lq("train", "recipes=imagenet_timm", f"data.root={folder}", *small, *settings, *quiet, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 of 15 layers quantized" in done.stdout
    assert (tmp_path / "out" / "network.lq.safetensors").is_file()
    fields = ["search.bits=2", "search.reconstruct=2", "search.reference=false", "calibration_images=4"]
    quiet[1] = "output_dir=searched"
    recipe = ["recipes=search_imagenet_timm", f"data.root={folder}"]
    done = lq("search", *recipe, *small, *settings, *fields, *quiet, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 of 15 layers quantized" in done.stdout
    assert (tmp_path / "searched" / "network.ckpt").is_file()


def test_a_pack_of_images_is_halved_and_cropped(tmp_path):
    blobs = []
    for i in range(6):
        buffer = io.BytesIO()
        Image.fromarray(np.full((10, 12, 3), 40 * i, np.uint8)).save(buffer, "PNG")
        blobs.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, blobs)])
    path = tmp_path / "pack.npz"
    np.savez(path, blob=np.frombuffer(b"".join(blobs), np.uint8), offs=offsets, y=np.arange(6))
    data = ImagePackData(str(path), image_size=8, batch_size=2)
    data.setup("fit")
    assert data.train.classes.tolist() == [0, 2, 4]
    assert data.test.classes.tolist() == [1, 3, 5]
    assert data.train.pixels.shape == (3, 3, 8, 8)
    drawn = data.calibration_batches(2, 1)
    assert len(drawn) == 2
    assert {int(y) for _, y in drawn} <= {0, 2, 4}  # never an image that is scored
    with pytest.raises(FileNotFoundError, match="data.path must be an archive of images"):
        ImagePackData(str(tmp_path / "none.npz")).setup("fit")


def test_calibration_images_are_training_images_without_augmentation():
    data = prepared(seed=3)
    batches = data.calibration_batches(100, 64)
    assert [len(x) for x, _ in batches] == [64, 36]
    again = prepared(seed=3).calibration_batches(100, 64)
    assert torch.equal(batches[0][0], again[0][0])
    assert not torch.equal(batches[0][1], prepared(seed=4).calibration_batches(100, 64)[0][1])
    held = {bytes(image.numpy()) for image, _ in (data.val[i] for i in range(len(data.val)))}
    assert all(bytes(image.numpy()) in held for x, _ in batches for image in x)
