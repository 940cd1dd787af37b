"""All errors that a user can meet. Their messages have one form: who (given what): what is wrong. What to do.

RobustmailError
├── RecipeError        a recipe file, field or override
├── PluginError        an attack, margin, weighter or objective that breaks its contract
├── AttackError        an attack that left its ball, or got something that is not an image
├── DataError          a data set that is missing, damaged or inconsistent
├── ModelError         a model that does not exist or does not fit
├── DeviceError        a device that this machine does not have
├── RunError           a run folder that is in use, finished, or of another recipe
│   └── InUseError     a folder that another process is working in
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
    """Base class of all errors here; its text is `who`: `wrong`. `todo`

    who: what is wrong, with the value that was given: "PGD (given eps=8)".
    wrong: what is wrong with it, without a full stop.
    todo: what to do, a sentence, or "".
    """

    is_reported_by_peer = False
    """whether another process of the same run prints this error"""

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
    """An attack got something that is not an image, or left its ball or [0, 1]."""


class DataError(RobustmailError):
    """A data set is missing, damaged or inconsistent."""


class ModelError(RobustmailError):
    """A model does not exist or does not fit the data."""


class DeviceError(RobustmailError):
    """This machine does not have the device that was asked for."""


class RunError(RobustmailError):
    """A run folder is in use, finished, or belongs to another recipe."""


class InUseError(RunError):
    """Another process is working in the folder."""


class NonFiniteError(RobustmailError):
    """A loss, a gradient or logits were NaN or infinite."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop by the signal `signum`, and has saved its state."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


def asked_to_stop(error: BaseException) -> bool:
    """Whether the error means that the user stopped the process, so that it must be raised again.

    Anything else is the error of the code that raised it, SystemExit and GeneratorExit included; also a plain
    KeyboardInterrupt, if Ctrl-C raises `Stopped` instead, as on the command line.
    """
    if type(error) is KeyboardInterrupt:
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, KeyboardInterrupt)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest name in `known`; or with all of them, if none is near and there are 30 at most."""
    known = sorted(set(known))
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    if near:
        return f"Did you mean {lowered[near[0]]!r}?"
    return f"There are: {', '.join(known)}." if 0 < len(known) <= 30 else ""


def in_brief(error: BaseException) -> str:
    """The error as part of one line: its type, and the first 160 characters of its text."""
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}{': ' if text else ''}{text}"
