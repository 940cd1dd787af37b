"""Values that change with the epoch; any field of a recipe takes one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from robustmail.errors import RecipeError

__all__ = ["Cosine", "Cyclic", "Schedule", "Stairs"]


@runtime_checkable
class Schedule(Protocol):
    """A value that changes with the epoch."""

    def at_epoch(self, epoch: float, /) -> Any:
        """The value at a 0-based epoch, which may be fractional."""

    def change_points(self) -> tuple[int, ...]:
        """The epochs at which the value changes at once; the dry run tries a step at each."""


@dataclass(frozen=True)
class Stairs:
    """Constant between steps: `Stairs({0: 0.01, 74: 0.001})` is 0.01 for 74 epochs, then 0.001.

    steps: from 0-based epochs, 0 among them, to anything that the field accepts.
    Raises RecipeError for other keys, or without the key 0.
    """

    steps: Mapping[int, Any]

    def __post_init__(self) -> None:
        keys = list(self.steps) if isinstance(self.steps, Mapping) else None
        if not keys or any(not isinstance(k, int) or isinstance(k, bool) or k < 0 for k in keys) or 0 not in keys:
            raise RecipeError(
                f"Stairs (given {self.steps!r})",
                "not a mapping from 0-based epochs to values that starts at 0",
                "Write Stairs({0: 0.1, 60: 0.01}).",
            )
        object.__setattr__(self, "steps", dict(sorted(self.steps.items())))

    def at_epoch(self, epoch: float, /) -> Any:
        """The value of the last key <= `epoch`."""
        return self.steps[max(start for start in self.steps if start <= epoch)]

    def change_points(self) -> tuple[int, ...]:
        """The epochs at which the value changes."""
        return tuple(self.steps)

    def __repr__(self) -> str:
        return f"Stairs({dict(self.steps)!r})"


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From `high` to `low` along half a cosine: low + (high - low) (1 + cos(pi t / epochs)) / 2 at epoch t.

    epochs: length in epochs, at least 1. Raises RecipeError for less.
    """

    high: float
    low: float = 0.0
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self)

    def at_epoch(self, epoch: float, /) -> float:
        """The value at a fractional epoch; `low` from `epochs` on."""
        share = min(epoch / self.epochs, 1.0)
        return self.low + (self.high - self.low) * (1 + math.cos(math.pi * share)) / 2

    def change_points(self) -> tuple[int, ...]:
        """Only epoch 0: the value changes gradually."""
        return (0,)


@dataclass(frozen=True, kw_only=True)
class Cyclic:
    """Linearly from `low` up to `high` at epoch `peak`, and down to `low` at `epochs`: one triangle.

    With low = 0 it is the usual cyclic learning rate; with peak = 0 a straight line down.

    high: the value at `peak`.
    low: the value at epoch 0 (unless peak = 0) and from `epochs` on.
    peak: epoch of the highest value, 0 ... epochs.
    epochs: length in epochs, at least 1.

    Raises RecipeError for a peak or a length outside its range.
    """

    high: float
    low: float = 0.0
    peak: int
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self)
        if not 0 <= self.peak <= self.epochs:
            raise RecipeError(f"Cyclic (given peak={self.peak})", f"peak must lie in 0 ... {self.epochs} epochs")

    def at_epoch(self, epoch: float, /) -> float:
        """The value at a fractional epoch; `low` from `epochs` on."""
        if epoch < self.peak:
            share = epoch / self.peak
        else:
            share = (self.epochs - min(epoch, self.epochs)) / max(self.epochs - self.peak, 1)
        return self.low + (self.high - self.low) * share

    def change_points(self) -> tuple[int, ...]:
        """Epoch 0 and the peak."""
        return tuple(sorted({0, self.peak}))


def _check_epochs(schedule: Cosine | Cyclic) -> None:
    if schedule.epochs < 1:
        who = f"{type(schedule).__name__} (given epochs={schedule.epochs})"
        raise RecipeError(who, "epochs must be at least 1")
