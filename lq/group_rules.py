"""No weight decay and a learning rate of their own for scales, in whatever optimizer they are."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["ScaleRules"]


class ScaleRules:
    """Makes an optimizer step on scales without weight decay and at a multiple of their group's learning rate.

    During each step, and only then, the scales of a parameter group stand in a group of their own: so every kind of
    decay (coupled or decoupled) and every optimizer is served, while schedulers and checkpoints see the groups that
    the user built. State is kept by parameter and does not notice.

    Args:
        optimizer: any optimizer with parameter groups.
        scales: parameters concerned.
        lr_factor: learning rate relative to that of their group.

    >>> scale = nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([scale], lr=1.0, weight_decay=0.5)
    >>> rules = ScaleRules(optimizer, [scale], lr_factor=0.1)
    >>> scale.grad = torch.ones(1)
    >>> optimizer.step()
    >>> scale.item(), optimizer.param_groups[0]["weight_decay"]
    (0.8999999761581421, 0.5)
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, scales: Iterable[nn.Parameter], lr_factor: float = 1.0
    ) -> None:
        """Attach to the optimizer."""
        self.lr_factor = lr_factor
        self._optimizer = optimizer
        self._ids = {id(p) for p in scales}
        self._split_groups: list[tuple[dict[str, Any], list[Any], dict[str, Any]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._merge),
            # a step that raised leaves the groups split; a checkpoint written then must not show it
            optimizer.register_state_dict_pre_hook(self._merge),
        ]

    def remove(self) -> None:
        """Detach from the optimizer, its groups as the user built them even where a step raised."""
        self._merge(self._optimizer)
        for handle in self._handles:
            handle.remove()

    def _split(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._merge(optimizer)
        for group in list(optimizer.param_groups):
            scales = [p for p in group["params"] if id(p) in self._ids]
            if not scales:
                continue
            apart = {**group, "params": scales, "lr": group["lr"] * self.lr_factor}
            if "weight_decay" in apart:
                apart["weight_decay"] = 0.0
            self._split_groups.append((group, group["params"], apart))
            group["params"] = [p for p in group["params"] if id(p) not in self._ids]
            optimizer.param_groups.append(apart)

    def _merge(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, params, apart in self._split_groups:
            group["params"] = params
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g is not apart]
        self._split_groups.clear()
