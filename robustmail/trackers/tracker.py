"""What a tracker is: an experiment tracker's library behind six methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from robustmail.errors import PluginError

__all__ = ["Opened", "Outcome", "TrackedRun", "Tracker", "Unseen", "check_installed"]

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ended: "stopped" by the user, who may resume it; "failed" with an error."""


class TrackedRun(NamedTuple):
    """The run that a tracker is to follow."""

    name: str
    folder: Path
    """an existing folder for the tracker's files, below the run's"""
    config: Mapping[str, str | int | float]
    """the fields of recipe.json"""
    step: int
    """number of steps that are done, over all epochs; larger than 0 for a run that is resumed"""
    id: str | None = None
    """what `start` returned when the run was tracked before; None for the first time"""


class Opened(NamedTuple):
    """What a tracker has opened."""

    id: str
    """names the tracker's run when the training is resumed: letters, digits, "_" and "-", 64 at most"""
    where: str
    """for people: where the values go, and how to see them"""


class Tracker(Protocol):
    """Keeps a run's values. Made without arguments, which raises PluginError where its library is not installed.

    `step` is the number of training steps done, over all epochs: 1 after the first. A run that was killed trains some
    steps again, with the same values, after `start` was called with its id; a tracker then keeps each step once, where
    its library allows. Anything else that a method raises ends the tracking, and never the training.
    """

    def start(self, run: TrackedRun) -> Opened:
        """Open a new run, or the one of `run.id` again."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Keep scalars by name, such as "train/loss"."""

    def histogram(self, name: str, counts: Sequence[int], span: tuple[float, float], step: int) -> None:
        """Keep a histogram: counts of bins of equal width between the two ends of `span`."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], step: int) -> None:
        """Keep a table."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Keep a picture, a PNG file."""

    def finish(self, outcome: Outcome) -> None:
        """Write what is left, and close."""


class Unseen:
    """Drops the scalars of steps that a resumed run has logged already.

    last: the last step of each name that the tracker holds.
    """

    def __init__(self, last: Mapping[str, int] | None = None) -> None:
        self._last = last or {}

    def __call__(self, scalars: Mapping[str, float], step: int) -> dict[str, float]:
        """Those scalars of this step that the tracker does not hold yet."""
        return {name: value for name, value in scalars.items() if step > self._last.get(name, -1)}


def check_installed(tracker: str, *modules: str) -> None:
    """Check that a tracker's modules can be found, without importing them. Raises PluginError naming the extra."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise PluginError(
                f"--track {tracker}", f"needs {module}, which is not installed", f"pip install 'robustmail[{tracker}]'"
            )
