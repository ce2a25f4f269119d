"""Freezing of weights that oscillate between two levels."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lq.callbacks.steps import StepCounter
from lq.checks import require_number
from lq.functional.oscillation import Oscillation, start_oscillation, track_oscillation
from lq.functional.schedule import ramp
from lq.network import distinct_weights
from lq.nn import QuantLayer
from lq.tracking import metric

__all__ = ["IterativeFreezing"]


class IterativeFreezing(StepCounter):
    """Freezes a weight to its average level once it turns back more often than a threshold allows.

    The threshold falls along a cosine over the fit. Place it behind `LearnedQuantization`. Frozen weights follow their
    level, which goes on learning. Layers that compute their weight from others (standardization, normalization), or
    whose scale follows the weights and would move with those held (oaq, pact, minmax, log2, dlq), are left alone and
    named.

    Args:
        threshold_start: share of steps on which a weight may turn back at the start.
        threshold_end: the same at the end.
        momentum: of the moving averages: 0.01 looks back some 100 steps.

    Raises:
        ValueError: for a threshold or momentum out of range.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, algorithm 1.

    >>> IterativeFreezing(threshold_end=0.02).thresholds
    (0.1, 0.02)
    """

    def __init__(self, threshold_start: float = 0.1, threshold_end: float = 0.01, momentum: float = 0.01) -> None:
        """Validate; nothing is tracked before the first step."""
        super().__init__()
        falls = "it falls, 0.1 to 0.01 is usual"
        require_number("threshold_start", threshold_start, lambda v: 0 < v <= 1, "lie above 0 and not above 1", falls)
        below = f"lie above 0 and not above threshold_start, {threshold_start}"
        require_number("threshold_end", threshold_end, lambda v: 0 < v <= threshold_start, below, falls)
        require_number("momentum", momentum, lambda v: 0 < v <= 1, "lie above 0 and not above 1", "0.01 is usual")
        self.thresholds, self.momentum = (threshold_start, threshold_end), momentum

    def restart(self) -> None:
        """Begin with nothing frozen."""
        super().restart()
        self.states, self._levels = dict[str, Oscillation](), dict[str, int]()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which layers cannot be frozen."""
        super().on_train_start(trainer, pl_module)
        left = [path for path, layer in distinct_weights(pl_module) if not _can_freeze(layer)]
        if left:
            rank_zero_warn(
                "layers whose weight is computed, or whose scale would move with weights that are held, cannot be "
                f"frozen and are left alone: {left}"
            )

    @torch.no_grad()
    def after_step(self, pl_module: LightningModule) -> None:
        """Track, freeze, hold what is frozen.

        Args:
            pl_module: the module that is trained.
        """
        threshold = ramp(*self.thresholds, 1, "cosine")(self.part)
        followed = [(path, layer) for path, layer in distinct_weights(pl_module) if _can_freeze(layer)]
        for path, layer in followed:
            self.states[path] = self._follow(path, layer, threshold)
        frozen = sum((self.states[path].frozen.sum() for path, _ in followed), torch.zeros(()))
        total = sum(_weight(layer).numel() for _, layer in followed)
        pl_module.log(metric("frozen_fraction"), frozen / max(1, total))

    def _follow(self, path: str, layer: QuantLayer, threshold: float) -> Oscillation:
        state, quantizer, weight = self.states.get(path), layer.weight_quantizer, _weight(layer)
        position = quantizer.rank(quantizer.encode(weight)).float()
        if state is None or self._levels.get(path) != quantizer.codes.levels:  # none yet, or of another width
            self._levels[path] = quantizer.codes.levels
            return start_oscillation(position)
        state = Oscillation(*(part.to(position.device) for part in state))
        # what is frozen has moved with the optimizer only until here
        state = track_oscillation(state, torch.where(state.frozen, state.position, position), self.momentum)
        new = (state.frequency > threshold) & ~state.frozen
        position = torch.where(new, state.average.round(), state.position)
        state = state._replace(position=position, frozen=state.frozen | new)
        held = quantizer.hold(quantizer.unrank(position)).to(weight.dtype)
        weight.copy_(torch.where(state.frozen, held, weight))
        return state

    def state_dict(self) -> dict[str, Any]:
        """What is known about every weight.

        Returns:
            Steps and tensors.
        """
        layers = {path: state._asdict() for path, state in self.states.items()}
        return super().state_dict() | {"levels": dict(self._levels), "layers": layers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was written.

        Args:
            state_dict: from `state_dict`.
        """
        super().load_state_dict(state_dict)
        self._levels = dict(state_dict["levels"])
        self.states = {path: Oscillation(**parts) for path, parts in state_dict["layers"].items()}


def _can_freeze(layer: QuantLayer) -> bool:
    derived, quantizer = layer.computes_weight or layer.weight_normalizer is not None, layer.weight_quantizer
    return not (derived or quantizer.watches_sums or quantizer.follows_weights)


def _weight(layer: QuantLayer) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight
