"""Runs the jobs of a grid: one after another in this process, or several at once through submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from robustmail.config.loader import recipe_source
from robustmail.errors import InUseError, RobustmailError, RunError, did_you_mean, in_brief
from robustmail.recipe import Recipe
from robustmail.records import CellStarted, EpochFinished, Record, RunStarted, WaitingForFolder
from robustmail.runtime.files import opened
from robustmail.runtime.signals import Signals
from robustmail.train.dry_run import dry_run
from robustmail.train.run import preflight, run, status
from robustmail.trials.fork import Job, fork, is_trained, started
from robustmail.trials.slurm import QueuedJob

__all__ = ["EXECUTORS", "Future", "Outcome", "check", "executor", "run_here", "ordered", "missing", "run_job"]

EXECUTORS = ("here", "local", "slurm")
POLL_EVERY = 0.2  # seconds between two looks at jobs in other processes
WEEK = 7 * 24 * 60  # minutes; a job that is cut off is resumed by the next call


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    error: str = ""
    """one line; empty for success"""
    steps: int = 0
    """of an epoch"""
    seconds: float = 0.0


class Future(Protocol):
    """A job that may run elsewhere."""

    def done(self) -> bool: ...

    def result(self) -> Outcome: ...


Submit = Callable[[Job], Future]


def run_job(job: Job, signals: Signals, save_every: float = 30.0) -> Iterator[Record]:
    """Run one job, or resume it; yields records, raises what `run` raises.

    Waits where another process, such as one that a killed command left behind, works in the folder.
    """
    is_waiting = False
    while True:
        try:
            yield from _work(job, signals, save_every)
            return
        except InUseError:
            if not is_waiting:
                yield WaitingForFolder(str(job.folder))
                is_waiting = True
            time.sleep(POLL_EVERY)


def _work(job: Job, signals: Signals, save_every: float) -> Iterator[Record]:
    recipe = job.cell.load()
    source = recipe_source(job.cell.recipe)
    if job.trunk is not None and not started(job.folder):
        fork(recipe, job.trunk, job.folder, source)
    records = run(recipe, job.folder, job.name, source, signals=signals, save_every=save_every)
    with closing(cast(Generator[Record, None, None], records)):  # so that a trunk lets go of its folder
        for record in records:
            yield record
            if job.until is not None and _reached(record, job.until):
                return


def ordered(jobs: Sequence[Job], submit: Submit, width: int = 1) -> Iterator[CellStarted | tuple[Job, Outcome]]:
    """Submit the jobs, at most `width` at once, each after its trunk; jobs on a failed trunk fail with it.

    Yields CellStarted before a job, (job, outcome) after it.
    """
    waiting, running = list(jobs), dict[Job, Future]()
    unfinished, failed = {job.folder for job in jobs}, dict[Path, str]()
    number = 0
    try:
        while waiting or running:
            for job in [job for job, future in running.items() if future.done()]:
                outcome = _outcome(running.pop(job))
                unfinished.discard(job.folder)
                if outcome.error:
                    failed[job.folder] = outcome.error
                yield job, outcome
            for job in [job for job in waiting if job.trunk in failed] if failed else ():
                waiting.remove(job)
                unfinished.discard(job.folder)
                failed[job.folder] = failed[cast(Path, job.trunk)]
                yield job, Outcome(failed[job.folder])
            ready = next((job for job in waiting if job.trunk not in unfinished), None)
            if ready is not None and len(running) < width:
                waiting.remove(ready)
                number += 1
                yield CellStarted(ready.name, number, len(jobs))
                running[ready] = submit(ready)
            elif running and not any(future.done() for future in running.values()):
                time.sleep(POLL_EVERY)
    finally:
        for future in running.values():  # stopped or failed: nobody reads their results any more
            cancel = getattr(future, "cancel", None)
            if cancel is not None:
                cancel()


def missing(jobs: Sequence[Job], recipes: Mapping[Any, Recipe]) -> list[Job]:
    """The jobs that are still to be done: unfinished cells, and the trunks that such a cell has yet to start from."""
    wanted: list[Job] = []
    users: dict[Path | None, int] = {}  # of a trunk's folder: cells that have yet to start from it
    for job in reversed(jobs):  # trunks come before the jobs that need them
        if job.until is None:
            needed = status(recipes[job.cell], job.folder) != "finished"
        else:
            job = replace(job, cells=users.get(job.folder, 0))
            needed = bool(job.cells) and not is_trained(job.folder, cast(int, job.until))
        if needed:
            wanted.append(job)
            if not started(job.folder):
                users[job.trunk] = users.get(job.trunk, 0) + job.cells
    return wanted[::-1]


def check(recipes: Mapping[Any, Recipe], jobs: Sequence[Job]) -> None:
    """Check a grid before anything is trained: names, devices, folders, and a dry run of every row. Writes nothing.

    Raises the error of the first row that fails.
    """
    checked = set()
    for job in jobs:
        recipe = recipes[job.cell]
        status(recipe, job.folder)
        if job.cell.row in checked:
            continue
        checked.add(job.cell.row)
        try:
            preflight(recipe)
            dry_run(recipe)
        except RobustmailError as error:
            raise type(error)(f"trials ({job.cell.row}): {error.who}", error.wrong, error.todo) from error


@dataclass(frozen=True)
class _Done:
    """A future with its result."""

    outcome: Outcome

    def done(self) -> bool:
        return True

    def result(self) -> Outcome:
        return self.outcome


def run_here(perform: Callable[[Job], Outcome]) -> Submit:
    """A `submit` that runs each job in this process, before it returns."""
    return lambda job: _Done(perform(job))


def executor(
    kind: str, perform: Callable[[Job, int], Outcome], folder: Path, jobs: int, knobs: Mapping[str, Any]
) -> Submit:
    """A `submit` that runs jobs in other processes, through submitit.

    kind: "local", processes of this machine, or "slurm", a cluster.
    perform: an importable function of a job and its number of threads (0: torch's default).
    folder: of submitit's logs.
    jobs: how many run at once.
    knobs: submitit's parameters, e.g. slurm_partition.

    Raises RunError where submitit is not installed, or refuses a parameter.
    """
    if kind not in EXECUTORS:
        raise RunError(f"--executor {kind}", "no such executor", did_you_mean(kind, EXECUTORS))
    try:
        import submitit
    except ImportError as error:
        raise RunError(
            f"--executor {kind}", "needs submitit, which is not installed", "pip install 'robustmail[trials]'"
        ) from error
    threads = max(1, (os.cpu_count() or 1) // jobs) if kind == "local" and "OMP_NUM_THREADS" not in os.environ else 0
    try:
        pool = submitit.AutoExecutor(folder=folder, cluster=kind)
        pool.update_parameters(**{"timeout_min": WEEK, "name": "robustmail", **knobs})
    except Exception as error:  # no sbatch, or a parameter that it does not have
        raise RunError(f"--executor {kind}", " ".join(str(error).split())) from error

    def quietly() -> AbstractContextManager[None]:
        return _stderr_to(folder / "submitit.log")  # submitit's helper processes end with a traceback

    def submit(job: Job) -> Future:
        with quietly():
            submitted = pool.submit(perform, job, threads)
        return QueuedJob(submitted, quietly) if kind == "slurm" else cast(Future, submitted)

    return submit


@contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """Redirect stderr of this process and its children to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ours = os.dup(2)
    try:
        with opened(file, os.O_WRONLY | os.O_APPEND) as to:
            os.dup2(to, 2)
        yield
    finally:
        os.dup2(ours, 2)
        os.close(ours)


def _reached(record: Record, until: int) -> bool:
    """True once `until` epochs are trained and saved."""
    if isinstance(record, RunStarted):
        return record.epoch >= until
    return isinstance(record, EpochFinished) and record.row["epoch"] + 1 >= until


def _outcome(future: Future) -> Outcome:
    try:
        return future.result()
    except Exception as error:  # the process has died
        return Outcome(f"its process died ({in_brief(error)})")
