"""All runs below a folder: how far each is, its best epoch, and the time that it has left."""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.errors import RunError
from robustmail.runtime.files import is_in_use
from robustmail.runtime.untrusted import check_inside, check_shape, printable, read_json, read_text
from robustmail.text import duration, percent

__all__ = ["RunSummary", "best_validation", "find_runs", "read_curves", "read_run", "runs_table"]

RECIPE, STATE = "recipe.json", "state.pt"
LOOKED_AT = 2**16  # bytes at either end of a log
STARTED = re.compile(r"(\d+) epochs of (\d+) steps")
REACHED = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  epoch (\d+) (?:step (\d+)|done):", re.MULTILINE)
JUMP = 1800.0  # seconds; a validation may take as long, beyond the time that its steps take
UNREADABLE = (OSError, ValueError, RunError, csv.Error)


@dataclass(frozen=True)
class RunSummary:
    """How far a run is.

    state: finished, training, evaluating, stopped or damaged.
    done, epochs: finished epochs, and all of them.
    best, best_epoch: highest robust accuracy in validation, and its epoch counted from 1; None before there is one.
    left: seconds of training, at the speed of its last start; None where that is not known.
    """

    folder: Path
    state: str
    done: int = 0
    epochs: int = 0
    best: float | None = None
    best_epoch: int | None = None
    left: float | None = None


def find_runs(root: Path) -> Iterator[Path]:
    """The folders of training runs in and below a folder, by name; links and hidden folders are not followed."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if RECIPE in files and STATE in files:
            yield Path(folder)


def read_run(folder: Path, now: float) -> RunSummary:
    """How far the run in a folder is; now: seconds since the epoch, as of `time.time`."""
    try:
        epochs = int(read_recipe(folder)["epochs"])
        rows = read_curves(folder)
        best, best_epoch = best_validation(rows) or (None, None)
        is_complete = _is_complete(folder)
    except (*UNREADABLE, KeyError):
        return RunSummary(folder, "damaged")
    is_trained, is_running = len(rows) >= epochs, is_in_use(folder)
    state = "finished" if is_complete else "stopped"
    if is_running and not is_complete:
        state = "evaluating" if is_trained else "training"
    left = None if is_complete or is_trained else _time_left(folder / "log.txt", epochs, now if is_running else None)
    return RunSummary(folder, state, len(rows), epochs, best, best_epoch, left)


def read_recipe(folder: Path) -> dict[str, str]:
    """The fields of a run's recipe as text. Raises RunError, OSError or ValueError."""
    fields: dict[str, str] = read_json(folder / RECIPE)
    check_shape(fields, {"*": str})
    return fields


def read_curves(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, none before its first epoch. Raises RunError, OSError, ValueError, csv.Error."""
    try:
        return list(csv.DictReader(io.StringIO(read_text(folder / "metrics.csv"))))
    except FileNotFoundError:
        return []


def best_validation(rows: list[dict[str, str]]) -> tuple[float, int] | None:
    """(highest robust accuracy in validation, its epoch counted from 1); None before there is one."""
    scores = [float(row["val_rob"]) for row in rows if row.get("val_rob")]
    return (max(scores), scores.index(max(scores)) + 1) if scores else None


def runs_table(runs: list[RunSummary]) -> RenderableType:
    """Runs as a table, a row each."""
    table = Table(header_style="", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("state", "epoch", "best", "at", "left"):
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for run in runs:
        table.add_row(
            Text(printable(str(run.folder))), run.state, f"{run.done}/{run.epochs}" if run.epochs else "–",
            "–" if run.best is None else percent(run.best), "–" if run.best_epoch is None else str(run.best_epoch),
            "–" if run.left is None else duration(run.left),
        )  # fmt: skip
    return table


def _is_complete(folder: Path) -> bool:
    try:
        results: Any = read_json(folder / "results.json")
    except FileNotFoundError:
        return False
    check_shape(results, {"complete": bool})
    return bool(results["complete"])


def _time_left(log: Path, epochs: int, now: float | None) -> float | None:
    """Seconds of training that are left, from the times in a run's log since its last start.

    now: if the run is going on; then the time since its last line has passed already.
    """
    try:
        text = _ends(log)
    except UNREADABLE:
        return None
    if not (starts := list(STARTED.finditer(text))):
        return None
    steps = int(starts[-1][2])
    reached = [
        (time.mktime(time.strptime(at, "%Y-%m-%d %H:%M:%S")), (int(epoch) - 1) * steps + (int(step) if step else steps))
        for at, epoch, step in REACHED.findall(text[starts[-1].end() :])
    ]
    if (per_step := _seconds_per_step(reached)) is None:
        return None
    (until, last), waited = reached[-1], 0.0
    if now is not None and 0 <= now - until < JUMP:
        waited = now - until
    return max((epochs * steps - last) * per_step - waited, 0.0)


def _seconds_per_step(reached: Sequence[tuple[float, int]]) -> float | None:
    """From (time, step) of a log's lines, without those between which the clock was set or the machine slept."""
    between = [(t - before, step - first) for (before, first), (t, step) in pairwise(reached)]
    usual = median(paces) if (paces := [seconds / steps for seconds, steps in between if steps > 0]) else 0.0
    kept = [(seconds, steps) for seconds, steps in between if 0 <= seconds < JUMP + 20 * max(usual, 0.0) * steps]
    seconds, steps = (sum(column) for column in zip(*kept, strict=True)) if kept else (0.0, 0)
    return seconds / steps if seconds > 0 and steps > 0 else None


def _ends(path: Path) -> str:
    """The beginning and the end of a log, which may be long."""
    check_inside(path)
    with open(path, "rb") as file:
        start = file.read(LOOKED_AT)
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - LOOKED_AT, len(start)))
        return (start + file.read()).decode(errors="replace")
