"""A small sample of images in one file, half to calibrate and half to score."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lq.data.images import ImageData, Images

__all__ = ["ImagePackData"]


class ImagePackData(ImageData):
    """Encoded images in a NumPy archive: those of even number to calibrate or train on, those of odd number to test.

    Args:
        path: archive with ``blob`` (encoded images end to end), ``offs`` and ``y``.
        image_size: height and width of the central crop in pixels.
        batch_size: images per step and process.
        num_workers: processes that load.
        seed: of order.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    def __init__(
        self,
        path: str,
        image_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        """Remember the settings."""
        super().__init__(batch_size, num_workers, seed)
        self.path, self.image_size = Path(path), image_size
        self.mean, self.std = tuple(mean), tuple(std)

    def setup(self, stage: str) -> None:
        """Read, crop and split.

        Raises:
            FileNotFoundError: where there is no such file.
        """
        if hasattr(self, "train"):
            return
        if not self.path.is_file():
            raise FileNotFoundError(f"data.path must be an archive of images, got {str(self.path)!r}: check the path")
        with np.load(self.path) as pack:
            blob, offsets, classes = pack["blob"].tobytes(), pack["offs"], torch.from_numpy(pack["y"].astype(np.int64))
        pixels = torch.stack([self._read(blob[start:end]) for start, end in pairwise(offsets)])
        self.train = Images(pixels[::2], classes[::2], self.mean, self.std)
        self.val = self.test = Images(pixels[1::2], classes[1::2], self.mean, self.std)

    @property
    def calibration(self) -> Dataset:
        """The half that is not scored."""
        return self.train

    def _read(self, encoded: bytes) -> Tensor:
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))).permute(2, 0, 1)
        top, left = ((n - self.image_size) // 2 for n in image.shape[1:])
        return image[:, top : top + self.image_size, left : left + self.image_size].contiguous()
