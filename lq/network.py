"""What training does to a quantized network as a whole: slope, regularizer, scales, and its figures."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lq.functional.packing import packed_bytes
from lq.functional.statistics import LevelStatistics
from lq.nn import QuantLayer, named_quantized_layers, weight_key
from lq.quantizers import PointQuantizer, Quantizer, WeightNormalizer

__all__ = [
    "NetworkSize",
    "layer_statistics",
    "network_size",
    "parameter_groups",
    "scale_parameters",
    "scale_regularizer",
    "set_slope",
]


def quantizers(model: nn.Module) -> list[Quantizer]:
    """Every quantizer of a model, of weights and activations, each once.

    Args:
        model: a quantized model.

    Returns:
        The quantizers.
    """
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The learned scales (and other parameters) of all quantizers and normalizers, each once.

    Args:
        model: a quantized model.

    Returns:
        The parameters.
    """
    owners = [module for module in model.modules() if isinstance(module, Quantizer | WeightNormalizer)]
    return list({id(p): p for owner in owners for p in owner.parameters()}.values())


def set_slope(model: nn.Module, slope: float) -> None:
    """Set the slope of every staircase of a model.

    Args:
        model: a quantized model.
        slope: new slope, not negative; 0 is the identity.

    Raises:
        ValueError: for a negative slope.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> report = lq.quantize_model(model)
    >>> set_slope(model, 8.0)
    >>> model[0].weight_quantizer.slope
    tensor([8.])
    """
    if not slope >= 0:
        raise ValueError(f"slope must not be negative, got {slope}: use 0 for the identity")
    for quantizer in quantizers(model):
        quantizer.set_slope(slope)


def distinct_weights(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Quantized layers by path, of several that share a weight the first only."""
    seen: set[int] = set()
    for path, layer in named_quantized_layers(model).items():
        key = weight_key(layer)
        if layer.transforms_weight or key not in seen:
            seen.add(key)
            yield path, layer


def scale_regularizer(
    model: nn.Module, *, kind: str = "nearest", on: str = "latent", scale_gradient: bool = False
) -> Tensor:
    """Regularizer that pulls the quantized weights of a model onto their levels; add it to the loss::

        R = 1/2 sum over layers and weights of sg(s)^2 f(d)          (`lq.functional.level_regularizer`)

    Args:
        model: a quantized model.
        kind: "nearest" (``f = d^2``), "l1" or "sine".
        on: "latent" takes ``d`` of the weight, "quantized" of what training sees of it.
        scale_gradient: whether the scales learn from this term.

    Returns:
        Scalar, differentiable in the weights.

    Raises:
        ValueError: for a model without quantized layers, or an unknown ``kind`` or ``on``.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> report = lq.quantize_model(model)
    >>> scale_regularizer(model).item() >= 0
    True
    """
    if on not in ("latent", "quantized"):
        raise ValueError(f"regularizer_on must be 'latent' or 'quantized', got {on!r}: choose one of those")
    terms = [
        layer.weight_quantizer.regularizer(layer.float_weight(), kind=kind, on=on, scale_gradient=scale_gradient)
        for _, layer in distinct_weights(model)
    ]
    if not terms:
        raise ValueError("model must have quantized layers, got none: call lq.quantize_model(model) first")
    return torch.stack([term.reshape(()) for term in terms]).sum()


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.0, scale_lr: float | None = None) -> list[dict]:
    """Parameter groups for an optimizer: scales apart, without weight decay.

    Args:
        model: a quantized model.
        weight_decay: decay of everything that is no scale.
        scale_lr: learning rate of the scales; None leaves it to the optimizer.

    Returns:
        Two groups for ``torch.optim.SGD(lq.parameter_groups(model), lr=0.1)`` and its like.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> report = lq.quantize_model(model)
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(model, weight_decay=1e-4)]
    [(2, 0.0001), (2, 0.0)]
    """
    scales = scale_parameters(model)
    known = {id(p) for p in scales}
    rest = [p for p in model.parameters() if id(p) not in known]
    group: dict = {"params": scales, "weight_decay": 0.0}
    if scale_lr is not None:
        group["lr"] = scale_lr
    return [{"params": rest, "weight_decay": weight_decay}, group]


def layer_statistics(model: nn.Module, *, soft: bool = False, power: int = 2) -> dict[str, LevelStatistics]:
    """How the weights of every quantized layer sit on their levels.

    Args:
        model: a quantized model.
        soft: describe what training sees of the weights instead of the weights.
        power: of the quantization loss, 2 or 4.

    Returns:
        Path to sums.
    """
    return {
        path: layer.weight_quantizer.statistics(layer.float_weight().detach(), soft=soft, power=power)
        for path, layer in distinct_weights(model)
    }


@dataclass(frozen=True)
class NetworkSize:
    """Bytes of the quantized layers' weights.

    Args:
        weights: number of weights in quantized layers.
        float_bytes: their size in float32.
        packed_bytes: their size as packed codes of the layers' widths, plus float32 scales and points.
        rest_bytes: everything else in the model that is a parameter, at its own width, scales excepted.
    """

    weights: int
    float_bytes: int
    packed_bytes: int
    rest_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantized weight, scales included."""
        return 8 * self.packed_bytes / self.weights


def network_size(model: nn.Module) -> NetworkSize:
    """Size of a quantized model.

    Args:
        model: a quantized model.

    Returns:
        Bytes before and after.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(16, 16, bias=False))
    >>> report = lq.quantize_model(model)
    >>> network_size(model).packed_bytes  # 256 codes of 8 bits, the only layer being first and last, and one scale
    260
    """
    weights = packed = 0
    counted = {id(p) for p in scale_parameters(model)}
    for _, layer in distinct_weights(model):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        counted.add(id(weight))
        weights += weight.numel()
        quantizer = layer.weight_quantizer
        tables = quantizer.scale.numel() + (quantizer.points.numel() if isinstance(quantizer, PointQuantizer) else 0)
        packed += packed_bytes(weight.numel(), quantizer.codes.bits) + 4 * tables
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in counted)
    return NetworkSize(weights, 4 * weights, packed, rest)
