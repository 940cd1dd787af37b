"""Ctrl-C and SIGTERM: finish the step, save, stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustmail.errors import Stopped
from robustmail.runtime.distributed import world_size

__all__ = ["Signals"]


class Signals:
    """Catches what asks a process to stop: in training the step under way is finished and saved, otherwise at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._deferring = False

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Handle the signals inside the block."""
        before = {s: signal.signal(s, self._handle) for s in _asking()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal inside the block only sets `asked`; a second one does not wait."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        again, self.asked = self.asked is not None, self.asked or signum
        if again and world_size() > 1:  # torchrun sends one of its own after Ctrl-C
            return
        if again or not self._deferring:
            raise Stopped(signum)

    def check(self) -> None:
        """Raise Stopped where a signal came and Python swallowed what it raised, as in a destructor."""
        if self.asked is not None:
            raise Stopped(self.asked)


def _asking() -> list[signal.Signals]:
    """The signals that ask a process to stop; a terminal that is gone does, but not under nohup."""
    gone = getattr(signal, "SIGHUP", None)
    heard = gone is not None and signal.getsignal(gone) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([gone] if gone is not None and heard else [])]
