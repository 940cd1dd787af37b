"""The verbs that make many runs: trials and table. Nothing heavy is imported early."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustmail.errors import RecipeError, RobustmailError, asked_to_stop, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from robustmail.records import Record
    from robustmail.runtime.signals import Signals
    from robustmail.trials.execute import Outcome
    from robustmail.trials.fork import Job
    from robustmail.trials.study import Study

__all__ = ["add_to", "elsewhere"]

Executor = Annotated[str, typer.Option(help="here, one run after another; local or slurm, through submitit.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once, with an executor.")]
Knobs = Annotated[list[str] | None, typer.Option("--with", help="A parameter of submitit: slurm_partition=gpu.")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live view.")]


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command()(trials)
    app.command()(table)


def trials(
    words: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [PATH=VALUE]...", help="Recipes, and overrides for all of them.")
    ],
    seeds: Annotated[str, typer.Option(help="0:5 for 0, 1, 2, 3, 4; or 1,2,7.")] = "0:5",
    over: Annotated[
        list[str] | None, typer.Option(help="A row for each value: margin=pm_adv,pm_nat. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The grid's folder.  [default: trials/RECIPES]")] = None,
    executor: Executor = "here",
    jobs: Jobs = 1,
    knobs: Knobs = None,
    plain: Plain = False,
) -> None:
    """Run recipes x settings x seeds, and say what holds over seeds; the same command again goes on."""
    from rich.console import Console

    from robustmail.report.trial_tables import trials_table
    from robustmail.trials import grid
    from robustmail.trials.study import Study

    names = [word for word in words if not _is_override(word)]
    if not names:
        raise RecipeError("trials", "names no recipe", "Write e.g. robustmail trials at mail_at --seeds 0:5.")
    overrides = [word for word in words if _is_override(word)]
    wanted = grid.seeds(seeds)
    _note_one(seeds)
    folder = out or Path("trials") / "-".join(re.sub(r"\W+", "_", Path(name).name.replace(".py", "")) for name in names)
    study = Study(grid.cells(names, over or [], overrides, wanted), folder, "trials.json", _command())
    failed = _carry_out(study, executor, jobs, knobs, Console(), plain)
    print(trials_table(study.rows(), wanted).rstrip("\n"))
    _close(study, failed)


def table(
    number: Annotated[str, typer.Argument(metavar="1|2|3", help="A table of the MAIL paper.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="For all its runs: data.of='npz(\"mine.npz\")'."),
    ] = None,
    scale: Annotated[str, typer.Option(help="paper, for GPUs; or mini, about two hours on two CPU cores.")] = "paper",
    run: Annotated[bool, typer.Option("--run", help="Make the runs that are missing.")] = False,
    seeds: Annotated[str | None, typer.Option(help="0:5 or 1,2,7.  [default: 0:5, of mini 0:3]")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs are.  [default: tables/SCALE]")] = None,
    form: Annotated[str, typer.Option("--format", help="rich, md, csv or latex.")] = "rich",
    executor: Executor = "here",
    jobs: Jobs = 1,
    knobs: Knobs = None,
    plain: Plain = False,
) -> None:
    """Print a table of the paper with our numbers beside the paper's; with --run, make them."""
    from rich.console import Console

    from robustmail.report.trial_tables import FORMATS, paper_table
    from robustmail.trials import grid, paper
    from robustmail.trials.study import Study

    if number not in map(str, paper.TABLES):
        raise RecipeError(f"table {number}", "the paper has no such table of results", "There are: 1, 2, 3.")
    if scale not in paper.SCALES:
        raise RecipeError(f"table --scale {scale}", "no such scale", did_you_mean(scale, paper.SCALES))
    if form not in FORMATS:
        raise RecipeError(f"table --format {form}", "no such format", did_you_mean(form, FORMATS))
    chosen, size = paper.TABLES[int(number)], paper.SCALES[scale]
    seeds = f"0:{size.seeds}" if seeds is None else seeds
    wanted = grid.seeds(seeds)
    _note_one(seeds)
    folder = out or Path("tables") / scale
    command = ["robustmail", "table", str(number), "--scale", scale, "--seeds", seeds]
    command += ["--out", str(folder), "--run", *(overrides or [])]
    changed = overrides or []
    cells = grid.of_table(chosen, size, wanted, changed)
    kin = [cell for other in paper.related_methods(chosen) for cell in grid.of_table(other, size, wanted, changed)]
    study = Study(cells, folder, f"table-{number}.json", shlex.join(command), kin)
    console = Console(stderr=form != "rich")  # so that a file takes the table alone
    failed = _carry_out(study, executor, jobs, knobs, console, plain) if run else False
    n = next(iter(study.recipes.values())).test_size
    text = paper_table(int(number), chosen, size, changed, study.rows(), wanted, n, shlex.join(command), form)
    print(text.rstrip("\n"))
    if run:
        _close(study, failed, quiet=form != "rich")


