"""Checks that every quantizer passes, for tests of `lq` and of packages that add methods to it."""

import copy
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lq.functional.layout import ScaleLayout
from lq.layer_spec import LayerSpec
from lq.nn import QuantLayer
from lq.quantizers import (
    ActivationQuantizer,
    Quantizer,
    build_activation_quantizer,
    build_weight_quantizer,
    find_method,
)
from lq.spec import QuantSpec
from lq.surgery import apply_plan, make_plan, set_widths

__all__ = ["check_quantizer"]

_SHAPE = (6, 4, 3, 3)
_SHARE = (0.05, 4.0)  # least and most of the gradient of the values that those of weights and inputs are, on average


def check_quantizer(spec: LayerSpec) -> None:
    """See that the quantizers which a spec describes keep what the rest of `lq` relies on.

    Of weights, with one scale per tensor and one per channel: hard values are levels, and so are their own hard values,
    and levels follow the size of the weights; stored codes fit in the spec's bits and give hard values back exactly,
    and ranks of codes give codes; the regularizer draws to held codes, and the quantization loss is of hard values;
    training sees hard values, unless the quantizer ``softens``, at levels that do not move with the weights, unless it
    says so; gradients of weights lead where those of their values do, and of everything learned are finite, and not all
    zero; copies and a state dict compute the same; half precision comes back as it was; what is quantized stays as it
    is; a layer whose width changes has the levels of one that had it from the start. Of activations: nothing happens
    before calibration; afterwards the same, and zero stays zero unless the quantizer ``shifts``.

    Args:
        spec: names the method by ``quantizer``, and says how.

    Raises:
        AssertionError: naming the check that failed and the quantizer.

    >>> check_quantizer(LayerSpec(quantizer="lsq", bits=3))
    """
    try:
        _check(spec)
    except AssertionError:
        raise
    except Exception as error:  # whatever a quantizer of others raises
        steps = [frame.name for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
        what = next((name for name in steps if name.startswith("_check_")), steps[-1]).removeprefix("_check_")
        raise AssertionError(
            f"{spec.quantizer!r} must come through the check of its {what}, got {type(error).__name__}: {error}"
        ) from error


def _check(spec: LayerSpec) -> None:
    spec = replace(spec, normalize=False)  # the layer's part
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SHAPE, generator=generator)
    for layout in (ScaleLayout(), ScaleLayout.per_channel(_SHAPE)):

        def make(layout: ScaleLayout = layout) -> Quantizer:
            return build_weight_quantizer(spec, layout, weight.numel())

        quantizer = make()
        quantizer.calibrate_(weight, spec.scale_init)
        quantizer.set_slope(6.0)
        width = spec.weight_codes.bits
        _require(quantizer.codes.bits <= width, f"codes must fit in {width} bits", quantizer)
        checks = (_check_stays, _check_levels, _check_codes, _check_pull)
        for check in (*checks, _check_training, _check_scale, _check_gradients, _check_dtypes):
            check(quantizer, weight)
        _check_state(quantizer, weight, make)
        _check_size(quantizer, weight, spec.scale_init)
    if spec.activation is not None:
        _check_activations(spec, generator)
    _check_widths(spec, generator)


def _require(holds: bool, what: str, quantizer: object) -> None:
    if not holds:
        raise AssertionError(f"{what}: {quantizer}")


def _check_stays(quantizer: Quantizer, x: Tensor) -> None:
    for training in (False, True):
        given = x.clone()
        copy.deepcopy(quantizer).train(training)(given)
        _require(torch.equal(given, x), "what is quantized must stay as it is", quantizer)


def _check_levels(quantizer: Quantizer, x: Tensor) -> None:
    hard, levels = quantizer.hard(x), quantizer.level_values()
    _require(hard.shape == x.shape, f"hard values must have the shape {tuple(x.shape)}", quantizer)
    rows = quantizer.layout.rows(hard)
    for row, own in zip(rows, levels.expand(rows.shape[0], -1), strict=True):
        _require(set(row.tolist()) <= set(own.tolist()), "hard values must be among level_values()", quantizer)
    _require(bool((levels.diff() >= 0).all()), "level_values() must ascend", quantizer)
    settled = copy.deepcopy(quantizer)
    settled.settle_()
    _require(torch.equal(settled.hard(hard), hard), "settled levels must be their own hard values", quantizer)
    _require(torch.equal(settled.level_values(), levels), "levels must stay where they are when settled", quantizer)
    _require(torch.equal(quantizer.eval()(x), hard), "evaluation must give the hard values", quantizer)


