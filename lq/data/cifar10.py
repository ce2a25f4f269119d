"""CIFAR-10, from torchvision's files or from lossless image packs."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lq.data.images import ImageData, Images, hold_out

__all__ = ["CIFAR10Data", "read_pack"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TILES = 10  # a mosaic holds 10 x 10 images


def read_pack(path: Path) -> tuple[Tensor, Tensor]:
    """Read a pack of WebP mosaics of 10 x 10 images of 32 x 32 pixels.

    Args:
        path: NumPy archive with ``blob``, ``offs`` and ``y``.

    Returns:
        Pixels, uint8 ``(N, 3, 32, 32)``, and classes ``(N,)``.
    """
    with np.load(path) as pack:
        blob, offsets, classes = pack["blob"].tobytes(), pack["offs"], pack["y"]
    mosaics = []
    for start, end in pairwise(offsets):
        mosaic = np.asarray(Image.open(io.BytesIO(blob[start:end])).convert("RGB"))
        tiles = mosaic.reshape(_TILES, 32, _TILES, 32, 3).transpose(0, 2, 4, 1, 3)
        mosaics.append(tiles.reshape(-1, 3, 32, 32))
    return torch.from_numpy(np.concatenate(mosaics)), torch.from_numpy(classes.astype(np.int64))


class CIFAR10Data(ImageData):
    """CIFAR-10: 45 000 images to train, 5 000 training images held out, 10 000 to test.

    Args:
        root: folder with cifar10_train_a.npz, cifar10_train_b.npz and cifar10_test.npz, or that of torchvision's
            CIFAR10.
        batch_size: images per step and process.
        num_workers: processes that load.
        seed: of order and augmentation; the split is always the same.
        download: whether torchvision may download into root.
        train_on_all: whether the held-out images train, too, as in a last run whose settings are chosen; what they
            score says nothing then.
        mean: per channel, of pixels in [0, 1].
        std: per channel.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = False,
        train_on_all: bool = False,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        """Remember the settings."""
        super().__init__(batch_size, num_workers, seed)
        self.mean, self.std = tuple(mean), tuple(std)
        self.root, self.download, self.train_on_all = Path(root), download, train_on_all

    def prepare_data(self) -> None:
        """See that the files are there."""
        if not self._packs() and not self.download and not (self.root / "cifar-10-batches-py").is_dir():
            raise FileNotFoundError(
                f"data.root must hold CIFAR-10, got {str(self.root)!r} without it: set data.download=true, or point "
                "data.root to the folder that holds torchvision's cifar-10-batches-py"
            )
        if self.download and not self._packs():
            from torchvision.datasets import CIFAR10

            CIFAR10(self.root, download=True)

    def _packs(self) -> bool:
        return (self.root / "cifar10_test.npz").is_file()

    def setup(self, stage: str) -> None:
        """Read and split."""
        if hasattr(self, "train"):
            return
        (pixels, classes), test = self._read(True), self._read(False)
        kept, held = hold_out(len(pixels), 5000, seed=0)
        kept = torch.arange(len(pixels)) if self.train_on_all else kept
        self.train = Images(pixels[kept], classes[kept], self.mean, self.std, pad=4, flip=True, seed=self.seed)
        self.val = Images(pixels[held], classes[held], self.mean, self.std)
        self.test = Images(*test, self.mean, self.std)

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        if self._packs():
            names = ("train_a", "train_b") if train else ("test",)
            parts = [read_pack(self.root / f"cifar10_{name}.npz") for name in names]
            return torch.cat([p for p, _ in parts]), torch.cat([c for _, c in parts])
        from torchvision.datasets import CIFAR10

        files = CIFAR10(self.root, train=train)
        return torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets)
