"""Values that change with the epoch; any field of a recipe takes one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, runtime_checkable

from robustmail.errors import RecipeError

__all__ = ["Cosine", "Cyclic", "OneCycle", "Ramp", "Schedule", "Stairs", "WarmupCosine", "is_schedule"]


@runtime_checkable
class Schedule(Protocol):
    """A value that changes with the epoch."""

    def at_epoch(self, epoch: float, /) -> Any:
        """The value at a 0-based epoch, which may be fractional."""

    def change_points(self) -> tuple[int, ...]:
        """The epochs at which the value changes at once; the dry run tries a step at each."""


def is_schedule(value: Any) -> TypeGuard[Schedule]:
    """Whether a value has the methods of a `Schedule`.

    By its class, which Python remembers: of an instance it would look at each method again, in every field of a recipe.
    """
    return issubclass(type(value), Schedule)


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
        _check_epochs(self, peak=self.peak)

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


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Linearly from `low` to `high`, constant afterwards: low + (high - low) min(t / epochs, 1) at epoch t.

    epochs: length in epochs, at least 1. Raises RecipeError for less.
    """

    low: float = 0.0
    high: float
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self)

    def at_epoch(self, epoch: float, /) -> float:
        """The value at a fractional epoch; `high` from `epochs` on."""
        return self.low + (self.high - self.low) * min(epoch / self.epochs, 1.0)

    def change_points(self) -> tuple[int, ...]:
        """Epoch 0 and the end of the ramp, where the value is the highest."""
        return (0, self.epochs)


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linearly from `low` up to `high` in `warmup` epochs, then along half a cosine down to `low` at `epochs`.

    high: the value at the end of the warm-up.
    low: the value at epoch 0 (unless warmup = 0) and from `epochs` on.
    warmup: length of the warm-up in epochs, 0 ... epochs.
    epochs: whole length in epochs, at least 1.

    Raises RecipeError for a warm-up or a length outside its range.
    """

    high: float
    low: float = 0.0
    warmup: int
    epochs: int

    def __post_init__(self) -> None:
        _check_epochs(self, warmup=self.warmup)

    def at_epoch(self, epoch: float, /) -> float:
        """The value at a fractional epoch; `low` from `epochs` on."""
        if epoch < self.warmup:
            return self.low + (self.high - self.low) * epoch / self.warmup
        return self.low + (self.high - self.low) * _half_cosine(epoch, self.warmup, self.epochs)

    def change_points(self) -> tuple[int, ...]:
        """Epoch 0 and the end of the warm-up."""
        return tuple(sorted({0, self.warmup}))


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Along half a cosine from `low` up to `high` at epoch `peak`, and along another down to `low` at `epochs`.

    The triangle of `Cyclic`, smoothed; Smith and Topin 2019, in the form of torch's OneCycleLR.

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
        _check_epochs(self, peak=self.peak)

    def at_epoch(self, epoch: float, /) -> float:
        """The value at a fractional epoch; `low` from `epochs` on."""
        rise = epoch < self.peak
        share = 1 - _half_cosine(epoch, 0, self.peak) if rise else _half_cosine(epoch, self.peak, self.epochs)
        return self.low + (self.high - self.low) * share

    def change_points(self) -> tuple[int, ...]:
        """Epoch 0 and the peak."""
        return tuple(sorted({0, self.peak}))


def _half_cosine(epoch: float, start: int, end: int) -> float:
    """Half a cosine from 1 at epoch `start` to 0 at `end`; 0 afterwards."""
    return (1 + math.cos(math.pi * min((epoch - start) / max(end - start, 1), 1.0))) / 2


def _check_epochs(schedule: Any, **within: int) -> None:
    """Check that the length is at least 1, and that the other fields named lie within it."""
    name = type(schedule).__name__
    if schedule.epochs < 1:
        raise RecipeError(f"{name} (given epochs={schedule.epochs})", "epochs must be at least 1")
    for field, epoch in within.items():
        if not 0 <= epoch <= schedule.epochs:
            wrong = f"{field} must lie in 0 ... {schedule.epochs} epochs"
            raise RecipeError(f"{name} (given {field}={epoch})", wrong)
