"""What a post-training search does: `SearchSpec`, a `QuantSpec` with the stages before and after the search."""

import math
from dataclasses import dataclass

from lq.checks import require_bool, require_integer, require_number, require_one_of
from lq.spec import QuantSpec

__all__ = ["IMPORTANCES", "ROUNDINGS", "SearchSpec"]

IMPORTANCES = (None, "inputs", "fisher")
ROUNDINGS = ("nearest", "error_feedback")


@dataclass(frozen=True, kw_only=True)
class SearchSpec(QuantSpec):
    """How a float network is quantized without training: the fields of `QuantSpec`, and what is done around the search.

    Args:
        importance: h of the quantization loss: null for 1, "inputs" for the second moment of what each weight
            multiplies, "fisher" for the squared gradients of the loss.
        fold_batch_norm: move the factor of each batch norm into the weights before it.
        equalize: even out the ranges of neighbouring layers, channel by channel (cross-layer equalization).
        bias_correction: correct the mean that quantization adds to each output channel.
        rounding: "nearest", or "error_feedback": column by column, later weights make up for the error of earlier ones.
        reconstruct: iterations of learned rounding per block, 0 for none; some hundreds to thousands.
        reconstruct_batch_size: inputs per iteration.
        reconstruct_lr: learning rate of the rounding; null takes 10 over the iterations, at most 0.1, far enough for
            every weight to decide.
        scale_lr: learning rate of the factor on each scale, 0 to leave scales alone.
        drop: probability that an input element stays float while a block is reconstructed (QDrop), from 0 to below 1.
        reference: also find the free levels of least loss and the best uniform levels, to show beside each result.
        search_seed: of everything that is drawn.

    Raises:
        ValueError: naming the field, the value got, the values allowed and the fix.

    Source: folding Jacob et al. 2018; equalization and bias correction Nagel et al., Data-Free Quantization, ICCV 2019;
    error feedback Frantar et al., GPTQ, ICLR 2023; reconstruction Nagel et al., AdaRound, ICML 2020, and Li et al.,
    BRECQ, ICLR 2021; drop Wei et al., QDrop, ICLR 2022.

    >>> SearchSpec(bits=3).quantizer, SearchSpec(bits=3).activation
    ('subset', None)
    """

    quantizer: str = "subset"
    activation: str | None = None
    granularity: str = "channel"
    importance: str | None = None
    fold_batch_norm: bool = True
    equalize: bool = False
    bias_correction: bool = False
    rounding: str = "nearest"
    reconstruct: int = 0
    reconstruct_batch_size: int = 32
    reconstruct_lr: float | None = None
    scale_lr: float = 1e-3
    drop: float = 0.0
    reference: bool = True
    search_seed: int = 0

    def __post_init__(self) -> None:
        """Validate every field."""
        super().__post_init__()
        for name, allowed in (("importance", IMPORTANCES), ("rounding", ROUNDINGS)):
            require_one_of(name, getattr(self, name), allowed)
        for name, least in (("reconstruct", 0), ("reconstruct_batch_size", 1)):
            require_integer(name, getattr(self, name), least, fix="choose such a number")
        require_integer("search_seed", self.search_seed, fix="0 is usual")
        for name in ("fold_batch_norm", "equalize", "bias_correction", "reference"):
            require_bool(name, getattr(self, name))
        chosen = 0.0 if self.reconstruct_lr is None else self.reconstruct_lr
        for name, value in {"reconstruct_lr": chosen, "scale_lr": self.scale_lr}.items():
            require_number(name, value, lambda v: 0 <= v < math.inf, "not be negative", "try 1e-2 or 1e-3")
        if self.normalize:
            raise ValueError(
                "normalize must be False for a search, got True: nothing trains, search the weights as they are"
            )
        require_number("drop", self.drop, lambda v: 0 <= v < 1, "lie from 0 to below 1", "QDrop takes 0.5")

    @property
    def needs_batches(self) -> bool:
        """Whether calibration batches are needed."""
        wanted = self.importance or self.bias_correction or self.rounding != "nearest" or self.reconstruct
        return bool(wanted) or self.activation is not None
