"""Handwritten digits that ship inside scikit-learn: real data without a download."""

from typing import Any

import torch

from lq.data.images import ImageData, Images, hold_out

__all__ = ["DigitsData"]


class DigitsData(ImageData):
    """1797 images of 8x8 pixels in 10 classes: 1297 to train, 200 held out, 300 to test.

    Args:
        batch_size: images per step and process.
        num_workers: processes that load.
        seed: of order, augmentation and split.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """

    def __init__(self, batch_size: int = 32, num_workers: int = 0, seed: int = 0) -> None:
        """Remember the settings."""
        super().__init__(batch_size, num_workers, seed)

    def setup(self, stage: str) -> None:
        """Split, always the same way."""
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        pixels = torch.from_numpy(digits.images * 15).to(torch.uint8).unsqueeze(1)
        classes = torch.from_numpy(digits.target)
        rest, test = hold_out(len(pixels), 300, seed=0)
        kept, held = hold_out(len(rest), 200, seed=0)
        statistics = ([0.29], [0.35])
        self.train = Images(pixels[rest[kept]], classes[rest[kept]], *statistics, pad=1, seed=self.seed)
        self.val = Images(pixels[rest[held]], classes[rest[held]], *statistics)
        self.test = Images(pixels[test], classes[test], *statistics)
