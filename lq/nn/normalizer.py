"""What a weight passes before it is quantized, where a spec says ``normalize``."""

from torch import Tensor, nn

from lq.functional.standardize import standardize

__all__ = ["WeightNormalizer"]


class WeightNormalizer(nn.Module):
    """Gives a weight mean 0 and a fixed standard deviation; see `lq.functional.standardize.standardize`.

    Args:
        spread: the standard deviation, such as that of the float weight: it spares the layers behind a change of scale.
    """

    spread: Tensor

    def __init__(self, spread: Tensor) -> None:
        """Keep the spread."""
        super().__init__()
        self.register_buffer("spread", spread.detach().float().reshape(1))

    def forward(self, weight: Tensor) -> Tensor:
        """Normalize.

        Args:
            weight: as it arrives at the operator.

        Returns:
            Shape and dtype of the weight.
        """
        return standardize(weight, self.spread)
