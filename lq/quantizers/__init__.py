"""Quantizers by name: modules that own parameters and call `lq.functional` for their mathematics."""

from lq.functional.layout import ScaleLayout
from lq.layer_spec import LayerSpec
from lq.quantizers.a2q import A2QQuantizer
from lq.quantizers.activation import ActivationQuantizer
from lq.quantizers.apot import APoTQuantizer
from lq.quantizers.base import Quantizer
from lq.quantizers.dsq import DSQQuantizer
from lq.quantizers.learned_steps import LearnedStepsQuantizer
from lq.quantizers.logarithmic import LogQuantizer
from lq.quantizers.lookup import find_method, method_names, register_quantizer
from lq.quantizers.lsq import LSQQuantizer
from lq.quantizers.lsq_plus import LSQPlusQuantizer
from lq.quantizers.minmax import MinMaxQuantizer, MovingRangeQuantizer
from lq.quantizers.normalizer import WeightNormalizer
from lq.quantizers.pact import PACTQuantizer, SAWBQuantizer
from lq.quantizers.points import PointQuantizer
from lq.quantizers.registry import REGISTRY, Method
from lq.quantizers.sigmoid_sum import SigmoidSumQuantizer
from lq.quantizers.soft import SoftQuantizer
from lq.quantizers.subset import CodebookQuantizer, SubsetQuantizer

__all__ = [
    "REGISTRY",
    "A2QQuantizer",
    "APoTQuantizer",
    "ActivationQuantizer",
    "CodebookQuantizer",
    "DSQQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "LearnedStepsQuantizer",
    "LogQuantizer",
    "Method",
    "MinMaxQuantizer",
    "MovingRangeQuantizer",
    "PACTQuantizer",
    "PointQuantizer",
    "Quantizer",
    "SAWBQuantizer",
    "SigmoidSumQuantizer",
    "SoftQuantizer",
    "SubsetQuantizer",
    "WeightNormalizer",
    "build_activation_quantizer",
    "build_weight_quantizer",
    "find_method",
    "method_names",
    "register_quantizer",
]


def build_weight_quantizer(spec: LayerSpec, layout: ScaleLayout, weights: int) -> Quantizer:
    """Weight quantizer of one layer.

    Args:
        spec: the layer's spec.
        layout: which weights share a scale.
        weights: number of weights in the layer.

    Returns:
        The quantizer, its scale not yet set.

    Raises:
        ValueError: for a method that is not in the registry, and for a width that it does not have.
    """
    method, codes = find_method(spec.quantizer), spec.weight_codes
    if not method.bits[0] <= codes.bits <= method.bits[1]:
        raise ValueError(
            f"bits must lie from {method.bits[0]} to {method.bits[1]} for {spec.quantizer}, got {codes.bits}: choose "
            "another width, or another quantizer for the first and last block by overrides"
        )
    count = max(1, weights // layout.scales)
    return method.weight(spec, codes, layout=layout, count=count, gradient_scale=spec.gradient_scale)


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
    quantizer = find_method(spec.quantizer).activation(spec, codes, gradient_scale=spec.gradient_scale)
    return ActivationQuantizer(quantizer, spec.activation_codes, spec.activation)
