"""Ctrl-C and SIGTERM: finish the step, save, stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from robustmail.runtime.distributed import world_size

__all__ = ["Stopped", "Signals"]


class Stopped(BaseException):
    """Somebody asked the process to stop; what was worth saving is saved."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


class Signals:
    """Catches SIGINT and SIGTERM: during training the step under way is finished and saved, otherwise at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._deferring = False

    @contextmanager
    def caught(self) -> Iterator[Signals]:
        """Handle the signals inside the block."""
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
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
        if self._deferring and (self.asked is None or world_size() > 1):  # torchrun sends one of its own after Ctrl-C
            self.asked = self.asked or signum
        else:
            raise Stopped(signum)