def _check_codes(quantizer: Quantizer, x: Tensor) -> None:
    codes = quantizer.encode(x)
    _require(codes.shape == x.shape and not codes.is_floating_point(), "encode() must give integers", quantizer)
    low, high = (int(end) for end in codes.aminmax())
    inside = quantizer.codes.lo <= low and high <= quantizer.codes.hi
    _require(inside, f"codes must lie in {tuple(quantizer.codes[:2])}, got {low}..{high}", quantizer)
    _require(torch.equal(quantizer.decode(codes), quantizer.hard(x)), "codes must give back hard values", quantizer)
    back = quantizer.unrank(quantizer.rank(codes))
    _require(torch.equal(back.long(), codes.long()), "unrank() of rank() must give back codes", quantizer)


def _check_pull(quantizer: Quantizer, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    got = torch.autograd.grad(quantizer.regularizer(x, kind="nearest"), x)[0]
    x = x.detach()
    low, high = (quantizer.hold(quantizer.encode(torch.full_like(x, end))) for end in (-1e6, 1e6))
    held = quantizer.hold(quantizer.encode(x))
    wanted = torch.where((x > low) & (x < high), x - held, 0)
    drawn = torch.allclose(got, wanted, atol=1e-4, rtol=1e-3)
    _require(drawn, "the regularizer must have the gradient x - hold(encode(x)), 0 beyond the ends", quantizer)
    loss, lost = quantizer.statistics(x).loss, (x - quantizer.hard(x)).double().square().sum()
    _require(torch.allclose(loss, lost, rtol=1e-4), "statistics() must have the loss of hard values", quantizer)


def _check_size(quantizer: Quantizer, x: Tensor, method: str) -> None:
    lost = []
    for size in (1, 64):
        own = copy.deepcopy(quantizer)
        own.calibrate_(size * x, method)
        lost.append(float((x - own.hard(size * x).detach() / size).square().mean()))
    _require(lost[1] <= 1.5 * lost[0], "calibrate_() must bring levels to the size of the data", quantizer)


def _check_training(quantizer: Quantizer, x: Tensor) -> None:
    y = quantizer.train()(x).detach().to(x)
    if not quantizer.softens:
        same = torch.allclose(y, quantizer.hard(x), atol=1e-5, rtol=1e-4)
        _require(same, "training must see the hard values, or the quantizer say softens", quantizer)


def _check_scale(quantizer: Quantizer, x: Tensor) -> None:
    own = copy.deepcopy(quantizer).train()
    own(x / 2)
    stays = torch.equal(own.level_values(), quantizer.level_values())
    said = own.follows_weights or own.watches_sums
    _require(stays or said, "levels must not move with weights in training, or follows_weights say so", quantizer)


def _check_gradients(quantizer: Quantizer, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    y = quantizer.train()(x)
    _require(y.shape == x.shape, f"what training sees must have the shape {tuple(x.shape)}", quantizer)
    _require(y.requires_grad, "what training sees must have a gradient", quantizer)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(upstream)
    learned = {name: p for name, p in quantizer.named_parameters() if p.requires_grad}
    for name, parameter in {"the input": x, **learned}.items():
        gradient = parameter.grad
        _require(gradient is not None, f"{name} must have a gradient", quantizer)
        assert gradient is not None
        _require(bool(torch.isfinite(gradient).all()), f"the gradient of {name} must be finite", quantizer)
        _require(bool(gradient.abs().sum() > 0), f"the gradient of {name} must not vanish", quantizer)
    assert x.grad is not None
    share = float((x.grad * upstream).sum() / upstream.square().sum())
    within = f"the gradient of the input must be {_SHARE} of that of the values, got {share:.3g} of it"
    _require(_SHARE[0] <= share <= _SHARE[1], within, quantizer)


def _check_dtypes(quantizer: Quantizer, x: Tensor) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for training in (True, False):
            given = x.to(dtype)
            y, expected = (copy.deepcopy(quantizer.train(training))(v) for v in (given, given.float()))  # some move
            _require(y.dtype == dtype, f"{dtype} must come back as it was, got {y.dtype}", quantizer)
            close = torch.allclose(y.float(), expected, atol=1e-2, rtol=1e-2)
            _require(close, f"{dtype} must be computed in float32 at least", quantizer)


def _check_state(quantizer: Quantizer, x: Tensor, make: Callable[[], Quantizer]) -> None:
    def loaded() -> Quantizer:
        fresh = make()
        fresh.load_state_dict(quantizer.state_dict())
        return fresh

    for what, of in {"a copy": lambda: copy.deepcopy(quantizer), "its state": loaded}.items():
        twin = of()
        _require(torch.equal(twin.hard(x), quantizer.hard(x)), f"{what} must have the same hard values", quantizer)
        for training in (False, True):
            same = torch.equal(twin.train(training)(x), quantizer.train(training)(x))
            _require(same, f"{what} must compute the same, training={training}", quantizer)


def _check_widths(spec: LayerSpec, generator: torch.Generator) -> None:
    weight, sample = torch.randn(8, 12, generator=generator), torch.randn(64, 12, generator=generator)
    least, most = find_method(spec.quantizer).bits
    for bits in (spec.bits - 1, spec.bits + 1):
        if not least <= bits <= most:
            continue
        try:
            other = replace(spec, bits=bits, activation_bits="same", levels=None)
            wanted = _layer(other, weight)
        except ValueError:
            continue  # too few candidates
        changed = _layer(spec, weight)
        set_widths(nn.Sequential(changed), {"0": other})
        for layer in (changed, wanted):
            if layer.input_quantizer is not None:
                layer.input_quantizer.calibrate_(sample, float(sample.min()), spec.scale_init)
            layer.eval()
        same = torch.equal(changed.quantized_weight(), wanted.quantized_weight())
        same = same and torch.equal(changed(sample), wanted(sample))
        _require(same, f"a layer that changes to {bits} bits must be as one of them", changed)


def _layer(spec: LayerSpec, weight: Tensor) -> QuantLayer:
    """A linear layer with this weight, quantized."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    cast(Tensor, model[0].weight).data.copy_(weight)
    apply_plan(model, make_plan(model, QuantSpec(**spec.to_dict(), first_last_bits=None)))
    return cast(QuantLayer, model[0])


def _check_activations(spec: LayerSpec, generator: torch.Generator) -> None:
    sample = torch.randn(64, 12, generator=generator)
    for x in (sample.relu(), sample):
        inputs = build_activation_quantizer(spec)
        assert inputs is not None
        _require(inputs(x) is x, "activations must pass through before calibration", inputs)
        if spec.activation == "unsigned" and bool((x < 0).any()):
            continue
        inputs.calibrate_(x / 2, float(x.min()), spec.scale_init)
        inputs.quantizer.set_slope(6.0)
        _check_stays(inputs.quantizer, x)
        levels = inputs.quantizer.level_values()
        _require(bool((levels.diff() >= 0).all()), "level_values() of activations must ascend", inputs)
        hard = inputs.eval()(x)
        _require(set(hard.unique().tolist()) <= set(levels.tolist()), "activations must be levels", inputs)
        zero = inputs(torch.zeros(1, 3))
        stays = inputs.quantizer.shifts or not bool(zero.any())
        _require(stays, "zero must stay zero, because padding inserts zeros, or the quantizer say shifts", inputs)
        quantizer = inputs.quantizer
        _require(torch.equal(quantizer.hard(x), hard), "evaluation must give the hard values", inputs)
        width = spec.activation_codes(signed=False).bits
        _require(quantizer.codes.bits <= width, f"codes must fit in {width} bits", inputs)
        back = quantizer.decode(quantizer.encode(x))
        _require(torch.equal(back, hard), "codes must give back hard values", inputs)
        for check in (_check_training, _check_gradients, _check_dtypes):
            check(quantizer, x)
        _check_state(quantizer, x, partial(_twin, spec, inputs))
        _check_size(quantizer, x, spec.scale_init)


def _twin(spec: LayerSpec, inputs: ActivationQuantizer) -> Quantizer:
    """That of a fresh input quantizer, with the sign that another one's state says."""
    fresh = build_activation_quantizer(spec)
    assert fresh is not None
    fresh.load_state_dict(inputs.state_dict())
    return fresh.quantizer
