"""Swap layers for quantized ones and back."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lq.functional.layout import ScaleLayout
from lq.nn import QuantLayer, from_float, is_transposed, named_quantized_layers, to_float, weight_key
from lq.quantizers import Quantizer, build_activation_quantizer, build_weight_quantizer
from lq.spec import LayerSpec, QuantSpec
from lq.surgery.discover import execution_order, run_example
from lq.surgery.norms import follow_norms_of_run
from lq.surgery.plan import Plan, idle_options, make_plan
from lq.surgery.report import QUANTIZED, SKIPPED, SwapReport, SwapRow

__all__ = [
    "apply_plan",
    "dequantize_model",
    "fit_weights",
    "keep_off_fast_path",
    "layer_specs",
    "quantize_model",
    "swap_report",
]


Calibrate = Callable[[str, Quantizer, Tensor], None]


def quantize_model(model: nn.Module, spec: QuantSpec | None = None, example_input: Any = None) -> SwapReport:
    """Swap every convolution and linear layer of a model for its quantized twin, in place, and set the weight scales.

    The modules stay the same objects with the same parameters and hooks; each gets a weight quantizer and, unless the
    spec is weight-only, an input quantizer that passes through until `calibrate` has seen data. The slope is 0.

    Args:
        model: any module not wrapped for distributed training; layers quantized already are left as they are.
        spec: what to quantize and how; the default is 4-bit weights and activations.
        example_input: one argument, a tuple of arguments or a mapping, to find the first and last block by execution;
            without one, registration order decides and the report says so.

    Returns:
        What happened to every layer.

    Raises:
        TypeError: for a wrapped model or something that is no spec.
        ValueError: for a glob without a match, a model with nothing to quantize, weights that are not finite.

    Warns:
        UserWarning: for options of the spec that change nothing in any layer.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [row.bits for row in quantize_model(model, QuantSpec(bits=3)).rows]
    [8, 3, 8]
    """
    spec = QuantSpec() if spec is None else spec
    if isinstance(model, DistributedDataParallel):
        raise TypeError("model must not be wrapped in DistributedDataParallel: quantize it first, then wrap it")
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec must be an lq.QuantSpec, got {spec!r}: write lq.QuantSpec(bits=4)")

    def run() -> None:
        run_example(model, example_input)

    plan = make_plan(model, spec, None if example_input is None else execution_order(model, run))
    report = apply_plan(model, plan)
    if example_input is not None:
        follow_norms_of_run(model, run)
    if idle := idle_options(spec, plan):
        warnings.warn(idle, stacklevel=2)
    return report


def apply_plan(model: nn.Module, plan: Plan, calibrate: Calibrate | None = None, *, fit: bool = True) -> SwapReport:
    """Carry out a plan, in place.

    Args:
        model: the model the plan was made for.
        plan: from `make_plan`.
        calibrate: sets the levels of a weight quantizer from path, quantizer and float weight; by default they are set
            as the layer's spec says.
        fit: whether to change weights, too, where their quantizer begins with others; `fit_weights` can do it later.

    Returns:
        What happened to every layer.
    """
    shared: dict[int, QuantLayer] = {}
    fresh: list[QuantLayer] = []
    for planned in plan.layers:
        module = planned.found.module
        if planned.spec is not None and not isinstance(module, QuantLayer):
            fresh.append(_quantize_layer(planned.found.path, module, planned.spec, shared, calibrate))
    keep_off_fast_path(model)
    if fit and calibrate is None:
        fit_weights(fresh)
    return swap_report(plan)


def fit_weights(layers: Iterable[QuantLayer]) -> None:
    """Let quantizers that begin with other weights than the float network's change these, in place, as `a2q_plus` does.

    Args:
        layers: just quantized: what normalizers have learned since is lost.
    """
    seen: set[int] = set()
    for layer in layers:
        normalizer, weight = layer.weight_normalizer, layer.weight
        if normalizer is None or layer.computes_weight or id(normalizer) in seen:
            continue
        assert isinstance(weight, Tensor)
        seen.add(id(normalizer))
        layer.weight_quantizer.fit_(weight)
        normalizer.load_state_dict(layer.weight_quantizer.make_normalizer(weight).state_dict())


def _quantize_layer(
    path: str,
    module: nn.Module,
    spec: LayerSpec,
    shared: dict[int, QuantLayer],
    calibrate: Calibrate | None,
) -> QuantLayer:
    weight = module.weight
    assert isinstance(weight, Tensor)
    layout = ScaleLayout()
    if spec.granularity == "channel" or spec.fold_norms:
        groups = getattr(module, "groups", 1)
        layout = ScaleLayout.per_channel(weight.shape, transposed=is_transposed(module), groups=groups)
    tied = shared.get(weight_key(module))
    if tied is not None and tied.weight_quantizer.layout != layout:
        tied = None
    quantizer = tied.weight_quantizer if tied else build_weight_quantizer(spec, layout, weight.numel())
    inputs = build_activation_quantizer(spec)
    for part in (quantizer, inputs):
        if part is not None:
            part.to(weight.device)
    from_float(module, quantizer, inputs, normalize=spec.normalized)
    assert isinstance(module, QuantLayer)
    module.layer_spec = spec  # type: ignore[assignment]
    if tied is not None:
        module.weight_normalizer = tied.weight_normalizer
    else:
        weight = module.float_weight(bounded=False)
        if calibrate is None and spec.normalized and not bool(weight.any()):
            raise ValueError(
                f"normalize must be False for constant weights, layer {path!r} has such: give it "
                f'overrides={{"{path}": {{"normalize": False}}}}'
            )
        if calibrate is None:
            quantizer.calibrate_(weight, spec.scale_init)
        else:
            calibrate(path, quantizer, weight.detach())
        shared[weight_key(module)] = module
    return module


def _pass(*_: Any) -> None:
    """Do nothing; its presence as a hook is what counts."""


def keep_off_fast_path(model: nn.Module) -> None:
    """TransformerEncoderLayer's inference fast path reads weights past their layers; a hook makes it take the other."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in (module.linear1, module.linear2):
                if isinstance(layer, QuantLayer):
                    layer.register_forward_pre_hook(_pass)
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def layer_specs(model: nn.Module) -> dict[str, LayerSpec]:
    """Spec of every quantized layer of a model.

    Args:
        model: a quantized model.

    Returns:
        Path to spec.
    """
    specs = {}
    for path, layer in named_quantized_layers(model).items():
        assert isinstance(layer.layer_spec, LayerSpec)
        specs[path] = layer.layer_spec
    return specs


