"""ImageNet-style folders for any timm model."""

from pathlib import Path
from typing import Any

from timm.data import create_transform  # pyright: ignore[reportPrivateImportUsage]
from torch.utils.data import Dataset, Subset, default_collate
from torchvision.datasets import ImageFolder

from lq.data.images import ImageData, hold_out
from lq.data.sampling import seeded, split_index

__all__ = ["ImageFolderData"]


class _Seeded(Dataset):
    """Draws the augmentation of an image from (seed, epoch, index)."""

    def __init__(self, images: Dataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        epoch, image = split_index(index, len(self))
        with seeded(self.seed, epoch, image):
            return self.images[image]


class ImageFolderData(ImageData):
    """Folders ``root/train/<class>/*`` and ``root/val/<class>/*``; the latter is the test set.

    Args:
        root: folder that holds train and val.
        image_size: height and width in pixels.
        batch_size: images per step and process.
        num_workers: processes that load.
        seed: of order and augmentation; the split is always the same.
        held_out: training images that are held out to monitor.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    collate = staticmethod(default_collate)

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 256,
        num_workers: int = 8,
        seed: int = 0,
        held_out: int = 10_000,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        """Remember the settings."""
        super().__init__(batch_size, num_workers, seed)
        self.root, self.image_size, self.held_out = Path(root), image_size, held_out
        self.mean, self.std = tuple(mean), tuple(std)

    def setup(self, stage: str) -> None:
        """Index the folders and split.

        Raises:
            FileNotFoundError: for a root without train and val.
            ValueError: where no image would be left to train on.
        """
        for part in ("train", "val"):
            if not (self.root / part).is_dir():
                raise FileNotFoundError(
                    f"data.root must hold the folders train and val, got {str(self.root)!r} without {part}"
                )
        augmented = ImageFolder(str(self.root / "train"), self._transform(True))
        plain = ImageFolder(str(self.root / "train"), self._transform(False))
        if not 0 < self.held_out < len(plain):
            raise ValueError(f"data.held_out must lie from 1 to {len(plain) - 1} here, got {self.held_out}: lower it")
        kept, held = hold_out(len(plain), self.held_out, seed=0)
        self.train = _Seeded(Subset(augmented, kept.tolist()), self.seed)
        self.val = Subset(plain, held.tolist())
        self.test = ImageFolder(str(self.root / "val"), self._transform(False))

    def _transform(self, training: bool) -> Any:
        size = (3, self.image_size, self.image_size)
        return create_transform(size, is_training=training, mean=self.mean, std=self.std)
