"""How one layer is quantized: a frozen dataclass that validates itself and knows nothing of modules."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from lq.checks import require_bool, require_integer, require_number, require_one_of
from lq.functional.candidates import CANDIDATE_SETS, choices
from lq.functional.levels import GRIDS, CodeRange, code_range, require_bits
from lq.functional.scale import SCALE_INITS
from lq.functional.soft import STAIRCASES

__all__ = ["ACTIVATIONS", "FORWARDS", "GRANULARITIES", "LAYER_FIELDS", "OPTIONS", "POINT_QUANTIZERS", "LayerSpec"]

ACTIVATIONS = ("auto", "signed", "unsigned", None)
FORWARDS = ("soft", "hard")
GRANULARITIES = ("tensor", "channel")
SCALE_GRADIENTS = ("straight_through", "exact")
POINT_QUANTIZERS = ("subset", "codebook", "log2", "dlq", "apot", "nulsq", "qn")  # levels or thresholds of their own
_BY_WIDTH = tuple(name for name in POINT_QUANTIZERS if name != "qn")  # as many points as a width has codes
_NORMALIZED = ("apot", "a2q", "a2q_plus")  # as published
ACTIVATION_LEVELS = ("uniform", "subset")


def _candidates(name: str, value: Any) -> str | tuple[float, ...]:
    """A name of candidates, or magnitudes."""
    try:
        return value if isinstance(value, str) else tuple(float(v) for v in value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be one of {CANDIDATE_SETS} or a list of magnitudes, got {value!r}: choose one"
        ) from error


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one layer is quantized.

    Args:
        bits: width of a weight code, 2 to 8.
        activation_bits: width of an activation code, 2 to 8, or "same" as the weights.
        activation: levels of the layer's input: "signed", "unsigned" (after a non-negative activation), "auto"
            (decided from calibration data), or null for weight-only quantization.
        levels: explicit number of weight levels in place of ``bits``: odd for mid_tread, else even. Not of methods
            with points of their own, but for "qn".
        grid: of weights: "mid_tread" (zero is a level), "mid_rise" (levels at +-s/2, +-3s/2, ...), "full_range" (zero,
            and one level more below it than above: the {-2, -1, 0, 1} of LSQ's authors at 2 bits), or "auto": mid_rise
            for the soft staircase at 2 and 3 bits or an even number of levels, mid_tread elsewhere.
        granularity: one weight scale per "tensor" or per output "channel".
        quantizer: name of the method: "soft" (annealed soft staircase), "lsq" (hard, straight-through), "subset" (the
            staircase onto the best subset of candidates), "codebook" (onto free levels), or another one of those that
            `lq quantizers` lists.
        forward: what training sees of the weights: "hard" (rounded, with the staircase's derivative), or "soft".
        activation_forward: "hard" (rounded, straight-through gradient) or "soft" (the staircase) for activations.
        scale_init: first scales from data: "mse", "lsq", "max" or "percentile".
        staircase: function between two levels: "tanh", "atan" or "linear".
        slope_backward_max: cap on the slope in the staircase's derivative alone: 1 is nearly straight-through, more
            favours weights between two levels, null follows the slope.
        gradient_scale: whether gradients of scales are multiplied by LSQ's 1/sqrt(N Q).
        scale_gradient: gradient of a scale through the staircase: "straight_through", or "exact", whose spread grows
            with the number of levels.
        candidates: of "subset": "one_word", "two_words", "three_words", "apot", "log2", "uniform", "mid_rise", or a
            list of magnitudes.
        words: of "subset": see that every candidate is a sum of at most so many powers of two; null does not.
        power: of the quantization loss that "subset" and "codebook" minimise, and all methods in `lq.search`, 2 or 4.
        zero: of "subset": true makes zero a level, false keeps it out, null leaves it to the search.
        signed_points: choose 2**bits points with their signs in place of 2**(bits-1) magnitudes and a sign bit.
        points_per: one set of points per "tensor" (a decoder table per layer) or per output "channel", where scales are
            per channel.
        activation_levels: of "subset": levels of the input are "uniform" or a "subset" of activation_candidates.
        activation_candidates: as candidates, for the input.
        normalize: quantize the weight after giving it mean 0 and the standard deviation it had before training; of
            "a2q" and "a2q_plus": after bounding it so that no accumulator overflows, which they do not without. null
            does so for those two and "apot", as published.
        fold_norms: of "minmax": the one scale of a tensor is that of the weight that the batch norm behind the layer is
            folded into; each output channel then has its own until it is.
        accumulator_bits: of "a2q", "a2q_plus" and "oaq": width of the accumulators, 8 to 32.

    Raises:
        ValueError: naming the field, the value got, the values allowed and the fix.

    >>> LayerSpec(bits=3).weight_codes
    CodeRange(lo=-4, hi=3, offset=0.5)
    """

    bits: int = 4
    activation_bits: int | str = "same"
    activation: str | None = "auto"
    levels: int | None = None
    grid: str = "auto"
    granularity: str = "tensor"
    quantizer: str = "soft"
    forward: str = "hard"
    activation_forward: str = "hard"
    scale_init: str = "mse"
    staircase: str = "tanh"
    slope_backward_max: float | None = 1.0
    gradient_scale: bool = True
    scale_gradient: str = "straight_through"
    candidates: Any = "two_words"
    words: int | None = None
    power: int = 2
    zero: bool | None = None
    signed_points: bool = False
    points_per: str = "tensor"
    activation_levels: str = "uniform"
    activation_candidates: Any = "three_words"
    normalize: bool | None = None
    fold_norms: bool = False
    accumulator_bits: int = 16

    def __post_init__(self) -> None:
        """Validate every field."""
        require_bits("bits", self.bits)
        if self.activation_bits != "same":
            require_bits("activation_bits", self.activation_bits)
        require_one_of("activation", self.activation, ACTIVATIONS)
        require_one_of("granularity", self.granularity, GRANULARITIES)
        require_one_of("forward", self.forward, FORWARDS)
        require_one_of("activation_forward", self.activation_forward, FORWARDS)
        require_one_of("scale_init", self.scale_init, SCALE_INITS)
        require_one_of("staircase", self.staircase, STAIRCASES)
        require_one_of("scale_gradient", self.scale_gradient, SCALE_GRADIENTS)
        cap = math.inf if self.slope_backward_max is None else self.slope_backward_max
        require_number("slope_backward_max", cap, lambda v: v > 0, "be positive or None", "use None for no cap")
        require_one_of("grid", self.grid, ("auto", *GRIDS))
        code_range(self.bits, levels=self.levels, grid=self.weight_grid)
        require_integer("accumulator_bits", self.accumulator_bits, 8, 32, "16 is usual")
        for name in ("gradient_scale", "signed_points", "fold_norms"):
            require_bool(name, getattr(self, name))
        for name in ("zero", "normalize"):
            require_one_of(name, getattr(self, name), (None, True, False))
        if self.levels is not None and self.quantizer in _BY_WIDTH:
            raise ValueError(
                f"levels must be None for quantizer={self.quantizer!r}, got {self.levels}: give bits instead"
            )
        if self.fold_norms and (self.quantizer != "minmax" or self.granularity != "tensor"):
            raise ValueError(
                f"fold_norms must be False for quantizer={self.quantizer!r} and granularity={self.granularity!r}, got "
                "True: it is of minmax with one scale per tensor; scales per channel are the same folded or not"
            )
        require_one_of("power", self.power, (2, 4))
        require_one_of("points_per", self.points_per, GRANULARITIES)
        require_one_of("activation_levels", self.activation_levels, ACTIVATION_LEVELS)
        for name in ("candidates", "activation_candidates"):
            object.__setattr__(self, name, _candidates(name, getattr(self, name)))
        if self.words is not None:
            require_integer("words", self.words, 1, fix="a shifter for each, or None")
        if self.quantizer == "subset":
            choices(self.candidates, self.bits, signed=self.signed_points, zero=self.zero, words=self.words)
            if self.activation is not None and self.activation_levels == "subset":
                signed = self.activation == "signed"  # as many as an unsigned input needs where that is not known yet
                choices(self.activation_candidates, self.activation_codes(signed).bits + (not signed), words=self.words)

    @property
    def weight_grid(self) -> str:
        """What "auto" stands for: a level less costs much among four or eight, little among more."""
        if self.grid != "auto":
            return self.grid
        even = self.bits <= 3 if self.levels is None else isinstance(self.levels, int) and self.levels % 2 == 0
        return "mid_rise" if self.quantizer == "soft" and even else "mid_tread"

    @property
    def normalized(self) -> bool:
        """What None stands for in ``normalize``."""
        return self.quantizer in _NORMALIZED if self.normalize is None else self.normalize

    @property
    def weight_codes(self) -> CodeRange:
        """Code range of the weights."""
        return code_range(self.bits, levels=self.levels, grid=self.weight_grid)

    def activation_codes(self, signed: bool) -> CodeRange:
        """Code range of the input: always with a zero level, because padding inserts zeros.

        Args:
            signed: whether negative values have levels.

        Returns:
            The code range.
        """
        bits = self.weight_codes.bits if self.activation_bits == "same" else int(self.activation_bits)
        return code_range(bits, signed=signed)

    @property
    def widths(self) -> str:
        """Widths of weights and activations, 32 for float ones, such as "W4A32"."""
        inputs = 32 if self.activation is None else self.activation_codes(signed=True).bits
        return f"W{self.weight_codes.bits}A{inputs}"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for checkpoints and headers.

        Returns:
            Field names and values.
        """
        return asdict(self)


LAYER_FIELDS = tuple(f.name for f in fields(LayerSpec))
_COMMON = ("bits", "activation_bits", "activation", "granularity", "quantizer", "normalize")
OPTIONS = tuple(name for name in LAYER_FIELDS if name not in _COMMON)  # fields that some methods heed, others do not
