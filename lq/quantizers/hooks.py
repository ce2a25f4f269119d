"""What a method may do beside quantizing: most leave all of it alone."""

from torch import Tensor, nn

from lq.quantizers.normalizer import Standardizer, WeightNormalizer

__all__ = ["QuantizerHooks"]


class QuantizerHooks(nn.Module):
    """Base of `Quantizer`: what layers, callbacks and exporters call, and what happens where a method has no answer.

    Attributes:
        watches_sums: whether `see_sums_` wants to see the layer's sums in training, and the scale changes with them.
        follows_weights: whether the scale is computed from the weights in training, so that weights which are put
            onto levels move it.
        softens: whether training sees values between levels, or would if it did not round.
        shifts: whether levels begin at an offset: codes are unsigned whatever the values, and zero may be no level.
        takes_half: whether `fake_quantize` takes half precision as it is, so that training keeps no copy in float32.
    """

    watches_sums = follows_weights = softens = shifts = takes_half = False

    def make_normalizer(self, weight: Tensor) -> WeightNormalizer:
        """What a weight passes before this quantizes it, where a spec says ``normalize``.

        Args:
            weight: the weight as it is.

        Returns:
            The normalizer.
        """
        return Standardizer(weight.std(correction=0))

    def fit_(self, weight: Tensor) -> None:
        """Change a weight that is to be normalized, in place, once levels are set; most methods need not.

        Args:
            weight: the parameter.
        """

    def see_sums_(self, sums: Tensor, inputs: nn.Module) -> None:
        """What a method learns from the layer's sums, in place, where ``watches_sums``; most learn nothing.

        Args:
            sums: what accumulators would hold of this batch: sums of products of codes, shape of the layer's output.
            inputs: quantizer of the layer's input.
        """

    def settle_(self) -> None:
        """Make levels their own hard values, in place, as stored weights need it; of most methods they are."""

    def set_slope(self, slope: float) -> None:
        """Set the slope of the staircase; methods without one ignore it.

        Args:
            slope: new slope, not negative.
        """
