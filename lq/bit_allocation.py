"""Mixed precision: a width for every layer, from how much each one suffers, under a budget of bits."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lq.calibration import calibrate, default_forward, uncalibrated_layers
from lq.checks import require_number
from lq.functional.allocation import choose_within_budget
from lq.functional.distillation import distillation_loss
from lq.globs import matches
from lq.nn import named_quantized_layers, weight_key
from lq.quantizers import find_method
from lq.spec import QuantSpec
from lq.surgery import Plan, PlannedLayer, apply_plan, execution_order, follow_norms_of_run, make_plan
from lq.text import format_table

__all__ = ["WIDTHS", "BitAllocation", "allocate_bits"]

WIDTHS = (2, 3, 4, 6, 8)
Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class BitAllocation:
    """Widths that were found.

    Args:
        spec: the spec that gives every layer its width, for `lq.quantize_model` and the callback.
        bits: width of every quantized layer, by path; of tied ones the first.
        weights: number of weights of the same.
        losses: divergence of the network with one layer quantized from the float one, by path and width, of the layers
            that were free to choose.
    """

    spec: QuantSpec
    bits: dict[str, int]
    weights: dict[str, int]
    losses: dict[str, dict[int, float]]

    @property
    def average_bits(self) -> float:
        """Mean width of a weight."""
        return sum(self.bits[path] * count for path, count in self.weights.items()) / sum(self.weights.values())

    def __str__(self) -> str:
        """A table: layers, what each width costs, what was chosen."""
        widths = sorted({width for losses in self.losses.values() for width in losses})
        rows = [
            (path, count, *(self.losses.get(path, {}).get(width) for width in widths), self.bits[path])
            for path, count in self.weights.items()
        ]
        table = format_table(("layer", "weights", *(f"loss at {width}" for width in widths), "bits"), rows)
        return f"{table}\n{self.average_bits:.3f} bits per weight"


@torch.no_grad()
def allocate_bits(
    model: nn.Module,
    batches: Iterable[Any],
    spec: QuantSpec | None = None,
    *,
    average_bits: float,
    widths: Sequence[int] = WIDTHS,
    forward: Forward | None = None,
    progress: bool = True,
) -> BitAllocation:
    """Find the width of each layer that makes a network diverge least, under a budget.

    Each layer is quantized alone, weights and inputs, at each width; the divergence of the classes from the float
    network's, `lq.functional.distillation.distillation_loss`, is its loss there. Of all choices whose weights have at
    most ``average_bits`` in the mean, the one with the least sum of losses is found. First and last block and layers
    with a width of their own in ``overrides`` keep it, and count.

    Args:
        model: a float network that returns logits; it is not changed.
        batches: of calibration data, on the model's device.
        spec: how layers are quantized; its ``bits`` are what is found.
        average_bits: largest mean width of a quantized weight.
        widths: to choose from, each 2 to 8.
        forward: runs the model on a batch.
        progress: whether to show a bar.

    Returns:
        The widths, what they were chosen by, and a spec that has them as overrides.

    Raises:
        ValueError: for a budget that is no number or that no choice meets, naming the least, for widths out of range,
            no batches, or a model that is quantized.
        TypeError: for a spec that is none, a tensor in place of batches, or a model that does not return logits.

    Source: a layer's loss alone as in Dong et al., HAWQ-V2, NeurIPS 2020, measured in place of estimated.

    >>> import lq
    >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    >>> found = allocate_bits(model, [torch.randn(16, 8)], average_bits=5.5, progress=False)
    >>> found.average_bits <= 5.5, [found.spec.layer("1").bits == found.bits["1"]]
    (True, [True])
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"batches must be a list of batches, got a tensor of shape {tuple(batches.shape)}: write [x]")
    if quantized := list(named_quantized_layers(model)):
        raise ValueError(
            f"model must be float, got {len(quantized)} quantized layers ({quantized[0]}, ...): call this before it is "
            "quantized, or lq.dequantize_model(model, keep_latent=True) first"
        )
    if not (spec is None or isinstance(spec, QuantSpec)):
        raise TypeError(f"spec must be an lq.QuantSpec or None, got {spec!r}: write lq.QuantSpec()")
    spec, batches = spec or QuantSpec(), list(batches)
    _check_arguments(batches, spec, average_bits, widths)
    run = forward or default_forward
    model = copy.deepcopy(model).eval()
    plan = make_plan(model, spec, execution_order(model, lambda: run(model, batches[0])))
    groups = _groups(plan)
    pinned = {path for path, twins in groups.items() if _pinned(twins, spec)}
    free = [path for path in groups if path not in pinned]
    counts = {path: _weights(twins[0]) for path, twins in groups.items()}
    fixed = {path: plan.specs[path].weight_codes.bits for path in pinned}
    budget = math.floor(average_bits * sum(counts.values()) + 1e-6)  # a product of floats may be short of a whole bit
    budget -= sum(counts[path] * bits for path, bits in fixed.items())
    _check_budget(average_bits, budget, counts, fixed, min(widths))
    targets = [_as_logits(run(model, batch)) for batch in batches]
    losses: dict[str, dict[int, float]] = {path: {} for path in free}
    for path in tqdm(free, desc="measuring layers", unit="layer", disable=not progress):
        for width in widths:
            alone = replace(
                spec, bits=width, levels=None, first_last_bits=None, include=_paths(groups[path]), exclude=None
            )
            losses[path][width] = _divergence(model, alone, batches, targets, run)
    sizes = torch.tensor([[counts[path] * width for width in widths] for path in free])
    table = torch.tensor([list(losses[path].values()) for path in free])
    chosen = {p: widths[i] for p, i in zip(free, choose_within_budget(table, sizes, budget), strict=True)}
    found = _with_widths(spec, plan, {twin: bits for path, bits in chosen.items() for twin in _paths(groups[path])})
    return BitAllocation(found, {path: (chosen | fixed)[path] for path in groups}, counts, losses)


