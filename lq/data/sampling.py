"""Orders and augmentations that depend on (seed, epoch, index) alone, so that a resumed run sees what the first saw."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import DistributedSampler

__all__ = ["EpochSampler", "seeded", "split_index"]


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch), shares out over ranks, and tells the dataset the epoch: yields ``epoch * n + i``.

    Lightning calls ``set_epoch``; a dataset gets both numbers back with `split_index`, in worker processes, too.
    """

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank and epoch."""
        size = len(self.dataset)  # type: ignore[arg-type]
        return (self.epoch * size + index for index in super().__iter__())


def split_index(index: int, size: int) -> tuple[int, int]:
    """Epoch and image of an index from `EpochSampler`.

    Args:
        index: ``epoch * size + i``.
        size: of the dataset.

    Returns:
        Epoch and ``i``.

    >>> split_index(23, 10)
    (2, 3)
    """
    return divmod(index, size)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Global random states set from a key inside, and what they were outside; for transforms that use them.

    Args:
        *key: non-negative integers.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, numpy, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(tensor)
