"""Ctrl-C, SIGTERM and SIGHUP: finish the training step, save, stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustmail.errors import Stopped
from robustmail.runtime.distributed import world_size

__all__ = ["Signals"]


class Signals:
    """Signal handlers that raise Stopped: at once, or inside `deferred` only with the second signal.

    asked: number of the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._deferring = False

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Install the handlers inside the block."""
        before = {s: signal.signal(s, self._handle) for s in _stop_signals()}
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
        if again and world_size() > 1:  # torchrun sends another signal after Ctrl-C
            return
        if again or not self._deferring:
            raise Stopped(signum)

    def check(self) -> None:
        """Raise Stopped if a signal came whose exception was lost, as in a destructor."""
        if self.asked is not None:
            raise Stopped(self.asked)


def _stop_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM, and SIGHUP (the terminal was closed) unless nohup ignores it."""
    hangup = getattr(signal, "SIGHUP", None)
    is_handled = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hangup] if hangup is not None and is_handled else [])]