def _check_arguments(batches: list[Any], spec: QuantSpec, average_bits: float, widths: Sequence[int]) -> None:
    if not batches:
        raise ValueError("batches must hold at least one batch, got none: pass a few batches of training data")
    require_number("average_bits", average_bits, lambda v: 0 < v < math.inf, "be positive", "4 is usual")
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise ValueError(f"widths must be a list, got {widths!r}: {list(WIDTHS)} is usual")
    if not widths or len(set(widths)) != len(widths):
        raise ValueError(f"widths must be one or more different ones, got {list(widths)}: {list(WIDTHS)} is usual")
    for width in widths:
        try:
            replace(spec, bits=width, levels=None)
        except ValueError as error:
            raise ValueError(
                f"widths must be such that the spec allows, got {width}: {error}, or leave it out"
            ) from error


def _with_widths(spec: QuantSpec, plan: Plan, chosen: dict[str, int]) -> QuantSpec:
    """The spec with all that is special about any layer said by its path: no order of layers can change it."""
    common = replace(spec, first_last_bits=None, overrides={})
    overrides = {}
    named = any("grid" in changes for changes in spec.overrides.values())
    for path, own in plan.specs.items():
        plain, bits = common.layer(path).to_dict(), {"bits": chosen[path]} if path in chosen else {}
        changes = {name: value for name, value in (own.to_dict() | bits).items() if value != plain[name]}
        if spec.grid == "auto":  # follows the width that is chosen, but where some layer's was named
            changes = {k: v for k, v in changes.items() if k != "grid"} | ({"grid": own.grid} if named else {})
        heeds = find_method(own.quantizer).heeds
        overrides[path] = {name: value for name, value in changes.items() if heeds(name)} | bits
    return replace(common, overrides={path: changes for path, changes in overrides.items() if changes})


def _groups(plan: Plan) -> dict[str, list[PlannedLayer]]:
    """Layers with one weight, by the path of the first of them."""
    by_weight: dict[int, list[PlannedLayer]] = {}
    for planned in plan.layers:
        if planned.spec is not None:
            by_weight.setdefault(weight_key(planned.found.module), []).append(planned)
    return {twins[0].found.path: twins for twins in by_weight.values()}


def _paths(twins: list[PlannedLayer]) -> list[str]:
    return [twin.found.path for twin in twins]


def _pinned(twins: list[PlannedLayer], spec: QuantSpec) -> bool:
    """Whether a layer, or a tied twin, has a width of its own."""
    if spec.first_last_bits is not None and any(twin.is_end for twin in twins):
        return True
    given = [glob for glob, changes in spec.overrides.items() if {"bits", "levels"} & changes.keys()]
    return any(matches(glob, twin.found.path, twin.found.class_names) for glob in given for twin in twins)


def _weights(planned: PlannedLayer) -> int:
    weight = planned.found.module.weight
    assert isinstance(weight, Tensor)
    return weight.numel()


def _check_budget(average_bits: float, budget: int, counts: dict[str, int], fixed: dict[str, int], least: int) -> None:
    if len(fixed) == len(counts):
        raise ValueError("no layer is free to choose its width: first_last_bits=None, or fewer overrides, frees some")
    if sum(count for path, count in counts.items() if path not in fixed) * least > budget:
        needed = sum(count * fixed.get(path, least) for path, count in counts.items()) / sum(counts.values())
        possible = math.ceil(needed * 1000 - 1e-6) / 1000  # what is named must be enough
        raise ValueError(
            f"average_bits must be at least {possible:.3f} here, got {average_bits}: that is every free layer at "
            f"{least} bits. Raise it, or lower first_last_bits, overrides or the smallest of widths"
        )


def _as_logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model must return logits, got {type(output).__name__}: give forward=, which takes them from what it "
            "returns"
        )
    return output


def _divergence(
    model: nn.Module, spec: QuantSpec, batches: Sequence[Any], targets: Sequence[Tensor], run: Forward
) -> float:
    quantized = copy.deepcopy(model)
    apply_plan(quantized, make_plan(quantized, spec))
    follow_norms_of_run(quantized, lambda: run(quantized, batches[0]))
    if uncalibrated_layers(quantized):
        calibrate(quantized, batches, forward=run)
    quantized.eval()
    each = [distillation_loss(run(quantized, x), t) for x, t in zip(batches, targets, strict=True)]
    return float(torch.stack(each).mean())
