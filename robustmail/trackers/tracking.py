"""Sends a run's records to trackers; what goes wrong there ends the tracking, and never the run."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

from robustmail.errors import RunError, asked_to_stop, in_brief
from robustmail.records import EpochFinished, Record, RunFinished, RunStarted, StepFinished
from robustmail.report.example_images import write_sheet
from robustmail.runtime.files import atomic_write_json
from robustmail.runtime.untrusted import check_shape, check_within, read_json
from robustmail.trackers.tracker import Outcome, TrackedRun, Tracker

__all__ = ["IDS", "Tracking"]

HISTOGRAM_EVERY = 10  # steps of an epoch
IDS = "ids.json"  # {tracker: id of its run}
ID = re.compile(r"[\w-]{1,64}", re.ASCII)  # a library may make a path of it
WANDB_LOGS = "wandb/*run-*/logs/*"  # W&B links to a log in the user's cache, from folders that it never opens again
RESULTS = ("name", "accuracy", "low", "high", "correct", "n", "seconds")


class Tracking:
    """A subscriber to a run's records, which it sends to trackers; leaving the block closes them.

        with Tracking(trackers, folder, config, print) as track:
            for record in run(...):
                track(record)

    trackers: by name.
    folder: of the trackers' files, in the run's folder; made when the run begins.
    config: the fields of recipe.json.
    say: prints a line.
    """

    def __init__(
        self, trackers: Mapping[str, Tracker], folder: Path, config: Mapping[str, str], say: Callable[[str], Any]
    ) -> None:
        self._trackers, self._folder, self._config, self._say = dict(trackers), folder, config, say
        self._following: dict[str, Tracker] = {}  # those that were started and have not failed
        self._steps, self._done = 0, 0  # of an epoch; in all
        self._finished: RunFinished | None = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        outcome: Outcome = "finished" if error is None else "stopped" if asked_to_stop(error) else "failed"
        if self._finished is not None:
            self._send_results(self._finished)
        self._tell(lambda tracker: tracker.finish(outcome), quiet=True)
        self._following.clear()

    def __call__(self, record: Record) -> None:
        """Send a record."""
        match record:
            case RunStarted():
                self._start(record)
            case StepFinished():
                self._done = record.epoch * self._steps + record.step
                self._log(_step_scalars(record))
                if record.step % HISTOGRAM_EVERY == 1:
                    name = f"margins/{record.margin}"
                    self._tell(lambda tracker: tracker.histogram(name, record.histogram, record.span, self._done))
            case EpochFinished():
                self._log(_epoch_scalars(record))
            case RunFinished():
                self._finished = record

    def _start(self, started: RunStarted) -> None:
        self._steps, self._done = started.steps, started.epoch * started.steps + started.step
        config = {field: _plain_value(text) for field, text in self._config.items()}
        ids = self._read_ids()
        for name, tracker in self._trackers.items():
            with self._contained(name, tracker):
                self._check_links()
                folder = self._folder / re.sub(r"\W+", "_", name)
                folder.mkdir(parents=True, exist_ok=True)
                with _quiet():
                    opened = tracker.start(TrackedRun(started.name, folder, config, self._done, ids.get(name)))
                if not ID.fullmatch(opened.id):
                    raise ValueError(f"no id: {opened.id!r}")
                ids[name] = opened.id
                atomic_write_json(self._folder / IDS, ids)
                self._following[name] = tracker
                self._say(f"{name}: {opened.where}")

    def _read_ids(self) -> dict[str, str]:
        """The ids of the trackers' runs; none where the file is missing or says something else."""
        try:
            ids = read_json(self._folder / IDS)
            check_shape(ids, {"*": str})
        except (OSError, ValueError, RunError):
            return {}
        return {name: text for name, text in ids.items() if ID.fullmatch(text)}

    def _check_links(self) -> None:
        """Refuse symbolic links by which a library would write outside of the run's folder (raises RunError)."""
        for path in (self._folder, *self._folder.rglob("*")):
            if path.is_symlink() and not path.match(WANDB_LOGS):
                check_within(path, self._folder.parent)

    def _log(self, scalars: Mapping[str, float]) -> None:
        self._tell(lambda tracker: tracker.log(scalars, self._done))

    def _send_results(self, finished: RunFinished) -> None:
        """The attacks' accuracies, and pictures: curves.png, and some examples."""
        rows = [[getattr(result, column) for column in RESULTS] for result in finished.rows]
        for result in finished.rows:
            ends = {"": result.accuracy, "_low": result.low, "_high": result.high}
            self._log({f"test/{result.name}{end}": value for end, value in ends.items()})
        self._tell(lambda tracker: tracker.table("results", RESULTS, rows, self._done), quiet=True)
        pictures = {"curves": self._folder.parent / "curves.png"}
        with contextlib.suppress(RunError):  # damaged examples, of which the report speaks
            sheet = write_sheet(self._folder.parent, self._folder / "examples.png") if self._following else None
            pictures |= {"examples": sheet} if sheet else {}
        for name, path in pictures.items():
            if path.exists():
                self._tell(functools.partial(_send_image, name=name, path=path, step=self._done), quiet=True)

    def _tell(self, what: Callable[[Tracker], Any], quiet: bool = False) -> None:
        for name, tracker in list(self._following.items()):
            with self._contained(name, tracker), _quiet() if quiet else contextlib.nullcontext():
                what(tracker)

    @contextlib.contextmanager
    def _contained(self, name: str, tracker: Tracker) -> Iterator[None]:
        """Whatever a tracker raises ends its own tracking; that the user stops the process is passed on."""
        try:
            yield
        except BaseException as error:
            if asked_to_stop(error):
                raise
            self._say(f"{name}: no longer tracked ({in_brief(error)})")
            if self._following.pop(name, None) is not None:
                with contextlib.suppress(Exception), _quiet():
                    tracker.finish("failed")  # so that it writes what it has


def _send_image(tracker: Tracker, name: str, path: Path, step: int) -> None:
    tracker.image(name, path, step)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a library prints, logs or warns of. Not around every step: Python would repeat all its warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _step_scalars(step: StepFinished) -> dict[str, float]:
    values = {
        "train/loss": step.loss, "train/weighted": step.weighted, "train/plain": step.plain, "train/adv": step.adv,
        "train/nat": step.nat, "train/lr": step.lr, "train/images_per_second": step.images / max(step.seconds, 1e-9),
    }  # fmt: skip
    if step.weights is not None:
        values |= {f"weights/{name}": value for name, value in vars(step.weights).items()}
    return {name: value for name, value in values.items() if value is not None}


def _epoch_scalars(epoch: EpochFinished) -> dict[str, float]:
    """The numbers of the row of metrics.csv, and whether the epoch is the best so far: 1 or 0."""
    numbers = {name: value for name, value in epoch.row.items() if isinstance(value, (int, float))}
    return {f"epoch/{name}": float(value) for name, value in {**numbers, "best": epoch.best}.items()}


def _plain_value(text: str) -> str | int | float:
    """A field of recipe.json as a number, where it is one: "8/255" and "0.1", too; a text without its quotes."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text.strip("'")
    return int(text) if text.lstrip("-").isdigit() else float(value)
