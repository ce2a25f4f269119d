"""Methods of the user's module, wrapped for as long as a run lasts."""

from collections.abc import Callable
from typing import Any

__all__ = ["Patches"]


class Patches:
    """Methods of objects that are replaced until `undo`; several may replace the same one, and undo it in any order.

    >>> class Module:
    ...     def step(self):
    ...         return 1
    >>> module, one, two = Module(), Patches(), Patches()
    >>> one.put(module, "step", lambda: 2)
    >>> two.put(module, "step", lambda: 3)
    >>> one.undo()
    >>> module.step()
    3
    >>> two.undo()
    >>> module.step(), vars(module)
    (1, {})
    """

    def __init__(self) -> None:
        """Nothing is replaced yet."""
        self._made: list[tuple[Any, str, Callable[..., Any]]] = []

    def put(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Replace a method.

        Args:
            target: object that has it.
            name: of the method.
            replacement: what is called in its place until `undo`.
        """
        before = getattr(target, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            return (replacement if patched.active else before)(*args, **kwargs)  # type: ignore[attr-defined]

        patched.active = True  # type: ignore[attr-defined]
        patched.own = vars(target).get(name)  # type: ignore[attr-defined]
        setattr(target, name, patched)
        self._made.append((target, name, patched))

    def undo(self) -> None:
        """Put back what stands on top; what others have wrapped since passes its calls on until they let go of it."""
        while self._made:
            target, name, patched = self._made.pop()
            patched.active = False  # type: ignore[attr-defined]
            top = vars(target).get(name)
            while getattr(top, "active", None) is False:
                if top.own is None:  # type: ignore[union-attr]
                    delattr(target, name)
                else:
                    setattr(target, name, top.own)  # type: ignore[union-attr]
                top = vars(target).get(name)
