"""Small images held in memory, and the DataModule that serves them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lq.data.sampling import EpochSampler, split_index

__all__ = ["ImageData", "Images", "hold_out"]

Batch = tuple[Tensor, Tensor]


class Images(Dataset):
    """Images in memory, read a batch at a time, normalised, and augmented by (seed, epoch, index).

    Args:
        pixels: uint8, shape ``(N, C, H, W)``.
        classes: shape ``(N,)``.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        pad: augmentation: zero padding before a random crop of the same size; 0 for none.
        flip: augmentation: whether to flip half of the images left to right.
        seed: of the augmentation.
    """

    def __init__(
        self,
        pixels: Tensor,
        classes: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        """Keep the pixels as bytes."""
        self.pixels, self.classes = pixels, classes
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.pad, self.flip, self.seed = pad, flip, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def __getitem__(self, index: int) -> Batch:
        """One image, shape ``(C, H, W)``, and its class."""
        images, classes = self.__getitems__([index])
        return images[0], classes[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch, shape ``(B, C, H, W)``, and its classes: what a DataLoader asks for where it can."""
        epochs_images = [split_index(index, len(self)) for index in indices]
        picks = torch.tensor([image for _, image in epochs_images])
        pixels = self.pixels[picks]
        if self.pad or self.flip:
            pixels = self._augment(pixels, epochs_images)
        return (pixels.float().div_(255).sub_(self.mean)).div_(self.std), self.classes[picks]

    def _augment(self, pixels: Tensor, epochs_images: Sequence[tuple[int, int]]) -> Tensor:
        height, width = pixels.shape[2:]
        padded = torch.nn.functional.pad(pixels, (self.pad,) * 4)
        out = torch.empty_like(pixels)
        for i, key in enumerate(epochs_images):
            draw = np.random.default_rng((self.seed, *key))
            top, left = draw.integers(0, 2 * self.pad + 1, size=2)
            crop = padded[i, :, top : top + height, left : left + width]
            out[i] = crop.flip(-1) if self.flip and draw.random() < 0.5 else crop
        return out


def _as_is(batch: Any) -> Any:
    """The dataset already returns batches."""
    return batch


def hold_out(count: int, held: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random split of indices.

    Args:
        count: indices to split.
        held: how many to hold out.
        seed: of the split.

    Returns:
        Kept and held-out indices, each ascending.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return order[held:].sort().values, order[:held].sort().values


class ImageData(LightningDataModule):
    """Base of the DataModules: a subclass fills ``train``, ``val`` and ``test`` in ``setup``.

    Args:
        batch_size: images per step and process.
        num_workers: processes that load.
        seed: of order, augmentation and split.
    """

    collate = staticmethod(_as_is)
    train: Dataset
    val: Dataset
    test: Dataset

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        """Remember the settings."""
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed

    def _loader(self, dataset: Dataset, shuffle: bool) -> DataLoader:
        world = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = EpochSampler(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=self.seed)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            drop_last=shuffle,
        )

    def calibration_batches(self, images: int, batch_size: int = 64, *, held_out: bool = True) -> list[Batch]:
        """Training images to calibrate on, drawn by the seed: the same in every process.

        Args:
            images: how many; all there are where there are fewer.
            batch_size: images per batch.
            held_out: draw from those held out to monitor, without augmentation; or from those that are trained on.

        Returns:
            Batches of images ``(B, C, H, W)`` and classes ``(B,)``.
        """
        dataset = self.calibration if held_out else self.train
        picks = np.random.default_rng(self.seed).permutation(len(dataset))[:images]  # type: ignore[arg-type]
        loader = DataLoader(dataset, batch_size, sampler=picks.tolist(), collate_fn=self.collate)
        return [tuple(batch) for batch in loader]  # type: ignore[misc]

    @property
    def calibration(self) -> Dataset:
        """Training images without augmentation."""
        return self.val

    def train_dataloader(self) -> DataLoader:
        """Augmented training images, shuffled by (seed, epoch)."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out training images."""
        return self._loader(self.val, shuffle=False)

    def test_dataloader(self) -> DataLoader:
        """Test images."""
        return self._loader(self.test, shuffle=False)
