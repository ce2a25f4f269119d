"""Methods by name: how each builds its quantizers, what it learns, where it was published."""

from collections.abc import Callable
from dataclasses import dataclass

from lq.checks import require_one_of
from lq.functional.levels import MAX_BITS, MIN_BITS
from lq.layer_spec import OPTIONS
from lq.quantizers.apot import APoTQuantizer, InputAPoTQuantizer
from lq.quantizers.base import Quantizer
from lq.quantizers.builders import (
    a2q,
    by_bits,
    codebook,
    minmax,
    overflow_aware,
    sigmoid_sum,
    soft_activation,
    soft_weight,
    subset,
    subset_activation,
    uniform,
)
from lq.quantizers.dsq import DSQQuantizer
from lq.quantizers.learned_steps import InputLearnedStepsQuantizer, LearnedStepsQuantizer
from lq.quantizers.logarithmic import LogQuantizer
from lq.quantizers.lsq import LSQQuantizer
from lq.quantizers.lsq_plus import LSQPlusQuantizer
from lq.quantizers.minmax import MovingRangeQuantizer
from lq.quantizers.overflow_aware import WidenedRangeQuantizer
from lq.quantizers.pact import PACTQuantizer, SAWBQuantizer

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
        options: those of `lq.spec.OPTIONS` that it heeds in training, the fields of a spec that not every method does;
            None where that is not known.

    Raises:
        ValueError: for an option that is none of those.

    >>> import lq.testing
    >>> class Mine(LSQQuantizer):
    ...     def fake_quantize(self, x, scale, gradient_scale):
    ...         return super().fake_quantize(x, scale, gradient_scale / 2)
    >>> def build(spec, codes, **common):
    ...     return Mine(codes, **common)
    >>> lq.quantizers.register_quantizer("mine", Method(build, build, "LSQ whose steps learn half as fast"))
    >>> lq.testing.check_quantizer(lq.spec.LayerSpec(quantizer="mine"))
    >>> del REGISTRY["mine"]
    """

    weight: Callable[..., Quantizer]
    activation: Callable[..., Quantizer]
    summary: str
    learned: str = "scales"
    source: str = ""
    bits: tuple[int, int] = (MIN_BITS, MAX_BITS)
    options: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """See that what is declared are options."""
        for option in self.options or ():
            require_one_of("options of a Method", option, OPTIONS)

    def heeds(self, name: str) -> bool:
        """Whether a field of a spec may change what it does.

        Args:
            name: of the field.

        Returns:
            Whether it may; of a method that does not say, that is all of them.
        """
        return self.options is None or name in self.options or name not in OPTIONS


_GRID = ("levels", "grid")
_LEVELS = (*_GRID, "scale_init", "gradient_scale")
_STAIRCASE = ("forward", "activation_forward", "staircase", "slope_backward_max", "scale_gradient")
_POINTS = (*_STAIRCASE, "scale_init", "gradient_scale", "power", "signed_points", "points_per")
_SUBSET = ("candidates", "words", "zero", "activation_levels", "activation_candidates")

REGISTRY: dict[str, Method] = {
    "soft": Method(
        soft_weight,
        soft_activation,
        "annealed soft staircase",
        source="lq",
        options=_LEVELS + _STAIRCASE,
    ),
    "lsq": Method(
        uniform(LSQQuantizer),
        uniform(LSQQuantizer),
        "hard levels, straight-through",
        source="Esser et al., ICLR 2020",
        options=_LEVELS,
    ),
    "lsq_plus": Method(
        uniform(LSQQuantizer),
        uniform(LSQPlusQuantizer),
        "the same, with an offset of activations",
        learned="scales, offsets of activations",
        source="Bhalgat et al., CVPR Workshops 2020",
        options=_LEVELS,
    ),
    "subset": Method(
        subset,
        subset_activation,
        "staircase onto the best subset of log-scale points",
        learned="scales; points by an exact search",
        source="Oh et al., ECCV 2022",
        options=_POINTS + _SUBSET,
    ),
    "codebook": Method(
        codebook,
        soft_activation,
        "staircase onto free levels",
        learned="scales; levels by k-means, weighted after training",
        source="Choi et al., ICLR 2017",
        options=_POINTS,
    ),
    "minmax": Method(
        minmax,
        uniform(MovingRangeQuantizer),
        "ranges from the largest weight, and a moving average of the largest activation",
        learned="nothing",
        source="Jacob et al., CVPR 2018",
        options=(*_GRID, "fold_norms"),
    ),
    "pact": Method(
        uniform(SAWBQuantizer),
        uniform(PACTQuantizer),
        "clipped activations, weights scaled by their moments (SAWB)",
        learned="bounds of activations",
        source="Choi et al., 2018; Choi et al., MLSys 2019",
        options=(*_GRID, "scale_init"),
    ),
    "dsq": Method(
        uniform(DSQQuantizer),
        uniform(DSQQuantizer),
        "hard levels, derivative of a soft staircase",
        learned="scales, shapes of the staircases",
        source="Gong et al., ICCV 2019",
        options=_LEVELS,
    ),
    "qn": Method(
        sigmoid_sum,
        sigmoid_sum,
        "sums of sigmoids at thresholds from k-means",
        learned="scales of what goes in and comes out",
        source="Yang et al., CVPR 2019",
        options=(*_LEVELS, "slope_backward_max"),
    ),
    "apot": Method(
        by_bits(APoTQuantizer),
        uniform(InputAPoTQuantizer),
        "additive powers of two",
        learned="scales",
        source="Li et al., ICLR 2020",
        options=("gradient_scale",),
    ),
    "nulsq": Method(
        by_bits(LearnedStepsQuantizer),
        uniform(InputLearnedStepsQuantizer),
        "every distance between levels is learned",
        learned="steps",
        source="Gongyo et al., ACCV 2024",
        options=("gradient_scale",),
    ),
    "log2": Method(
        by_bits(LogQuantizer),
        uniform(LSQQuantizer),
        "powers of two, rounded in the logarithmic domain",
        learned="scales of activations (lsq)",
        source="Miyashita et al., 2016",
        options=("scale_init", "gradient_scale"),
    ),
    "dlq": Method(
        by_bits(LogQuantizer, span=7.0),
        uniform(LSQQuantizer),
        "fractional exponents from -7 to 0",
        learned="scales of activations (lsq)",
        source="Cai et al., 2018",
        options=("scale_init", "gradient_scale"),
    ),
    "a2q": Method(
        a2q(False),
        uniform(LSQQuantizer),
        "toward zero, sums of magnitudes that no accumulator overflows with",
        learned="scales, norms of channels",
        source="Colbert et al., ICCV 2023",
        options=(*_LEVELS, "accumulator_bits"),
    ),
    "a2q_plus": Method(
        a2q(True),
        uniform(LSQQuantizer),
        "the same for weights of mean 0, whose sums may be twice as large",
        learned="scales, norms of channels",
        source="Colbert et al., ICML 2024",
        options=(*_LEVELS, "accumulator_bits"),
    ),
    "oaq": Method(
        overflow_aware,
        uniform(WidenedRangeQuantizer),
        "min-max ranges, widened while sums overflow",
        learned="range factors, from overflows",
        source="Xie et al., IJCAI 2020",
        options=(*_GRID, "accumulator_bits"),
    ),
}
