"""Methods by name: how each builds its quantizers, what it learns, where it was published."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lq.checks import require_one_of
from lq.functional.levels import MAX_BITS, MIN_BITS, CodeRange
from lq.quantizers.a2q import A2QQuantizer, limit_of
from lq.quantizers.apot import APoTQuantizer, InputAPoTQuantizer
from lq.quantizers.base import Quantizer
from lq.quantizers.dsq import DSQQuantizer
from lq.quantizers.learned_steps import InputLearnedStepsQuantizer, LearnedStepsQuantizer
from lq.quantizers.logarithmic import LogQuantizer
from lq.quantizers.lsq import LSQQuantizer
from lq.quantizers.lsq_plus import LSQPlusQuantizer
from lq.quantizers.minmax import MinMaxQuantizer, MovingRangeQuantizer
from lq.quantizers.overflow_aware import OverflowAwareQuantizer, WidenedRangeQuantizer
from lq.quantizers.pact import PACTQuantizer, SAWBQuantizer
from lq.quantizers.sigmoid_sum import SigmoidSumQuantizer
from lq.quantizers.soft import SoftQuantizer
from lq.quantizers.subset import CodebookQuantizer, InputSubsetQuantizer, SubsetQuantizer
from lq.spec import LAYER_FIELDS, LayerSpec

__all__ = ["REGISTRY", "Method"]


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Args:
        weight: builds the weight quantizer from a spec, its code range and the common arguments of `Quantizer`.
        activation: the same for activations.
        summary: one line: what it is.
        learned: what is learned, of weights and of activations.
        source: where it was published.
        bits: widths of weight codes that it has, the smallest and the largest.
        options: fields of `LayerSpec` that it heeds, beside those that every method does: widths, granularity and
            normalize; None where that is not known.

    Raises:
        ValueError: for an option that is no field of `LayerSpec`.
    """

    weight: Callable[..., Quantizer]
    activation: Callable[..., Quantizer]
    summary: str
    learned: str = "scales"
    source: str = ""
    bits: tuple[int, int] = (MIN_BITS, MAX_BITS)
    options: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """See that what is declared are fields of a spec."""
        for option in self.options or ():
            require_one_of("options of a Method", option, LAYER_FIELDS)


def _soft(spec: LayerSpec, codes: CodeRange, hard: bool, **common: Any) -> Quantizer:
    return SoftQuantizer(codes, parity=True, **_staircase(spec, hard), **common)


