"""Progress with the time left on standard error, so that standard output has the results alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from robustmail.runtime.progress import listening
from robustmail.text import duration

__all__ = ["Lines", "shown_progress", "time_left"]

PATIENCE = 5.0  # seconds until the first line; the second comes after twice that time, and so on


@contextmanager
def shown_progress(plain: bool) -> Iterator[None]:
    """Show the progress of the work in the block: a bar on a terminal, else a line now and then after 5 seconds."""
    console = Console(stderr=True)
    if plain or not console.is_terminal or console.is_dumb_terminal:
        with listening(Lines(console)):
            yield
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        TextColumn("{task.completed:,} / {task.total:,}"),
    )
    bars = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console, transient=True)
    with bars, listening(_Bars(bars)):
        yield


class _Bars:
    """A bar for the work under way."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars

    def __call__(self, what: str, done: int, n: int) -> None:
        for task in self._bars.tasks:
            if task.description == what:
                self._bars.update(task.id, completed=done, total=n, visible=done < n)
                return
        self._bars.add_task(what, total=n, completed=done, visible=done < n)


class Lines:
    """Prints a line about long work after 5 seconds, 10, 20, and so on."""

    def __init__(self, console: Console) -> None:
        self._console, self._what, self._began, self._next = console, "", 0.0, 0.0

    def __call__(self, what: str, done: int, n: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._next, self._first = what, now, PATIENCE, done
        if done < n and now - self._began >= self._next:
            self._next = 2 * (now - self._began)
            left = time_left(done - self._first, n - done, now - self._began)
            self._console.print(f"{what}: {done:,} of {n:,}{left}", markup=False, highlight=False, soft_wrap=True)


def time_left(done: int, remaining: int, seconds: float) -> str:
    """The end of a line, such as ", about 3 min left": `done` have taken so many seconds; "" if none is done."""
    return f", about {duration(remaining * seconds / done)} left" if done > 0 else ""
