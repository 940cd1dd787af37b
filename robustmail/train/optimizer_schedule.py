"""Schedules of optimiser fields (lr, momentum, ...), applied to every parameter group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from robustmail.errors import RecipeError
from robustmail.fields import describe, field_values, map_schedules
from robustmail.plugin_calls import plugin_name
from robustmail.schedules import Schedule, is_schedule

__all__ = ["ScheduledField", "scheduled_fields", "apply_schedules"]

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class ScheduledField:
    """A field of the recipe's optimiser that is a schedule."""

    schedule: Schedule
    first: Any
    """the schedule's first value other than 0; 0 if all are 0"""
    group_values: tuple[Any, ...]
    """the field's value in each parameter group of an optimiser made with `first`; None in a group without the field"""


def scheduled_fields(optimizer: Any, make: MakeOptimizer, epochs: int, steps: int) -> dict[str, ScheduledField]:
    """The scheduled fields of a recipe's optimiser, by name.

    optimizer: the recipe's optimiser, with schedules.
    make: makes torch's optimiser from one without schedules.
    epochs, steps: of the run, and of an epoch.

    Ratios between groups are those of an optimiser made with values other than 0: a cyclic learning rate begins at 0,
    from which no ratio can be read. Raises RecipeError for a field that no parameter group has.
    """
    schedules = {name: value for name, value in field_values(optimizer).items() if is_schedule(value)}
    if not schedules:
        return {}
    firsts = {name: _first(schedule, epochs, steps) for name, schedule in schedules.items()}
    groups = make(dataclasses.replace(optimizer, **firsts)).param_groups
    for name, schedule in schedules.items():
        if not any(name in group for group in groups):
            who = f"optimizer {plugin_name(optimizer)} (given {name}={describe(schedule)})"
            raise RecipeError(who, f"{name} cannot change with the epoch: the optimiser has no such option")
    return {
        name: ScheduledField(schedule, firsts[name], tuple(group.get(name) for group in groups))
        for name, schedule in schedules.items()
    }


def apply_schedules(scheduled: dict[str, ScheduledField], optimizer: torch.optim.Optimizer, epoch: float) -> None:
    """Set every parameter group to the schedules' values at a fractional epoch.

    A group with a value of its own, as a user's optimiser may have, keeps its ratio to the optimiser's field.
    """
    for name, field in scheduled.items():
        value = _at(field.schedule, epoch)
        for group, group_value in zip(optimizer.param_groups, field.group_values, strict=True):
            if name in group:
                group[name] = _scaled(group_value, field.first, value)


def _scaled(group_value: Any, first: Any, value: Any) -> Any:
    if group_value == first or not first:
        return value
    return group_value / first * value if isinstance(group_value, (int, float)) else group_value


def _first(schedule: Schedule, epochs: int, steps: int) -> Any:
    values = (_at(schedule, epoch + step / steps) for epoch in range(epochs) for step in range(steps))
    return next((value for value in values if value), 0)


def _at(schedule: Schedule, epoch: float) -> Any:
    return map_schedules(schedule, lambda s: s.at_epoch(epoch))
