"""What a weight passes before it is quantized, where a spec says ``normalize``."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lq.functional.standardize import standardize

if TYPE_CHECKING:
    from lq.quantizers.base import Quantizer

__all__ = ["Standardizer", "WeightNormalizer"]


class WeightNormalizer(nn.Module):
    """Computes the weight that is quantized from the layer's own."""

    @abstractmethod
    def forward(
        self, weight: Tensor, quantizer: "Quantizer", *, bounded: bool = True, scale_gradient: bool = False
    ) -> Tensor:
        """Normalize.

        Args:
            weight: as it arrives at the operator.
            quantizer: of the weight.
            bounded: whether what depends on the quantizer's levels applies: it does not when they are set.
            scale_gradient: whether the quantizer's scale learns from what depends on it.

        Returns:
            Shape and dtype of the weight.
        """


class Standardizer(WeightNormalizer):
    """Gives a weight mean 0 and a fixed standard deviation; see `lq.functional.standardize.standardize`.

    Args:
        spread: the standard deviation, such as that of the float weight: it spares the layers behind a change of scale.
    """

    spread: Tensor

    def __init__(self, spread: Tensor) -> None:
        """Keep the spread."""
        super().__init__()
        self.register_buffer("spread", spread.detach().float().reshape(1))

    def forward(
        self, weight: Tensor, quantizer: "Quantizer", *, bounded: bool = True, scale_gradient: bool = False
    ) -> Tensor:
        """Normalize.

        Args:
            weight: as it arrives at the operator.
            quantizer: has no meaning here.
            bounded: nor has this.
            scale_gradient: nor this.

        Returns:
            Shape and dtype of the weight.
        """
        return standardize(weight, self.spread)