def elsewhere(job: Job, threads: int) -> Outcome:
    """Do a job in a process of its own, as an executor calls it; a signal saves and stops it."""
    from robustmail.runtime.signals import Signals
    from robustmail.train.run import Stopped
    from robustmail.trials.execute import Outcome

    if threads:
        import torch

        torch.set_num_threads(threads)
    signals = Signals()
    try:
        with signals.caught():
            return _perform(job, signals, lambda record: None)
    except Stopped as stop:
        return Outcome(f"stopped by {signal.Signals(stop.signum).name}; the same command goes on")


def _perform(job: Job, signals: Signals, show: Callable[[Record], Any]) -> Outcome:
    """Make one run with its log and curves; what goes wrong becomes a line."""
    from robustmail.records import RunStarted
    from robustmail.report.dashboard import LogFile
    from robustmail.report.figures import draw_curves
    from robustmail.train.run import Stopped
    from robustmail.trials.execute import Outcome, run_job

    log, steps, began = LogFile(job.folder / "log.txt"), 0, time.perf_counter()
    try:
        for record in run_job(job, signals):
            log(record)
            show(record)
            steps = record.steps if isinstance(record, RunStarted) else steps
        if job.until is None and not (job.folder / "curves.png").exists():
            draw_curves(job.folder, job.cell.row)
    except RobustmailError as error:
        return Outcome(str(error))
    except BaseException as error:  # one run's failure must not end the others
        if asked_to_stop(error):
            raise
        return Outcome(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")
    if signals.asked is not None:  # it came while a trunk's last epoch was saved
        raise Stopped(signals.asked)
    return Outcome("", steps, time.perf_counter() - began)


def _carry_out(
    study: Study, executor: str, jobs: int, knobs: list[str] | None, console: Console, plain: bool
) -> bool:  # fmt: skip
    """Make the missing runs, showing how far it is; did any fail?"""
    from robustmail.records import CellFinished
    from robustmail.report.dashboard import TrialsProgress
    from robustmail.runtime.signals import Signals
    from robustmail.train.run import Stopped
    from robustmail.trials import execute

    signals, failed = Signals(), False
    with TrialsProgress(console, plain or bool(os.environ.get("CI"))) as show:
        if executor == "here":
            submit = execute.run_here(lambda job: _perform(job, signals, show))
        else:
            submit = execute.executor(executor, elsewhere, study.out / "jobs", jobs, _parameters(knobs))
        if not study.missing:
            study.save()
            return False
        study.check()
        try:
            with signals.caught():
                for record in study.carry_out(submit, 1 if executor == "here" else jobs):
                    show(record)
                    failed = failed or (isinstance(record, CellFinished) and bool(record.error))
        except Stopped as stop:
            said = f"stopped by {signal.Signals(stop.signum).name}; saved in {study.out}. Go on with: {_command()}"
            print(f"robustmail: {said}", file=sys.stderr)
            raise typer.Exit(128 + stop.signum) from None
    return failed


def _close(study: Study, failed: bool, quiet: bool = False) -> None:
    """Say what sharing saved and where everything is; exit with 1 where a run failed."""
    from robustmail.report.trial_tables import saving

    if not quiet:
        if said := saving(study.saved()):
            print(f"{said}.")
        print(f"{study.file}: every number with its provenance")
    if failed:
        raise typer.Exit(1)


def _parameters(knobs: list[str] | None) -> dict[str, Any]:
    from robustmail.config.overrides import parse_value

    found: dict[str, Any] = {}
    for text in knobs or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RecipeError(f"--with {text}", "is not name=value", "Write e.g. slurm_partition=gpu.")
        try:
            found[name] = parse_value(value)
        except RobustmailError:
            found[name] = value  # a bare word is a text
    return found


def _note_one(seeds: str) -> None:
    """Say that --seeds 5 is one seed, for it may have been meant as a number of them."""
    if seeds.strip().isdecimal() and (n := int(seeds)) > 1:
        print(f"robustmail: one seed, {n}; {n} seeds are 0:{n}", file=sys.stderr)


def _is_override(word: str) -> bool:
    return re.match(r"[\w.]+\s*=", word) is not None


def _command() -> str:
    return shlex.join(["robustmail", *sys.argv[1:]])
