"""How the registry's methods build their quantizers: from a spec, a code range and the common arguments."""

from collections.abc import Callable
from typing import Any

from lq.functional.levels import CodeRange
from lq.layer_spec import LayerSpec
from lq.quantizers.a2q import A2QQuantizer, limit_of
from lq.quantizers.base import Quantizer
from lq.quantizers.lsq import LSQQuantizer
from lq.quantizers.minmax import MinMaxQuantizer
from lq.quantizers.overflow_aware import OverflowAwareQuantizer
from lq.quantizers.sigmoid_sum import SigmoidSumQuantizer
from lq.quantizers.soft import SoftQuantizer
from lq.quantizers.subset import CodebookQuantizer, InputSubsetQuantizer, SubsetQuantizer

__all__ = [
    "a2q",
    "by_bits",
    "codebook",
    "minmax",
    "overflow_aware",
    "sigmoid_sum",
    "soft_activation",
    "soft_weight",
    "subset",
    "subset_activation",
    "uniform",
]


def _soft(spec: LayerSpec, codes: CodeRange, hard: bool, **common: Any) -> Quantizer:
    return SoftQuantizer(codes, parity=True, **_staircase(spec, hard), **common)


def soft_weight(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    """The staircase; what training sees of it as ``forward`` says."""
    return _soft(spec, codes, spec.forward == "hard", **common)


def soft_activation(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    """Rounded inputs are those of LSQ, soft ones the staircase."""
    if spec.activation_forward == "hard":
        return LSQQuantizer(codes, **common)
    return _soft(spec, codes, False, **common)


def uniform(kind: type[Quantizer]) -> Callable[..., Quantizer]:
    """Of methods that need nothing of the spec but the code range."""
    return lambda spec, codes, **common: kind(codes, **common)


def by_bits(kind: Callable[..., Quantizer], **fixed: Any) -> Callable[..., Quantizer]:
    """Of methods that need nothing of the spec but the width."""
    return lambda spec, codes, **common: kind(spec.bits, **fixed, **common)


def a2q(centred: bool) -> Callable[..., Quantizer]:
    """Of weights whose sums are bounded, of mean 0 (``centred``) or not."""
    return lambda spec, codes, **common: A2QQuantizer(codes, limit=limit_of(spec, centred), centred=centred, **common)


def minmax(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    """Ranges of the weight, or of what batch norms fold into it."""
    return MinMaxQuantizer(codes, folded=spec.fold_norms, **common)


def overflow_aware(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    """Ranges that follow the sums of integer inputs, which there must be."""
    if spec.activation is None:
        raise ValueError(
            "activation must not be None for oaq, got None: the sums that overflow are of integer inputs, take auto, "
            "or quantizer='minmax'"
        )
    return OverflowAwareQuantizer(codes, accumulator_bits=spec.accumulator_bits, **common)


def sigmoid_sum(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    """Sums of sigmoids; the staircase has no other shape there."""
    return SigmoidSumQuantizer(codes, slope_backward_max=spec.slope_backward_max, **common)


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


def subset(spec: LayerSpec, _: CodeRange, **common: Any) -> Quantizer:
    """The staircase onto chosen points."""
    common |= _staircase(spec, spec.forward == "hard")
    return SubsetQuantizer(spec.bits, candidates=spec.candidates, zero=spec.zero, **_points(spec), **common)


def codebook(spec: LayerSpec, _: CodeRange, **common: Any) -> Quantizer:
    """The staircase onto free points."""
    return CodebookQuantizer(spec.bits, **_points(spec), **_staircase(spec, spec.forward == "hard"), **common)


def subset_activation(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    """Uniform inputs as those of the staircase, or chosen points."""
    if spec.activation_levels == "uniform":
        return soft_activation(spec, codes, **common)
    common |= _staircase(spec, spec.activation_forward == "hard")
    return InputSubsetQuantizer(codes, candidates=spec.activation_candidates, power=spec.power, **common)
