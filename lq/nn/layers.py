"""Quantized layers: any convolution or linear layer with a quantizer on its weight and one on its input.

Conversion happens in place and changes the class of the object, as torch's own parametrizations do: the module, its
parameters, its hooks and every reference to it stay what they were, and ``isinstance(layer, nn.Conv2d)`` stays true.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lq.nn.derived import Derived, FixedWeight, derive, uses_own_weight
from lq.nn.substitute import LAYER_TYPES, TRANSPOSED_TYPES, SubstituteWeight, probe_input
from lq.quantizers import ActivationQuantizer, Quantizer, WeightNormalizer

__all__ = [
    "QuantLayer",
    "from_float",
    "operator_weight",
    "to_float",
    "weight_key",
]


class QuantLayer(Derived):
    """Mixin in front of a float layer class: quantizes the input and the weight, then runs the float forward.

    Attributes:
        weight_quantizer: quantizes the weight that arrives at the operator, after any transform of the subclass.
        input_quantizer: quantizes the input; None for weight-only quantization.
        weight_normalizer: what the weight passes before it is quantized; None where it does not.
        transforms_weight: whether the subclass computes that weight from its parameter (standardization).
        layer_spec: the `lq.spec.LayerSpec` it was made from; None where it was made by hand.
    """

    prefix = "Quant"
    weight_quantizer: Quantizer
    input_quantizer: ActivationQuantizer | None
    weight_normalizer: WeightNormalizer | None
    transforms_weight: bool
    layer_spec: object | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Float forward on quantized input and weight.

        Args:
            *args: arguments of the float layer; the first is its input.
            **kwargs: arguments of the float layer.

        Returns:
            Output of the float layer.
        """
        if self.input_quantizer is not None:
            if args:
                args = (self.input_quantizer(args[0]), *args[1:])
            else:
                name = next(iter(kwargs))
                kwargs = {**kwargs, name: self.input_quantizer(kwargs[name])}
        with SubstituteWeight(cast(Tensor, self.weight).shape, self._quantize):
            output = self.float_class.forward(self, *args, **kwargs)
        if self.training and self.weight_quantizer.watches_sums:
            self._show_sums(output)
        return output

    @torch.no_grad()
    def _show_sums(self, output: Tensor) -> None:
        """Let the quantizer see what integer arithmetic would sum: the output without bias and scales."""
        inputs, weights = self.input_quantizer, self.weight_quantizer
        if inputs is None or not inputs.is_calibrated:
            return
        shape = (-1, *(1,) * (cast(Tensor, self.weight).ndim - 2))  # channels before the spatial dimensions
        sums = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.bias is not None:
            sums = sums - cast(Tensor, self.bias).reshape(shape)
        weights.see_sums_(sums / (weights.scale.reshape(shape) * inputs.quantizer.scale), inputs.quantizer)

    @property
    def computes_weight(self) -> bool:
        """Whether the float layer's own weight is no parameter but computed from one: standardized, parametrized."""
        return self.transforms_weight or parametrize.is_parametrized(self, "weight")

    def float_weight(self, *, bounded: bool = True) -> Tensor:
        """The weight as it arrives at the operator, before quantization, differentiable in the parameter.

        Args:
            bounded: whether a normalizer applies bounds that depend on the levels: not while they are set.

        Returns:
            Shape of the layer's weight.
        """
        weight = operator_weight(self, self.float_class) if self.transforms_weight else cast(Tensor, self.weight)
        return self._normalized(weight, bounded=bounded)

    @torch.no_grad()
    def normalize_(self, on: bool) -> None:
        """Normalize the weight before it is quantized, as its quantizer does that, or do not.

        Args:
            on: whether to.
        """
        self.weight_normalizer = None
        if on:
            weight = self.float_weight()
            self.weight_normalizer = self.weight_quantizer.make_normalizer(weight).to(weight.device)

    def _quantize(self, weight: Tensor) -> Tensor:
        return self.weight_quantizer(self._normalized(weight, scale_gradient=True))

    def _normalized(self, weight: Tensor, **how: bool) -> Tensor:
        normalizer = self.weight_normalizer
        return weight if normalizer is None else normalizer(weight, self.weight_quantizer, **how)

    def quantized_weight(self) -> Tensor:
        """The hard quantized weight: what evaluation uses and what ships.

        Returns:
            Shape of the layer's weight.
        """
        with torch.no_grad():
            return self.weight_quantizer.hard(self.float_weight())


