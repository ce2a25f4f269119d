"""Decide which layer gets which spec, before anything is touched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lq.globs import matches
from lq.nn import QuantLayer, weight_key
from lq.quantizers import find_method
from lq.spec import OPTIONS, LayerSpec, QuantSpec
from lq.surgery.discover import Found, find_layers

__all__ = ["Plan", "PlannedLayer", "idle_options", "make_plan"]

REGISTRATION = "registration order"
EXECUTION = "execution order"


@dataclass(frozen=True)
class PlannedLayer:
    """One layer and what is to become of it.

    Args:
        found: the layer.
        spec: how to quantize it; None to skip it.
        reason: why it is skipped, or what is special about it.
        is_end: whether it is the first or the last block.
    """

    found: Found
    spec: LayerSpec | None
    reason: str
    is_end: bool = False


@dataclass(frozen=True)
class Plan:
    """All layers of a model.

    Args:
        layers: one entry per layer found.
        order: how first and last were found.
    """

    layers: tuple[PlannedLayer, ...]
    order: str

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """Spec by path of the layers to quantize."""
        return {p.found.path: p.spec for p in self.layers if p.spec is not None}


def make_plan(model: nn.Module, spec: QuantSpec, order: Sequence[str] | None = None) -> Plan:
    """Spec of every layer of a model.

    Args:
        model: any module.
        spec: what to quantize and how.
        order: paths in execution order; None takes registration order.

    Returns:
        The plan; layers that are quantized already keep an entry, so that the plan of a swapped model can be remade.

    Raises:
        ValueError: for a glob that matches no layer, or a model with nothing to quantize.
    """
    found = find_layers(model)
    _check_globs(found, spec)
    usable = [f.path for f in found if _usable(f)]
    sequence = [path for path in order if path in usable] if order else usable
    roles = (
        {path: role for role, path in (("last block", sequence[-1]), ("first block", sequence[0]))} if sequence else {}
    )
    layers = [_planned(f, spec, roles.get(f.path, ""), order) for f in found]
    layers = _tie(layers)
    if not any(p.spec for p in layers):
        listed = "; ".join(f"{p.found.path or '(root)'}: {p.reason}" for p in layers) or "it has no such layer"
        raise ValueError(
            f"model must have a convolution or linear layer to quantize, got {type(model).__name__}: {listed}. "
            "Pass a model that has one, or widen include/exclude"
        )
    return Plan(tuple(layers), EXECUTION if order else REGISTRATION)


def idle_options(spec: QuantSpec, plan: Plan) -> str:
    """What to tell the user of options that were given and that change nothing in training, of no layer.

    They are no errors: a sweep over methods gives them to all. Either no layer's quantizer heeds them, or another field
    that they need beside them is not as they need it.

    Args:
        spec: as it was given.
        plan: made from it.

    Returns:
        One sentence or two; empty where there are none.
    """
    layers = plan.specs.values()
    names = dict.fromkeys(layer.quantizer for layer in layers)
    given = {name: getattr(spec, name) for name in OPTIONS if getattr(spec, name) != getattr(LayerSpec, name)}
    given |= {name: value for changes in spec.overrides.values() for name, value in changes.items() if name in OPTIONS}
    idle = []
    for name, value in given.items():
        heeding = [layer for layer in layers if find_method(layer.quantizer).heeds(name)]
        needs = [_need(name, layer) for layer in heeding]
        if all(needs):
            idle.append(f"{name}={value!r}" + (f" (needs {needs[0]})" if needs else ""))
    if not idle:
        return ""
    return (
        f"without an effect on quantizer={', '.join(names)}: {', '.join(idle)}. "
        "Leave that out; `lq quantizers NAME` lists what a quantizer heeds"
    )


def _need(name: str, layer: LayerSpec) -> str:
    """What an option lacks to have an effect on a layer whose quantizer heeds it; empty where it has one."""
    if name in ("activation_forward", "activation_levels", "activation_candidates") and layer.activation is None:
        return "quantized activations: activation='auto'"
    if name == "activation_candidates" and layer.activation_levels != "subset":
        return "activation_levels='subset'"
    if name == "points_per" and layer.granularity != "channel":
        return "granularity='channel'"
    return ""


def _usable(found: Found) -> bool:
    return found.obstacle in ("", "already quantized")


def _planned(found: Found, spec: QuantSpec, role: str, order: Sequence[str] | None) -> PlannedLayer:
    names = found.class_names
    if not _usable(found):
        return PlannedLayer(found, None, found.obstacle)
    if order and found.path not in order and not isinstance(found.module, QuantLayer):
        return PlannedLayer(found, None, "the example never calls it: unused, or its parent reads its weight")
    if spec.include is not None and not any(matches(g, found.path, names) for g in spec.include):
        return PlannedLayer(found, None, "not included")
    if spec.exclude is not None and any(matches(g, found.path, names) for g in spec.exclude):
        return PlannedLayer(found, None, "excluded")
    layer = spec.layer(found.path, class_names=names, first_or_last=bool(role))
    return PlannedLayer(found, layer, role, bool(role))


def _tie(layers: list[PlannedLayer]) -> list[PlannedLayer]:
    """Layers that share a weight get one spec, that of the widest codes."""
    groups: dict[int, list[int]] = {}
    for i, planned in enumerate(layers):
        if planned.spec is not None:
            groups.setdefault(weight_key(planned.found.module), []).append(i)
    for members in groups.values():
        widest = max(members, key=lambda i: (layers[i].spec or LayerSpec()).bits)
        for i in members:
            note = "" if i == members[0] else f"weight tied to {layers[members[0]].found.path}"
            reason = ", ".join(filter(None, (layers[i].reason, note)))
            layers[i] = replace(layers[i], spec=layers[widest].spec, reason=reason)
    return layers


def _check_globs(found: Sequence[Found], spec: QuantSpec) -> None:
    for name, patterns in _patterns(spec).items():
        for pattern in patterns:
            if not any(matches(pattern, f.path, f.class_names) for f in found):
                paths = ", ".join(f.path for f in found[:12]) + (", ..." if len(found) > 12 else "")
                raise ValueError(f"{name} glob must match a layer, got {pattern!r} which matches none of: {paths}")


def _patterns(spec: QuantSpec) -> Mapping[str, Sequence[str]]:
    return {"include": spec.include or (), "exclude": spec.exclude or (), "overrides": tuple(spec.overrides)}
