"""Learning rates and weight decay of their own for some parameters, in whatever optimizer they are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lq.nn import QuantLayer

__all__ = ["GroupRules", "Rule", "decay_rules"]

_DECAY_BY_BITS: Mapping[int, float] = {2: 0.25, 3: 0.5}


@dataclass(frozen=True, eq=False)
class Rule:
    """What is different about some parameters.

    Args:
        parameters: concerned.
        lr: factor on the learning rate of their group.
        weight_decay: factor on its weight decay.
    """

    parameters: Sequence[nn.Parameter]
    lr: float = 1.0
    weight_decay: float = 1.0


class GroupRules:
    """Makes an optimizer step on some parameters with multiples of their group's learning rate and weight decay.

    During each step, and only then, they stand in groups of their own: so every kind of decay (coupled or decoupled)
    and every optimizer is served, while schedulers and checkpoints see the groups that the user built. State is kept by
    parameter and does not notice.

    Args:
        optimizer: any optimizer with parameter groups.
        rules: of disjoint parameters, asked for before every step: widths may fall in the course of a fit.

    >>> scale = nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([scale], lr=1.0, weight_decay=0.5)
    >>> rules = GroupRules(optimizer, lambda: [Rule([scale], lr=0.1, weight_decay=0.0)])
    >>> scale.grad = torch.ones(1)
    >>> optimizer.step()
    >>> scale.item(), optimizer.param_groups[0]["weight_decay"]
    (0.8999999761581421, 0.5)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rules: Callable[[], Iterable[Rule]]) -> None:
        """Attach to the optimizer."""
        self._optimizer, self._rules = optimizer, rules = _innermost(optimizer), rules
        self._split_groups: list[tuple[dict[str, Any], list[Any], list[dict[str, Any]]]] = []
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
        rules = {id(p): rule for rule in self._rules() for p in rule.parameters}
        for group in list(optimizer.param_groups):
            apart: dict[Rule, list[Any]] = {}
            for parameter in group["params"]:
                if id(parameter) in rules and _differs(group, rules[id(parameter)]):
                    apart.setdefault(rules[id(parameter)], []).append(parameter)
            if not apart:
                continue
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("scale_lr_factor must be 1 with LBFGS, which has one learning rate for all: set it so")
            added = [self._group(group, rule, params) for rule, params in apart.items()]
            self._split_groups.append((group, group["params"], added))
            moved = {id(p) for params in apart.values() for p in params}
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            optimizer.param_groups.extend(added)

    @staticmethod
    def _group(group: dict[str, Any], rule: Rule, params: list[Any]) -> dict[str, Any]:
        apart = {**group, "params": params}
        for name in ("lr", "weight_decay"):
            if (factor := getattr(rule, name)) != 1 and name in group:
                if group[name] is not None:
                    apart[name] = group[name] * factor
                elif name == "lr":  # chosen by the optimizer itself
                    raise ValueError(
                        f"the learning rate must be a number where some parameters learn at {factor} times it, got "
                        "None: give the optimizer lr=..., or set scale_lr_factor=1"
                    )
        return apart

    def _merge(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, params, added in self._split_groups:
            group["params"] = params
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if not any(g is a for a in added)]
        self._split_groups.clear()


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The one whose step moves weights: those around another one, such as Lookahead, may call no hooks themselves."""
    for inner in vars(optimizer).values():
        if isinstance(inner, torch.optim.Optimizer) and inner.param_groups is optimizer.param_groups:
            return _innermost(inner)
    return optimizer


def _differs(group: dict[str, Any], rule: Rule) -> bool:
    """Whether a rule changes anything for parameters of a group."""
    return rule.lr != 1 or bool(rule.weight_decay != 1 and group.get("weight_decay"))


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