def operator_weight(module: nn.Module, float_class: type[nn.Module] | None = None) -> Tensor:
    """The weight that a layer's forward hands to its operator, found by running it on the smallest input.

    Args:
        module: a convolution or linear layer.
        float_class: class whose forward to run, by default the module's own.

    Returns:
        The weight, differentiable in the layer's parameters; the parameter itself where nothing transforms it.

    Raises:
        ValueError: where the forward calls no such operator with a weight of the layer's shape, or not exactly once.
    """
    seen: list[Tensor] = []
    keep = SubstituteWeight(cast(Tensor, module.weight).shape, lambda w: (seen.append(w), w)[1])
    with keep:
        (float_class or type(module)).forward(module, probe_input(module))
    if len(seen) != 1:
        raise ValueError(f"its forward gives its weight to {len(seen)} convolution or linear operators, 1 is needed")
    return seen[0]


def from_float(
    module: nn.Module,
    weight_quantizer: Quantizer,
    input_quantizer: ActivationQuantizer | None,
    *,
    normalize: bool = False,
) -> None:
    """Turn a float layer into its quantized twin, in place.

    Args:
        module: an instance of a class in `LAYER_TYPES` or of a subclass.
        weight_quantizer: for its weight; calibrated by the caller.
        input_quantizer: for its input, or None.
        normalize: whether the weight is normalized before it is quantized.

    Raises:
        TypeError: for other modules, or one that is quantized already.
        ValueError: where the forward does not use the weight as `operator_weight` needs it.

    >>> from lq.functional import code_range
    >>> from lq.quantizers import LSQQuantizer
    >>> layer = nn.Linear(2, 2)
    >>> from_float(layer, LSQQuantizer(code_range(4)), None)
    >>> type(layer).__name__, isinstance(layer, nn.Linear)
    ('QuantLinear', True)
    """
    if not isinstance(module, LAYER_TYPES) or isinstance(module, QuantLayer):
        raise TypeError(f"module must be a float convolution or linear layer, got {type(module).__name__}")
    float_class = type(module)
    transforms = not uses_own_weight(float_class) and operator_weight(module) is not module.weight
    module.__class__ = derive(QuantLayer, float_class)  # type: ignore[assignment]
    module.add_module("weight_quantizer", weight_quantizer)
    module.add_module("input_quantizer", input_quantizer)
    module.add_module("weight_normalizer", None)
    module.transforms_weight = transforms  # type: ignore[assignment]
    cast(QuantLayer, module).normalize_(normalize)
    for quantizer in (weight_quantizer, input_quantizer):
        if quantizer is not None:
            quantizer.train(module.training)


def to_float(module: QuantLayer, weight: Tensor | None = None, *, own: bool = False) -> None:
    """Turn a quantized layer back into a float one, in place.

    Args:
        module: the quantized layer.
        weight: operator weight that the float layer shall have, usually `QuantLayer.quantized_weight`; None leaves its
            parameter as it is.
        own: give the layer a parameter of its own, because others that share the present one must keep it.

    >>> from lq.functional import code_range
    >>> from lq.quantizers import LSQQuantizer
    >>> layer = nn.Linear(2, 2)
    >>> from_float(layer, LSQQuantizer(code_range(4)), None)
    >>> to_float(layer, layer.quantized_weight())
    >>> type(layer).__name__
    'Linear'
    """
    fixed = weight is not None and module.transforms_weight
    for name in ("weight_quantizer", "input_quantizer", "weight_normalizer"):
        delattr(module, name)
    for name in ("transforms_weight", "layer_spec"):
        module.__dict__.pop(name, None)
    float_class = module.float_class
    module.__class__ = derive(FixedWeight, float_class) if fixed else float_class  # type: ignore[assignment]
    if weight is None:
        return
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    if own:
        module.weight = nn.Parameter(weight, requires_grad=cast(Tensor, module.weight).requires_grad)
        return
    with torch.no_grad():
        cast(Tensor, module.weight).copy_(weight)


def weight_key(module: nn.Module) -> int:
    """What tells weights apart: the parameter, or the layer where it computes its weight from others.

    Args:
        module: a convolution or linear layer.

    Returns:
        A key that two layers share only if they share the parameter.
    """
    weight = module.weight
    return id(weight) if isinstance(weight, nn.Parameter) else id(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is a transposed convolution, whose output channels lie on axis 1."""
    return isinstance(module, TRANSPOSED_TYPES)
