"""The best choice for every item of several, under a budget: the multiple-choice knapsack."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["choose_within_budget"]

_MOST = 1 << 16  # totals that are told apart


def choose_within_budget(losses: Tensor, sizes: Tensor, budget: int) -> list[int]:
    """One option per item so that the sum of losses is least and the sum of sizes within a budget.

    Totals of which another is neither larger nor worse are dropped, item by item; what is left is exact. Beyond 65536
    of them, the best one in each 65536th of the budget is kept.

    Args:
        losses: of each option, shape ``(items, options)``.
        sizes: of each option, integers, shape of ``losses``.
        budget: largest sum of sizes.

    Returns:
        Index of the chosen option of every item.

    Raises:
        ValueError: for a budget below the sum of the smallest options, or losses that are not finite.

    >>> losses = torch.tensor([[5.0, 1.0], [4.0, 3.0]])
    >>> choose_within_budget(losses, torch.tensor([[2, 4], [2, 4]]), 6)
    [1, 0]
    """
    if not bool(torch.isfinite(losses).all()):
        wrong = (~torch.isfinite(losses)).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"losses must be finite, those of items {wrong} are not: check what they were measured on")
    least = sizes.amin(dim=1)
    if budget < int(least.sum()):
        raise ValueError(f"budget must be at least {int(least.sum())}, the sum of the smallest options, got {budget}")
    losses, sizes = losses.double().cpu(), sizes.long().cpu()
    total_size, total_loss = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.double)
    came_from: list[Tensor] = []
    rest = int(least.sum())
    for item_losses, item_sizes, smallest in zip(losses, sizes, least.tolist(), strict=True):
        rest -= smallest
        size = (total_size[:, None] + item_sizes).flatten()
        loss = (total_loss[:, None] + item_losses).flatten()
        kept = _undominated(size, loss, budget - rest)
        came_from.append(kept)
        total_size, total_loss = size[kept], loss[kept]
    return _trace(came_from, losses.shape[1], int(total_loss.argmin()))


def _undominated(size: Tensor, loss: Tensor, budget: int) -> Tensor:
    """Indices of totals within the budget that no other beats in both, by rising size."""
    index = (size <= budget).nonzero().flatten()
    index = index[loss[index].argsort(stable=True)]
    index = index[size[index].argsort(stable=True)]
    ordered = loss[index]
    better = torch.ones_like(ordered, dtype=torch.bool)
    better[1:] = ordered[1:] < ordered.cummin(0).values[:-1]
    index = index[better]
    if len(index) > _MOST:
        # losses fall with sizes: the last one of each part of the budget is the best of it
        part = size[index] * _MOST // max(1, budget)
        index = index[torch.cat([part[1:] != part[:-1], torch.tensor([True])])]
    return index


def _trace(came_from: Sequence[Tensor], options: int, last: int) -> list[int]:
    chosen = []
    for kept in reversed(came_from):
        last, option = divmod(int(kept[last]), options)
        chosen.append(option)
    return chosen[::-1]