def _soft_weight(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    return _soft(spec, codes, spec.forward == "hard", **common)


def _soft_activation(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    if spec.activation_forward == "hard":
        return LSQQuantizer(codes, **common)
    return _soft(spec, codes, False, **common)


def _uniform(kind: type[Quantizer]) -> Callable[..., Quantizer]:
    """Of methods that need nothing of the spec but the code range."""
    return lambda spec, codes, **common: kind(codes, **common)


def _by_bits(kind: Callable[..., Quantizer], **fixed: Any) -> Callable[..., Quantizer]:
    """Of methods that need nothing of the spec but the width."""
    return lambda spec, codes, **common: kind(spec.bits, **fixed, **common)


def _a2q(centred: bool) -> Callable[..., Quantizer]:
    return lambda spec, codes, **common: A2QQuantizer(codes, limit=limit_of(spec, centred), centred=centred, **common)


def _minmax(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    return MinMaxQuantizer(codes, folded=spec.fold_norms, **common)


def _overflow_aware(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
    if spec.activation is None:
        raise ValueError(
            "activation must not be None for oaq, got None: the sums that overflow are of integer inputs, take auto, "
            "or quantizer='minmax'"
        )
    return OverflowAwareQuantizer(codes, accumulator_bits=spec.accumulator_bits, **common)


def _sigmoid_sum(spec: LayerSpec, codes: CodeRange, **common: Any) -> Quantizer:
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


_GRID = ("levels", "grid")
_LEVELS = (*_GRID, "scale_init", "gradient_scale")
_STAIRCASE = ("forward", "activation_forward", "staircase", "slope_backward_max", "scale_gradient")
_POINTS = (*_STAIRCASE, "scale_init", "gradient_scale", "power", "signed_points", "points_per")
_SUBSET = ("candidates", "words", "zero", "activation_levels", "activation_candidates")

REGISTRY: dict[str, Method] = {
    "soft": Method(
        _soft_weight,
        _soft_activation,
        "annealed soft staircase",
        source="lq",
        options=_LEVELS + _STAIRCASE,
    ),
    "lsq": Method(
        _uniform(LSQQuantizer),
        _uniform(LSQQuantizer),
        "hard levels, straight-through",
        source="Esser et al., ICLR 2020",
        options=_LEVELS,
    ),
    "lsq_plus": Method(
        _uniform(LSQQuantizer),
        _uniform(LSQPlusQuantizer),
        "the same, with an offset of activations",
        learned="scales, offsets of activations",
        source="Bhalgat et al., CVPR Workshops 2020",
        options=_LEVELS,
    ),
    "subset": Method(
        _subset,
        _subset_activation,
        "staircase onto the best subset of log-scale points",
        learned="scales; points by an exact search",
        source="Oh et al., ECCV 2022",
        options=_POINTS + _SUBSET,
    ),
    "codebook": Method(
        _codebook,
        _soft_activation,
        "staircase onto free levels",
        learned="scales; levels by k-means, weighted after training",
        source="Choi et al., ICLR 2017",
        options=_POINTS,
    ),
    "minmax": Method(
        _minmax,
        _uniform(MovingRangeQuantizer),
        "ranges from the largest weight, and a moving average of the largest activation",
        learned="nothing",
        source="Jacob et al., CVPR 2018",
        options=(*_GRID, "fold_norms"),
    ),
    "pact": Method(
        _uniform(SAWBQuantizer),
        _uniform(PACTQuantizer),
        "clipped activations, weights scaled by their moments (SAWB)",
        learned="bounds of activations",
        source="Choi et al., 2018; Choi et al., MLSys 2019",
        options=(*_GRID, "scale_init"),
    ),
    "dsq": Method(
        _uniform(DSQQuantizer),
        _uniform(DSQQuantizer),
        "hard levels, derivative of a soft staircase",
        learned="scales, shapes of the staircases",
        source="Gong et al., ICCV 2019",
        options=_LEVELS,
    ),
    "qn": Method(
        _sigmoid_sum,
        _sigmoid_sum,
        "sums of sigmoids at thresholds from k-means",
        learned="scales of what goes in and comes out",
        source="Yang et al., CVPR 2019",
        options=(*_LEVELS, "slope_backward_max"),
    ),
    "apot": Method(
        _by_bits(APoTQuantizer),
        _uniform(InputAPoTQuantizer),
        "additive powers of two",
        learned="scales",
        source="Li et al., ICLR 2020",
        options=("gradient_scale",),
    ),
    "nulsq": Method(
        _by_bits(LearnedStepsQuantizer),
        _uniform(InputLearnedStepsQuantizer),
        "every distance between levels is learned",
        learned="steps",
        source="Gongyo et al., ACCV 2024",
        options=("gradient_scale",),
    ),
    "log2": Method(
        _by_bits(LogQuantizer),
        _uniform(LSQQuantizer),
        "powers of two, rounded in the logarithmic domain",
        learned="scales of activations (lsq)",
        source="Miyashita et al., 2016",
        options=("scale_init", "gradient_scale"),
    ),
    "dlq": Method(
        _by_bits(LogQuantizer, span=7.0),
        _uniform(LSQQuantizer),
        "fractional exponents from -7 to 0",
        learned="scales of activations (lsq)",
        source="Cai et al., 2018",
        options=("scale_init", "gradient_scale"),
    ),
    "a2q": Method(
        _a2q(False),
        _uniform(LSQQuantizer),
        "toward zero, sums of magnitudes that no accumulator overflows with",
        learned="scales, norms of channels",
        source="Colbert et al., ICCV 2023",
        options=(*_LEVELS, "accumulator_bits"),
    ),
    "a2q_plus": Method(
        _a2q(True),
        _uniform(LSQQuantizer),
        "the same for weights of mean 0, whose sums may be twice as large",
        learned="scales, norms of channels",
        source="Colbert et al., ICML 2024",
        options=(*_LEVELS, "accumulator_bits"),
    ),
    "oaq": Method(
        _overflow_aware,
        _uniform(WidenedRangeQuantizer),
        "min-max ranges, widened while sums overflow",
        learned="range factors, from overflows",
        source="Xie et al., IJCAI 2020",
        options=(*_GRID, "accumulator_bits"),
    ),
}
