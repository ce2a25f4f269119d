"""Finding a method by its name, in the registry or in an installed package."""

import warnings
from importlib.metadata import EntryPoint, entry_points

from lq.quantizers.registry import REGISTRY, Method

__all__ = ["find_method", "method_names", "register_quantizer"]

ENTRY_POINTS = "lq.quantizers"
_OWN = frozenset(REGISTRY)


def register_quantizer(name: str, method: Method) -> None:
    """Add a method to the registry under a new name.

    Args:
        name: what `QuantSpec.quantizer` selects it by.
        method: how to build it.

    Raises:
        ValueError: where the name is taken.
    """
    if name in REGISTRY:
        raise ValueError(f"name must be new, got {name!r}: taken are {tuple(REGISTRY)}")
    REGISTRY[name] = method


def find_method(name: str) -> Method:
    """A method of the registry, or one that an installed package offers.

    A package offers methods by entry points of the group ``lq.quantizers``, each of which names a `Method`, whose
    docstring has an example::

        [project.entry-points."lq.quantizers"]
        mine = "mypackage.quantizer:METHOD"

    Args:
        name: of the method.

    Returns:
        The method, in the registry from now on.

    Raises:
        ValueError: for a name that neither the registry nor a package knows, and for a package that cannot be loaded
            or offers something else than a `Method`.
    """
    known = isinstance(name, str)
    if known and name in REGISTRY:
        return REGISTRY[name]
    offered = _offered()
    if not known or name not in offered:
        raise ValueError(
            f"quantizer must be one of {tuple(method_names())}, got {name!r}: choose one of those or add it with "
            "lq.quantizers.register_quantizer"
        )
    try:
        method = offered[name].load()
    except Exception as error:  # whatever its import raises
        raise ValueError(
            f"the entry point {name!r} of {ENTRY_POINTS} must name a lq.quantizers.Method, got "
            f"{offered[name].value!r}, which cannot be loaded ({type(error).__name__}: {error}): repair or remove that "
            "package"
        ) from error
    if not isinstance(method, Method):
        raise ValueError(
            f"the entry point {name!r} of {ENTRY_POINTS} must name a lq.quantizers.Method, got {method!r}: see the "
            "example in the docstring of lq.quantizers.Method"
        )
    register_quantizer(name, method)
    return method


def method_names() -> list[str]:
    """Names of all methods: of the registry, then what installed packages offer.

    Returns:
        The names.

    >>> method_names()[:2]
    ['soft', 'lsq']
    """
    return [*REGISTRY, *sorted(_offered().keys() - REGISTRY.keys())]


def _offered() -> dict[str, EntryPoint]:
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    for name in sorted(offered.keys() & _OWN):
        warnings.warn(
            f"the entry point {name!r} of {ENTRY_POINTS} ({offered[name].value}) is ignored, that name is lq's own: "
            "give it another one",
            stacklevel=3,
        )
    return {name: point for name, point in offered.items() if name not in _OWN}
