"""Learning rates and weight decay of their own for some parameters, in whatever optimizer they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lq.nn import QuantLayer

__all__ = ["GroupRules", "Rule", "decay_rules", "scale_rules"]

_CHANGE = 0.5
_DECAY_BY_BITS: Mapping[int, float] = {2: 0.25, 3: 0.5}


@dataclass(frozen=True, eq=False)
class Rule:
    """What is different about some parameters.

    Args:
        parameters: concerned.
        lr: factor on the learning rate of their group.
        weight_decay: factor on its weight decay.
        change: most that a step may change an element, relative to it; below 1 none changes its sign. None for any.
    """

    parameters: Sequence[nn.Parameter]
    lr: float = 1.0
    weight_decay: float = 1.0
    change: float | None = None


class GroupRules:
    """Makes an optimizer step on some parameters with multiples of their group's learning rate and weight decay.

    During each step, and only then, they stand in groups of their own: so every kind of decay (coupled or decoupled)
    and every optimizer is served, while schedulers and checkpoints see the groups that the user built. State is kept by
    parameter and does not notice.

    Args:
        optimizer: any optimizer with parameter groups.
        rules: of disjoint parameters.

    >>> scale = nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([scale], lr=1.0, weight_decay=0.5)
    >>> rules = GroupRules(optimizer, [Rule([scale], lr=0.1, weight_decay=0.0)])
    >>> scale.grad = torch.ones(1)
    >>> optimizer.step()
    >>> scale.item(), optimizer.param_groups[0]["weight_decay"]
    (0.8999999761581421, 0.5)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rules: Iterable[Rule]) -> None:
        """Attach to the optimizer."""
        self._optimizer = optimizer
        self._rules = {id(p): rule for rule in rules for p in rule.parameters}
        self._split_groups: list[tuple[dict[str, Any], list[Any], list[dict[str, Any]]]] = []
        self._bounds: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._split),
            optimizer.register_step_post_hook(self._finish),
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
        self._bounds.clear()
        for group in list(optimizer.param_groups):
            apart: dict[Rule, list[Any]] = {}
            for parameter in group["params"]:
                if id(parameter) in self._rules:
                    apart.setdefault(self._rules[id(parameter)], []).append(parameter)
            if not apart:
                continue
            added = [self._group(group, rule, params) for rule, params in apart.items()]
            self._split_groups.append((group, group["params"], added))
            group["params"] = [p for p in group["params"] if id(p) not in self._rules]
            optimizer.param_groups.extend(added)
            self._bounds += [bounds for rule, params in apart.items() for bounds in _bounds(rule, params)]

    @staticmethod
    def _group(group: dict[str, Any], rule: Rule, params: list[Any]) -> dict[str, Any]:
        apart = {**group, "params": params, "lr": group["lr"] * rule.lr}
        if "weight_decay" in apart:
            apart["weight_decay"] = group["weight_decay"] * rule.weight_decay
        return apart

    @torch.no_grad()
    def _finish(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._merge(optimizer, *_)
        for parameter, low, high in self._bounds:
            parameter.clamp_(low, high)
        self._bounds.clear()

    def _merge(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, params, added in self._split_groups:
            group["params"] = params
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if not any(g is a for a in added)]
        self._split_groups.clear()


def _bounds(rule: Rule, params: list[Any]) -> list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]:
    """Where each parameter may end."""
    if rule.change is None:
        return []
    found = [(p, p.detach(), rule.change * p.detach().abs()) for p in params]
    return [(p, value - most, value + most) for p, value, most in found]


def scale_rules(learned: Iterable[nn.Parameter], scales: Iterable[nn.Parameter], lr: float = 1.0) -> list[Rule]:
    """No weight decay for what quantizers learn, and no scale that a step changes by more than half of itself.

    The gradient of a scale does not shrink with it: a step of usual size can take a small one, as of 8 bits, past zero,
    where it clips every weight, and from there momentum carries it away.

    Args:
        learned: what quantizers learn, scales and all else.
        scales: those among them that are positive steps between levels.
        lr: factor on the learning rate.

    Returns:
        The rules.

    >>> scale, offset = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
    >>> [(len(rule.parameters), rule.change) for rule in scale_rules([scale, offset], [scale])]
    [(1, 0.5), (1, None)]
    """
    bounded = {id(p): p for p in scales}
    others = tuple(p for p in learned if id(p) not in bounded)
    return [Rule(tuple(bounded.values()), lr, 0.0, change=_CHANGE), Rule(others, lr, 0.0)]


def decay_rules(layers: Iterable[QuantLayer]) -> list[Rule]:
    """Less weight decay for weights of fewer bits: half of it at 3 bits, a quarter at 2.

    Args:
        layers: quantized layers.

    Returns:
        A rule for each width that differs.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020, section 3: 1e-4, 0.5e-4 and 0.25e-4.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> report = lq.quantize_model(model, lq.QuantSpec(bits=2))
    >>> [(rule.weight_decay, rule.parameters[0] is model[1].weight) for rule in decay_rules(model)]
    [(0.25, True)]
    """
    found: dict[float, dict[int, nn.Parameter]] = {}
    for layer in layers:
        factor = _DECAY_BY_BITS.get(layer.weight_quantizer.codes.bits, 1.0)
        if factor != 1:
            own = [p for p in layer.parameters(recurse=False) if p.dim() > 1]  # biases keep theirs
            if parametrize.is_parametrized(layer, "weight"):
                own += [p for p in layer.parametrizations.weight.parameters() if p.dim() > 1]  # type: ignore[union-attr]
            found.setdefault(factor, {}).update((id(p), p) for p in own)
    return [Rule(tuple(params.values()), weight_decay=factor) for factor, params in found.items()]
