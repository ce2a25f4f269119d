"""What to quantize and how: a frozen dataclass that validates itself and knows nothing of modules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lq.checks import require_one_of
from lq.functional.levels import require_bits
from lq.globs import globs, matches
from lq.layer_spec import LAYER_FIELDS, OPTIONS, POINT_QUANTIZERS, LayerSpec

__all__ = ["LAYER_FIELDS", "OPTIONS", "POINT_QUANTIZERS", "LayerSpec", "QuantSpec"]


@dataclass(frozen=True, kw_only=True)
class QuantSpec(LayerSpec):
    """How a network is quantized: the fields of `LayerSpec` for all layers, and which layers differ.

    Args:
        first_last_bits: width of weights and activations in the first and last block, 2 to 8; null for no exception.
            Where the others have points, these have uniform levels; their weights are not normalized, and their
            accumulators have 32 bits.
        include: globs on module paths ("layer1.*") or on class names ("type:Conv2d"); null for all layers.
        exclude: the same, for layers to leave in float.
        overrides: glob to fields that differ there: {"blocks.0.*": {"bits": 8}}; later globs win.

    Raises:
        ValueError: naming the field, the value got, the values allowed and the fix.

    >>> spec = QuantSpec(bits=2, overrides={"head*": {"bits": 8}})
    >>> spec.layer("head").bits, spec.layer("layer1.0.conv1").bits
    (8, 2)
    """

    first_last_bits: int | None = 8
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate every field, overrides included, and store plain copies of the containers."""
        super().__post_init__()
        if self.first_last_bits is not None:
            require_bits("first_last_bits", self.first_last_bits)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, globs(name, getattr(self, name)))
        given = self.overrides or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"overrides must hold fields by glob, got {given!r}: such as {{'head': {{'bits': 8}}}}")
        for pattern, changes in given.items():
            if not isinstance(changes, Mapping):
                raise ValueError(
                    f"overrides[{pattern!r}] must hold fields by name, got {changes!r}: such as {{'bits': 8}}"
                )
        object.__setattr__(self, "overrides", {str(k): dict(v) for k, v in given.items()})
        for pattern, changes in self.overrides.items():
            for key in changes:
                require_one_of(f"overrides[{pattern!r}] key", key, LAYER_FIELDS)
            replace(self._plain(), **_widened(changes))

    def _plain(self) -> LayerSpec:
        return LayerSpec(**{name: getattr(self, name) for name in LAYER_FIELDS})

    def layer(self, path: str, *, class_names: Sequence[str] = (), first_or_last: bool = False) -> LayerSpec:
        """Spec of one layer: the common fields, then the first/last width, then the overrides that match.

        Args:
            path: module path.
            class_names: names of the layer's class and its bases, for ``type:`` globs.
            first_or_last: whether it is the first or last block of the network.

        Returns:
            The layer's spec.
        """
        spec = self._plain()
        if first_or_last and self.first_last_bits is not None:
            uniform = {"quantizer": "lsq", "activation_levels": "uniform"} if spec.quantizer in POINT_QUANTIZERS else {}
            changes = {"bits": self.first_last_bits, "activation_bits": "same", "levels": None, "normalize": False}
            spec = replace(spec, accumulator_bits=32, **changes, **uniform)
        for pattern, changes in self.overrides.items():
            if matches(pattern, path, class_names):
                spec = replace(spec, **_widened(changes))
        return replace(spec, grid=spec.weight_grid, normalize=spec.normalized)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "QuantSpec":
        """Inverse of `to_dict`.

        Args:
            values: field names and values.

        Returns:
            The spec.

        Raises:
            ValueError: for a name that is no field.
        """
        allowed = tuple(f.name for f in fields(cls))
        for key in values:
            require_one_of("QuantSpec field", key, allowed, "remove it or correct its spelling")
        return cls(**values)


def _widened(changes: Mapping[str, Any]) -> dict[str, Any]:
    """An override, which with a width drops an explicit number of levels."""
    return {**({"levels": None} if "bits" in changes else {}), **changes}
