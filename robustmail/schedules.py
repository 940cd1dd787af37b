"""Values that change with the epoch; any field of a recipe takes one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from robustmail.errors import RecipeError

__all__ = ["Schedule", "Stairs"]


@runtime_checkable
class Schedule(Protocol):
    """A value that changes with the epoch."""

    def at_epoch(self, epoch: float, /) -> Any:
        """The value in force at a (0-based, possibly fractional) epoch."""

    def turns(self) -> tuple[int, ...]:
        """The epochs at which something new begins: a rehearsal visits each."""


@dataclass(frozen=True)
class Stairs:
    """Constant between steps: `Stairs({0: 0.01, 74: 0.001})` is 0.01 for 74 epochs, then 0.001.

    Keys are 0-based epochs and start at 0; values are anything that the field takes.
    """

    steps: Mapping[int, Any]

    def __post_init__(self) -> None:
        keys = list(self.steps) if isinstance(self.steps, Mapping) else None
        if not keys or any(not isinstance(k, int) or isinstance(k, bool) or k < 0 for k in keys) or 0 not in keys:
            raise RecipeError(
                f"Stairs (given {self.steps!r})",
                "needs a mapping from 0-based epochs to values that starts at 0",
                "Write Stairs({0: 0.1, 60: 0.01}).",
            )
        object.__setattr__(self, "steps", dict(sorted(self.steps.items())))

    def at_epoch(self, epoch: float, /) -> Any:
        """The value of the last step that `epoch` has reached."""
        return self.steps[max(start for start in self.steps if start <= epoch)]

    def turns(self) -> tuple[int, ...]:
        """The epochs at which the value changes."""
        return tuple(self.steps)

    def __repr__(self) -> str:
        return f"Stairs({dict(self.steps)!r})"
