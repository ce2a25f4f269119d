"""Block-wise reconstruction: learn the rounding and the scales of a block against what the float block puts out."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lq.functional.layout import positive
from lq.functional.lookup import count_reached, take
from lq.functional.rounding import rounding_penalty, rounding_start, soft_rounding
from lq.nn import QuantLayer
from lq.quantizers import ActivationQuantizer, Quantizer
from lq.search_spec import SearchSpec

__all__ = ["LearnedRounding", "reconstruct_block"]

_WARMUP = 0.2  # share of the iterations without a penalty on undecided weights
_PENALTY = 0.01
_TRAVEL = 10.0  # sum of the steps of Adam, halved by the cosine: from one end of the sigmoid to the other
_SHARPNESS = (20.0, 2.0)


class LearnedRounding(nn.Module):
    """Stands in for a weight quantizer while its weights decide between the levels beside them.

    Args:
        quantizer: whose levels are used.
        weight: float weight.
        rounded: weight that was rounded with care, towards which the start leans, or None.
    """

    def __init__(self, quantizer: Quantizer, weight: Tensor, rounded: Tensor | None = None) -> None:
        """Start where the weights are, or half-way from there to where they were rounded to."""
        super().__init__()
        self.layout, self.shape = quantizer.layout, weight.shape
        self.dtype = weight.dtype
        rows = self.layout.rows(weight.detach()).to(torch.promote_types(weight.dtype, torch.float32))
        levels = quantizer.level_values().to(rows).expand(len(rows), -1).contiguous()
        below = count_reached(rows, levels[:, 1:-1])
        self.low = take(levels, below)
        self.gap = take(levels, below + 1) - self.low
        position = ((rows - self.low) / self.gap.clamp_min(1e-12)).clamp(0, 1)
        if rounded is not None:
            above = self.layout.rows(rounded.detach()) > self.low + self.gap / 2
            position = (position + above) / 2
        self.v = nn.Parameter(rounding_start(position))
        self.factor = nn.Parameter(torch.ones(len(rows), 1, device=rows.device, dtype=rows.dtype))

    def forward(self, _: Tensor) -> Tensor:
        """Weights between their levels, shape of the weight."""
        rows = (self.low + soft_rounding(self.v) * self.gap) * self.factor
        return self.layout.unrows(rows, self.shape).to(self.dtype)

    def decided(self) -> Tensor:
        """Weights on their levels, before the factor, shape of the weight."""
        return self.layout.unrows(torch.where(self.v >= 0, self.low + self.gap, self.low), self.shape)


class _Dropped(nn.Module):
    """An input quantizer that leaves a random share of its input float."""

    def __init__(self, quantizer: ActivationQuantizer, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.drop, self.generator = quantizer, drop, generator

    def forward(self, x: Tensor) -> Tensor:
        y = self.quantizer(x)
        if not self.drop:
            return y
        keep = torch.rand(x.shape, generator=self.generator).to(x.device) < self.drop
        return torch.where(keep, x, y)


def reconstruct_block(
    block: nn.Module,
    layers: Mapping[str, QuantLayer],
    weights: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    spec: SearchSpec,
    tick: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Learn rounding and scales of a block so that its outputs come near those of the float block, in place.

    The loss is the squared error relative to the mean square of the target, summed over channels, plus a penalty on
    weights that have not decided. Afterwards every weight is one of its quantizer's levels; where the error of
    the block would have grown, everything is as it was.

    Args:
        block: holds the layers; in evaluation mode.
        layers: path to layer, those whose rounding is learned.
        weights: path to float weight; where the layer's own differs from it, that was rounded with care.
        x: inputs of the block in the quantized network.
        target: outputs of the float block.
        spec: iterations, batch size, learning rates, drop, seed.
        tick: called after each iteration.

    Returns:
        Mean squared error relative to the mean square of the target before and after.

    Raises:
        ValueError: where the error is not finite.

    Source: Li et al., BRECQ, ICLR 2021; Nagel et al., AdaRound, ICML 2020; drop after Wei et al., QDrop, ICLR 2022.
    """
    scale = target.double().square().mean().clamp_min(1e-30).float()
    before = _error(block, x, target, spec.reconstruct_batch_size) / float(scale)
    if not before < float("inf"):
        raise ValueError("the error of a block must be finite, got NaN or infinity: check the model and the batches")
    axis = -1 if isinstance(list(layers.values())[-1], nn.Linear) else 1  # channels of what the last layer returns
    generator = torch.Generator().manual_seed(spec.search_seed)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    roundings = {path: _rounding(layer, weights[path]) for path, layer in layers.items()}
    kept = {path: (layer.weight_quantizer, layer.input_quantizer) for path, layer in layers.items()}
    inputs = [q for _, q in kept.values() if q is not None and q.is_calibrated]
    optimizer = _optimizer(list(roundings.values()), [q.quantizer.scale for q in inputs], spec)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.reconstruct)
    wanted = [(p, p.requires_grad) for p in block.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        for path, layer in layers.items():
            layer.weight_quantizer = cast(Any, roundings[path])
            if kept[path][1] in inputs:
                layer.input_quantizer = cast(Any, _Dropped(cast(Any, kept[path][1]), spec.drop, generator))
                cast(Any, kept[path][1]).quantizer.scale.requires_grad_(True)
        for step in range(spec.reconstruct):
            picks = torch.randint(len(x), (min(spec.reconstruct_batch_size, len(x)),), generator=generator)
            picks = picks.to(x.device)
            with torch.enable_grad():
                error = (block(x[picks]).float() - target[picks].float()).square().sum(axis).mean() / scale
                (error + _penalty(roundings.values(), step / spec.reconstruct)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tick()
    finally:
        for path, layer in layers.items():
            layer.weight_quantizer, layer.input_quantizer = kept[path]
        for p, flag in wanted:
            p.requires_grad_(flag)
    for path, layer in layers.items():
        _settle(layer, roundings[path])
    after = _error(block, x, target, spec.reconstruct_batch_size) / float(scale)
    if not after < before:  # too few iterations: what there was is better
        block.load_state_dict(state)
    return before, after


def _rounding(layer: QuantLayer, weight: Tensor) -> LearnedRounding:
    own = layer.float_weight().detach()
    return LearnedRounding(layer.weight_quantizer, weight, None if torch.equal(own, weight) else own)


def _optimizer(
    roundings: list[LearnedRounding], input_scales: list[nn.Parameter], spec: SearchSpec
) -> torch.optim.Optimizer:
    rate = min(0.1, _TRAVEL / spec.reconstruct) if spec.reconstruct_lr is None else spec.reconstruct_lr
    groups: list[dict[str, Any]] = [{"params": [r.v for r in roundings], "lr": rate}]
    if spec.scale_lr:
        groups.append({"params": [r.factor for r in roundings], "lr": spec.scale_lr})
        # input scales have a size of their own, of which a step takes the same share
        groups += [{"params": [s], "lr": spec.scale_lr * float(s.detach().abs().mean())} for s in input_scales]
    return torch.optim.Adam(groups)


def _penalty(roundings: Any, progress: float) -> Tensor | float:
    if progress < _WARMUP:
        return 0.0
    start, end = _SHARPNESS
    sharpness = start + (end - start) * (progress - _WARMUP) / (1 - _WARMUP)
    return _PENALTY * torch.stack([rounding_penalty(soft_rounding(r.v), sharpness) for r in roundings]).sum()


@torch.no_grad()
def _settle(layer: QuantLayer, rounding: LearnedRounding) -> None:
    """Weights become levels, and the factor goes into the scale."""
    quantizer = layer.weight_quantizer
    codes = quantizer.encode(rounding.decided())
    quantizer.scale.copy_(positive(quantizer.scale) * rounding.factor.reshape(-1).abs().to(quantizer.scale))
    weight = cast(Tensor, layer.weight)
    weight.copy_(quantizer.decode(codes).to(weight))


@torch.no_grad()
def _error(block: nn.Module, x: Tensor, target: Tensor, size: int) -> float:
    total = 0.0
    for part, goal in zip(x.split(size), target.split(size), strict=True):
        total += float((block(part) - goal).double().square().sum())
    return total / target.numel()
