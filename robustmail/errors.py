"""Every error a user can meet, with one shape: who (given what): what is wrong. What to do.

RobustmailError
├── RecipeError        a recipe file, field or override
├── PluginError        an attack, margin, weighter or objective that breaks its contract
├── AttackError        an attack that left its ball or was fed something that is no image
├── DataError          a data set that is missing, damaged or not what it says
├── ModelError         a model that does not exist or does not fit
├── DeviceError        a device that is not there
├── RunError           a run folder that is taken, finished or of another recipe
│   └── InUseError     another process is working in it
└── NonFiniteError     training or an attack met NaN or infinity
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

__all__ = [
    "AttackError",
    "DataError",
    "DeviceError",
    "InUseError",
    "ModelError",
    "NonFiniteError",
    "PluginError",
    "RecipeError",
    "RobustmailError",
    "RunError",
    "Stopped",
    "asked_to_stop",
    "did_you_mean",
    "in_brief",
]


class RobustmailError(Exception):
    """`who`: `wrong`. `todo`"""

    told = False
    """does another process of the same run say it?"""

    def __init__(self, who: str, wrong: str, todo: str = "") -> None:
        self.who, self.wrong, self.todo = who, wrong, todo
        super().__init__(" ".join(f"{who}: {wrong.rstrip('.')}. {todo}".split()))

    def __reduce__(self) -> tuple[type[RobustmailError], tuple[str, str, str]]:
        return type(self), (self.who, self.wrong, self.todo)


class RecipeError(RobustmailError):
    """A recipe file, one of its fields, or an override is wrong."""


class PluginError(RobustmailError):
    """A plugin does not exist, cannot be loaded, or breaks its contract."""


class AttackError(RobustmailError):
    """An attack was given something that is no image, or left its ball or the box."""


class DataError(RobustmailError):
    """A data set is missing, damaged, or not what it says."""


class ModelError(RobustmailError):
    """A model does not exist or does not fit the data."""


class DeviceError(RobustmailError):
    """The device asked for is not there."""


class RunError(RobustmailError):
    """A run folder is taken, finished, or belongs to another recipe."""


class InUseError(RunError):
    """Another process is working in a folder."""


class NonFiniteError(RobustmailError):
    """Training or an attack met NaN or infinity."""


class Stopped(KeyboardInterrupt):
    """Somebody asked the process to stop; what was worth saving is saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


def asked_to_stop(error: BaseException) -> bool:
    """Was it the user who stopped the process? Everything else that somebody's code raises is that code's error, be it
    SystemExit, GeneratorExit, or, where Ctrl-C raises `Stopped` as on the command line, a plain KeyboardInterrupt."""
    if type(error) is KeyboardInterrupt:
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, KeyboardInterrupt)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the nearest of `known`, and lists them all where they are few."""
    known = sorted(set(known))
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    if near:
        return f"Did you mean {lowered[near[0]]!r}?"
    return f"There are: {', '.join(known)}." if 0 < len(known) <= 30 else ""


def in_brief(error: BaseException) -> str:
    """Somebody else's error as a part of one line: its kind, and the first 160 characters of what it says, if any."""
    said = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}{': ' if said else ''}{said}"
