"""Quantizers by name: modules that own parameters and call `lq.functional` for their mathematics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lq.functional.layout import ScaleLayout
from lq.functional.levels import CodeRange
from lq.quantizers.activation import ActivationQuantizer
from lq.quantizers.base import Quantizer
from lq.quantizers.lsq import LSQQuantizer
from lq.quantizers.points import PointQuantizer
from lq.quantizers.soft import SoftQuantizer
from lq.quantizers.subset import CodebookQuantizer, InputSubsetQuantizer, SubsetQuantizer
from lq.spec import LayerSpec

__all__ = [
    "REGISTRY",
    "ActivationQuantizer",
    "CodebookQuantizer",
    "LSQQuantizer",
    "Method",
    "PointQuantizer",
    "Quantizer",
    "SoftQuantizer",
    "SubsetQuantizer",
    "build_activation_quantizer",
    "build_weight_quantizer",
    "register_quantizer",
]


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Args:
        weight: builds the weight quantizer from a spec and the common arguments of `Quantizer`.
        activation: the same for activations.
        summary: one line: what it is, what is learned, source.
    """

    weight: Callable[..., Quantizer]
    activation: Callable[..., Quantizer]
    summary: str


def _soft(spec: LayerSpec, codes: CodeRange, hard: bool, **common: Any) -> Quantizer:
    return SoftQuantizer(codes, **_staircase(spec, hard), **common)


def _soft_weight(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    return _soft(spec, codes, spec.forward == "hard", **common)


def _soft_activation(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    if spec.activation_forward == "hard":
        return LSQQuantizer(codes, **common)
    return _soft(spec, codes, False, **common)


def _lsq(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    return LSQQuantizer(codes, **common)


def _staircase(spec: LayerSpec, hard: bool) -> dict[str, Any]:
    return {
        "staircase": spec.staircase,
        "hard": hard,
        "slope_backward_max": spec.slope_backward_max,
        "straight_through_scale": spec.scale_gradient == "straight_through",
    }


def _points(spec: LayerSpec) -> dict[str, Any]:
    per_channel = spec.granularity == spec.points_per == "channel"
    return {"signed": spec.signed_points, "per_channel": per_channel, "power": spec.power}


def _subset(spec: LayerSpec, _: CodeRange, **common: Any) -> Quantizer:
    common |= _staircase(spec, spec.forward == "hard")
    return SubsetQuantizer(spec.bits, candidates=spec.candidates, zero=spec.zero, **_points(spec), **common)


def _codebook(spec: LayerSpec, _: CodeRange, **common: Any) -> Quantizer:
    return CodebookQuantizer(spec.bits, **_points(spec), **_staircase(spec, spec.forward == "hard"), **common)


def _subset_activation(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    if spec.activation_levels == "uniform":
        return _soft_activation(spec, codes, **common)
    common |= _staircase(spec, spec.activation_forward == "hard")
    return InputSubsetQuantizer(codes, candidates=spec.activation_candidates, power=spec.power, **common)


REGISTRY: dict[str, Method] = {
    "soft": Method(_soft_weight, _soft_activation, "annealed soft staircase, learned scale (lq)"),
    "lsq": Method(_lsq, _lsq, "hard levels, straight-through, learned scale (Esser et al., ICLR 2020)"),
    "subset": Method(
        _subset,
        _subset_activation,
        "staircase onto the best subset of log-scale points (Oh et al., ECCV 2022)",
    ),
    "codebook": Method(
        _codebook,
        _soft_activation,
        "staircase onto free levels by weighted k-means (Choi et al., ICLR 2017)",
    ),
}


def register_quantizer(name: str, method: Method) -> None:
    """Add a method to the registry under a new name.

    Args:
        name: what `QuantSpec.quantizer` selects it by.
        method: how to build it.

    Raises:
        ValueError: where the name is taken.
    """
    if name in REGISTRY:
        raise ValueError(f"name must be new, got {name!r}: taken are {tuple(REGISTRY)}")
    REGISTRY[name] = method


def _method(name: str) -> Method:
    if name not in REGISTRY:
        raise ValueError(
            f"quantizer must be one of {tuple(REGISTRY)}, got {name!r}: choose one of those or add it with "
            "lq.quantizers.register_quantizer"
        )
    return REGISTRY[name]


def build_weight_quantizer(spec: LayerSpec, layout: ScaleLayout, weights: int) -> Quantizer:
    """Weight quantizer of one layer.

    Args:
        spec: the layer's spec.
        layout: which weights share a scale.
        weights: number of weights in the layer.

    Returns:
        The quantizer, its scale not yet set.

    Raises:
        ValueError: for a method that is not in the registry.
    """
    count = max(1, weights // layout.scales)
    return _method(spec.quantizer).weight(
        spec, spec.weight_codes, layout=layout, count=count, gradient_scale=spec.gradient_scale
    )


def build_activation_quantizer(spec: LayerSpec) -> ActivationQuantizer | None:
    """Input quantizer of one layer.

    Args:
        spec: the layer's spec.

    Returns:
        The quantizer, not yet calibrated; None for weight-only quantization.

    Raises:
        ValueError: for a method that is not in the registry.
    """
    if spec.activation is None:
        return None
    codes = spec.activation_codes(signed=spec.activation != "unsigned")
    quantizer = _method(spec.quantizer).activation(spec, codes, gradient_scale=spec.gradient_scale)
    return ActivationQuantizer(quantizer, spec.activation_codes, spec.activation)
