"""Set activation scales from data before training, and batch-norm statistics after it."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.distributed import gather_first, mean_, minimum
from lq.nn import BATCH_NORMS, named_quantized_layers
from lq.quantizers import ActivationQuantizer

__all__ = ["calibrate", "named_batch_norms", "reestimate_batch_norm", "uncalibrated_layers"]

Forward = Callable[[nn.Module, Any], Any]
_SAMPLE = 1 << 13  # values kept of one layer's input per batch


class _Observer:
    """Keeps an even, reproducible sample of what a quantizer sees, and its exact extremes."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []
        self.extremes: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1).float()
        # drawn, not strided: a stride may share a factor with the layout and see the same channels only
        generator = torch.Generator().manual_seed(len(self.samples))
        picks = torch.randint(flat.numel(), (_SAMPLE,), generator=generator).to(flat.device)
        self.samples.append(flat[picks])
        low_high = torch.stack([flat.min(), -flat.max()])
        self.extremes = low_high if self.extremes is None else torch.minimum(self.extremes, low_high)

    def result(self) -> tuple[Tensor, float]:
        """Sample with the extremes appended, and the lowest value, both over all processes."""
        assert self.extremes is not None
        low, high = minimum(self.extremes).mul(torch.tensor([1.0, -1.0], device=self.extremes.device))
        return torch.cat([gather_first(torch.cat(self.samples)), torch.stack([low, high])]), float(low)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a mapping as keywords, the first of a tuple or list, else the batch itself.

    Args:
        model: any module.
        batch: from a loader.

    Returns:
        Output of the model.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> list[str]:
    """Set the input scales of a quantized model from data, in place, and decide the sign of ``activation="auto"``.

    The model runs in the mode it is in, without gradients; its buffers (batch-norm statistics) and the random state
    are what they were afterwards. Over several processes the result is the same on each.

    Args:
        model: a quantized model.
        batches: a few batches of real data, on the device of the model.
        forward: runs the model on a batch; by default `default_forward`.

    Returns:
        Paths of the layers that were calibrated.

    Raises:
        ValueError: for no batches, or activations that are not finite.

    Warns:
        UserWarning: for layers that the batches did not reach, whose input stays in float.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> report = lq.quantize_model(model)
    >>> calibrate(model, [torch.rand(8, 4)]), model[0].input_quantizer.quantizer.codes.lo
    (['0'], 0)
    """
    layers = {path: layer for path, layer in named_quantized_layers(model).items() if layer.input_quantizer is not None}
    observers: dict[ActivationQuantizer, _Observer] = {}
    for layer in layers.values():
        assert layer.input_quantizer is not None
        observers[layer.input_quantizer] = layer.input_quantizer.observer = _Observer()
    try:
        with _unchanged(model):
            count = _run(model, batches, forward or default_forward)
    finally:
        for quantizer in observers:
            quantizer.observer = None
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none: pass a few batches of training data")
    reached = []
    for path, layer in layers.items():
        quantizer = layer.input_quantizer
        assert quantizer is not None
        if observers[quantizer].samples:
            quantizer.calibrate_(*observers[quantizer].result(), getattr(layer.layer_spec, "scale_init", "mse"))
            reached.append(path)
    missed = [path for path in layers if path not in reached]
    if missed:
        warnings.warn(f"calibration did not reach {', '.join(missed)}: their inputs stay in float", stacklevel=2)
    return reached


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any], forward: Forward) -> int:
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007  the count is the result
        forward(model, batch)
    return count


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore buffers and random state."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {buffer.device for _, _, buffer, _ in buffers if buffer.is_cuda}
    with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    setattr(module, name, buffer)  # a forward may have put another in its place
                    buffer.copy_(value)


def uncalibrated_layers(model: nn.Module) -> list[str]:
    """Quantized layers whose input passes through because `calibrate` has not reached them.

    Args:
        model: a quantized model.

    Returns:
        Their paths.
    """
    layers = named_quantized_layers(model).items()
    return [path for path, m in layers if m.input_quantizer is not None and not m.input_quantizer.is_calibrated]


def named_batch_norms(model: nn.Module) -> dict[str, Any]:
    """Batch norms that keep statistics.

    Args:
        model: any model.

    Returns:
        Batch norms by path.
    """
    return {path: m for path, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats}


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None, *, paths: Collection[str] | None = None
) -> int:
    """Recompute batch-norm statistics under hard quantization, in place, as the plain average over batches.

    Statistics gathered in training belong to the soft network; these belong to the one that ships.

    Args:
        model: any model; everything but its batch norms runs in evaluation mode.
        batches: training data, on the device of the model.
        forward: runs the model on a batch; by default `default_forward`.
        paths: of the batch norms to re-estimate; None takes all.

    Returns:
        Number of batch norms that the batches reached; others keep their statistics.

    Raises:
        ValueError: for no batches; the statistics are then what they were.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, section 4.

    >>> model = nn.Sequential(nn.BatchNorm1d(2))
    >>> reestimate_batch_norm(model, [torch.full((4, 2), 3.0)]), model[0].running_mean
    (1, tensor([3., 3.]))
    """
    found = named_batch_norms(model)
    norms = [norm for path, norm in found.items() if paths is None or path in paths]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum, {k: v.clone() for k, v in norm.state_dict().items()}) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        count = _run(model, batches, forward or default_forward)
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    unseen = [norm for norm in norms if not norm.num_batches_tracked]
    for norm, _, state in before:
        if norm in unseen:
            norm.load_state_dict(state)
    if count == 0:
        raise ValueError("batches must hold at least one batch, got none: pass a few batches of training data")
    # in all processes alike: where one has seen a batch norm, so have the others
    for statistic in (s for norm in norms for s in (norm.running_mean, norm.running_var)):
        if isinstance(statistic, Tensor):
            mean_(statistic)
    return len(norms) - len(unseen)
