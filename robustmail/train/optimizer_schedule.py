"""What of an optimiser changes with the epoch, and how its groups of parameters follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from robustmail.fields import field_values, map_schedules
from robustmail.schedules import Schedule

__all__ = ["ScheduledField", "scheduled_fields", "apply_schedules"]

Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class ScheduledField:
    """A field of the recipe's optimiser that is a schedule."""

    schedule: Schedule
    first: Any
    """its first value other than 0, or 0 where it has no other"""
    began: tuple[Any, ...]
    """what each group of an optimiser has that is made with `first`; None for a group without such a field"""


def scheduled_fields(optimizer: Any, make: Make, epochs: int, steps: int) -> dict[str, ScheduledField]:
    """{field: knob} of a recipe's optimiser; `make` makes torch's from it, once its schedules are resolved.

    Proportions cannot be read off groups that are all 0, as a cyclic rate is in the first step. So they are those of
    groups made with values other than 0.
    """
    schedules = {name: knob for name, knob in field_values(optimizer).items() if isinstance(knob, Schedule)}
    if not schedules:
        return {}
    firsts = {name: _first(schedule, epochs, steps) for name, schedule in schedules.items()}
    groups = make(dataclasses.replace(optimizer, **firsts)).param_groups
    return {
        name: ScheduledField(schedule, firsts[name], tuple(group.get(name) for group in groups))
        for name, schedule in schedules.items()
    }


def apply_schedules(knobs: dict[str, ScheduledField], optimizer: torch.optim.Optimizer, epoch: float) -> None:
    """Set every group to what the schedules say at a fractional epoch; a group that began elsewhere than the
    optimiser's own field, as an own optimiser may have them, keeps its proportion."""
    for name, knob in knobs.items():
        now = _at(knob.schedule, epoch)
        for group, began in zip(optimizer.param_groups, knob.began, strict=True):
            if name in group:
                group[name] = _followed(began, knob.first, now)


def _followed(began: Any, first: Any, now: Any) -> Any:
    if began == first or not first:
        return now
    return began / first * now if isinstance(began, (int, float)) else began


def _first(schedule: Schedule, epochs: int, steps: int) -> Any:
    values = (_at(schedule, epoch + step / steps) for epoch in range(epochs) for step in range(steps))
    return next((value for value in values if value), 0)


def _at(schedule: Schedule, epoch: float) -> Any:
    return map_schedules(schedule, lambda s: s.at_epoch(epoch))
