"""Steps of an integer network joined to units: a layer, what its result alone runs through, and who takes that."""

from collections.abc import Sequence
from dataclasses import dataclass

from lq.exporting.lower import Step

__all__ = ["Unit", "join"]


@dataclass
class Unit:
    """A step and what is done to its result before it is kept.

    Args:
        step: what runs.
        result: name of what comes out in the end.
        relu_before: whether a ReLU comes before the addition.
        other: name of what is added, or "".
        shifts: of the result and of the other, before they are added.
        relu: whether a ReLU comes last.
        last: the step that made the result.
        layers: layers that take the result.
        wide: whether something else takes it.
    """

    step: Step
    result: str
    last: Step
    relu_before: bool = False
    other: str = ""
    shifts: tuple[int, int] = (0, 0)
    relu: bool = False
    layers: tuple[Step, ...] = ()
    wide: bool = False


def join(steps: Sequence[Step]) -> list[Unit]:
    """Units in the order they run.

    Args:
        steps: of an integer network, its input first.

    Returns:
        The units, without the input.
    """
    users: dict[str, list[Step]] = {step.node.name: [] for step in steps}
    for step in steps:
        for name in step.node.inputs:
            users[name].append(step)
    done, joined, units = {steps[0].node.name}, set(), []
    for step in steps[1:]:
        if step.node.name in joined:
            continue
        unit = Unit(step, step.node.name, step)
        if step.node.kind == "add":
            unit.other, unit.shifts = step.node.inputs[1], (step.shifts[0], step.shifts[1])
        elif step.node.kind == "relu":
            unit.relu = True
        while len(users[unit.result]) == 1 and _absorb(unit, users[unit.result][0], done):
            joined.add(unit.result)
        unit.layers = tuple(user for user in users[unit.result] if user.layer is not None)
        unit.wide = len(unit.layers) < len(users[unit.result]) or not users[unit.result]
        done.add(unit.result)
        units.append(unit)
    return units


def _absorb(unit: Unit, user: Step, done: set[str]) -> bool:
    """Let a unit take over the one step that uses its result, where that is an addition or a ReLU."""
    node = user.node
    if node.kind == "relu" and not unit.relu:
        unit.relu = True
    elif node.kind == "add" and not unit.other and unit.last.cap is None:
        mine = node.inputs.index(unit.result)
        if node.inputs[1 - mine] not in done:
            return False
        unit.other, unit.shifts = node.inputs[1 - mine], (user.shifts[mine], user.shifts[1 - mine])
        unit.relu_before, unit.relu = unit.relu, False
    else:
        return False
    unit.result, unit.last = node.name, user
    return True