def swap_report(plan: Plan) -> SwapReport:
    """Report of a plan that was carried out.

    Args:
        plan: the plan.

    Returns:
        One row per layer.
    """
    rows = []
    for planned in plan.layers:
        found, spec = planned.found, planned.spec
        if isinstance(found.module, QuantLayer) and isinstance(found.module.layer_spec, LayerSpec):
            spec = found.module.layer_spec  # what it has, whatever was planned
        weight = getattr(found.module, "weight", None)
        shaped = isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight)
        row = SwapRow(
            path=found.path,
            class_name=found.class_names[0] if found.class_names else type(found.module).__name__,
            action=SKIPPED if spec is None else QUANTIZED,
            reason=planned.reason,
            weight_shape=tuple(cast(Tensor, weight).shape) if shaped else None,
        )
        if spec is not None:
            codes = spec.weight_codes
            width = None if spec.activation is None else spec.activation_codes(signed=True).bits
            row = replace(
                row,
                bits=codes.bits,
                levels=codes.levels,
                granularity=spec.granularity,
                activation_bits=width,
                activation=_sign(found.module, spec),
            )
        rows.append(row)
    return SwapReport(tuple(rows), plan.order)


def _sign(module: nn.Module, spec: LayerSpec) -> str | None:
    """What was asked for, or what calibration made of "auto"."""
    inputs = module.input_quantizer if isinstance(module, QuantLayer) else None
    if spec.activation != "auto" or inputs is None or not inputs.is_calibrated:
        return spec.activation
    return "shifted" if inputs.quantizer.shifts else "signed" if inputs.quantizer.codes.lo < 0 else "unsigned"


def dequantize_model(model: nn.Module, *, keep_latent: bool = False) -> list[str]:
    """Turn the quantized layers of a model back into float ones that hold the hard quantized weights, in place.

    In evaluation the outputs equal those of the quantized model exactly, but for the quantization of activations.
    A layer that standardizes its weight comes back with the quantized standardized weight and no standardization.

    Args:
        model: a quantized model.
        keep_latent: keep the weights as they were trained instead.

    Returns:
        Paths of the layers that were turned back.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> report = quantize_model(model)
    >>> dequantize_model(model), type(model[0]).__name__
    (['0'], 'Linear')
    """
    layers = named_quantized_layers(model)
    values = {path: None if keep_latent else layer.quantized_weight() for path, layer in layers.items()}
    users: dict[int, set[int]] = {}  # by parameter: the quantizers through which it is used
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(getattr(module, "weight_quantizer", None)))
    alone = {path: len(users.get(weight_key(layer), ())) <= 1 for path, layer in layers.items()}
    for path, layer in layers.items():
        to_float(layer, values[path], own=not alone[path] and values[path] is not None)
    return list(layers)
