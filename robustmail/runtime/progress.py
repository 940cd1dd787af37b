"""How far long work is: the work says it, and whoever listens shows it. Without a listener nothing happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Listener", "listening", "progress"]

Listener = Callable[[str, int, int], None]
"""called with what is being done, how much of it is done, and how much there is"""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


def progress(what: str, done: int, n: int) -> None:
    """Say that `done` of `n` are done; what: in a few words, "clean images"."""
    if (listener := _LISTENER.get()) is not None:
        listener(what, done, n)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, the listener hears of all progress of this thread."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)
