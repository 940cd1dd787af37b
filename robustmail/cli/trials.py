"""The verbs that make many runs: trials and table. Heavy modules are imported when used."""

from __future__ import annotations

import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustmail.cli.completion import complete_overrides, complete_words
from robustmail.cli.options import (
    TRAIN,
    DryRun,
    Executor,
    Jobs,
    Plain,
    SubmititParameters,
    command_line,
    stop_exit,
    wants_plain,
)
from robustmail.cli.plans import show_grid_plan
from robustmail.cli.recipe_verbs import RecipeVerb
from robustmail.errors import RecipeError, RobustmailError, Stopped, asked_to_stop, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from robustmail.records import Record
    from robustmail.runtime.signals import Signals
    from robustmail.trials.execute import Outcome
    from robustmail.trials.fork import Job
    from robustmail.trials.paper import PaperTable, Scale
    from robustmail.trials.study import Study

__all__ = ["add_to", "perform_in_own_process"]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    for verb in (trials, table):
        app.command(cls=RecipeVerb, rich_help_panel=TRAIN)(verb)


def trials(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [PATH=VALUE]...",
            help="Recipes, and changes that apply to all of them.",
            autocompletion=complete_overrides,
        ),
    ],
    seeds: Annotated[str, typer.Option(help="0:5 for 0, 1, 2, 3, 4; or 1,2,7.")] = "0:5",
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="A row for each value, as margin=pm_adv,pm_nat. Repeatable: every combination.",
            autocompletion=complete_overrides,
        ),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="A row that all others are compared with, seed by seed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the grid.  [default: trials/RECIPES]")] = None,
    executor: Executor = "here",
    jobs: Jobs = 1,
    submitit_parameters: SubmititParameters = None,
    dry_run: DryRun = False,
    plain: Plain = False,
) -> None:
    """Train recipes with several seeds, and compare their means.

    The grid is recipes x values of --over x seeds. The table has means, standard deviations and 95 % t-intervals over
    seeds. Epochs that runs have in common are trained once. The same command again makes only the missing runs.
    """
    from rich.console import Console

    from robustmail.report.trial_tables import trials_table
    from robustmail.trials import grid
    from robustmail.trials.study import Study

    names = [word for word in words if not _is_override(word)]
    if not names:
        raise RecipeError("trials", "no recipe given", "Write e.g. robustmail trials at mail_at --seeds 0:5.")
    overrides = [word for word in words if _is_override(word)]
    seed_numbers = grid.seeds(seeds)
    _warn_of_one_seed(seeds)
    short_names = [re.sub(r"\W+", "_", Path(name).name.replace(".py", "")) for name in names]
    folder = out or Path("trials") / "-".join(short_names)
    cells = grid.cells(names, over or [], overrides, seed_numbers)
    study = Study(cells, folder, "trials.json", command_line(), baseline=baseline)
    if dry_run:
        show_grid_plan(study)
        return
    any_failed = _make_runs(study, executor, jobs, submitit_parameters, Console(), plain)
    shown = trials_table(study.rows(), seed_numbers, baseline=baseline, per_class=study.images_per_class())
    print(shown.rstrip("\n"))
    _finish(study, any_failed)


def table(
    number: Annotated[
        str,
        typer.Argument(
            metavar="1|2|3", help="A table of the MAIL paper.", autocompletion=complete_words("1", "2", "3")
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="Changes to all its runs: data.of='npz(\"mine.npz\")'."),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="paper: for GPUs; for two CPU cores: midi, ten hours a table, or mini, two.",
            autocompletion=complete_words("paper", "midi", "mini"),
        ),
    ] = "paper",
    run: Annotated[bool, typer.Option("--run", help="Make the runs that are missing.")] = False,
    seeds: Annotated[str | None, typer.Option(help="0:5 or 1,2,7.  [default: 0:5 of paper, else 0:3]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.  [default: tables/SCALE]")] = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown, csv or latex.")] = "table",
    executor: Executor = "here",
    jobs: Jobs = 1,
    submitit_parameters: SubmititParameters = None,
    dry_run: DryRun = False,
    plain: Plain = False,
) -> None:
    """Print a table of the paper beside our numbers.

    Without --run nothing is trained, and missing runs have a dash.
    """
    from rich.console import Console

    from robustmail.report.trial_tables import paper_table
    from robustmail.trials import grid

    paper, size = _check_table(number, scale, form)
    seeds = f"0:{size.seeds}" if seeds is None else seeds
    seed_numbers = grid.seeds(seeds)
    _warn_of_one_seed(seeds)
    changes = overrides or []
    folder = out or Path("tables") / scale
    words = ["robustmail", "table", number, "--scale", scale, "--seeds", seeds, "--out", str(folder), "--run", *changes]
    command = shlex.join(words)
    study = _table_study(number, paper, size, seed_numbers, changes, folder, command)
    if dry_run:
        show_grid_plan(study)
        return
    console = Console(stderr=form != "table")  # so that standard output has the table alone
    any_failed = _make_runs(study, executor, jobs, submitit_parameters, console, plain) if run else False
    n = next(iter(study.recipes.values())).test_size
    text = paper_table(int(number), paper, size, changes, study.rows(), seed_numbers, n, command, form)
    print(text.rstrip("\n"))
    if run:
        _finish(study, any_failed, quiet=form != "table")


def _check_table(number: str, scale: str, form: str) -> tuple[PaperTable, Scale]:
    """Look up a table and a scale. Raises RecipeError: no such table, scale or format."""
    from robustmail.report.trial_tables import FORMATS
    from robustmail.trials import paper

    if number not in map(str, paper.TABLES):
        raise RecipeError(f"table {number}", "the paper has no such table of results", "There are: 1, 2, 3.")
    if scale not in paper.SCALES:
        raise RecipeError(f"table --scale {scale}", "no such scale", did_you_mean(scale, paper.SCALES))
    if form not in FORMATS:
        raise RecipeError(f"table --format {form}", "no such format", did_you_mean(form, FORMATS))
    return paper.table_at(int(number), paper.SCALES[scale]), paper.SCALES[scale]


def _table_study(
    number: str, table: PaperTable, scale: Scale, seeds: Sequence[int], changes: list[str], folder: Path, command: str
) -> Study:
    """The runs of a table. Those of related methods in the paper's other tables may share epochs with them."""
    from robustmail.trials import grid, paper
    from robustmail.trials.study import Study

    related = [
        cell for other in paper.related_methods(table, scale) for cell in grid.of_table(other, scale, seeds, changes)
    ]
    cells = grid.of_table(table, scale, seeds, changes)
    return Study(cells, folder, f"table-{number}.json", command, related)


def perform_in_own_process(job: Job, threads: int) -> Outcome:
    """Make the run of a job in a process of its own, called by submitit; a signal saves and stops the run.

    threads: for torch on the CPU; 0 for its default.
    """
    from robustmail.runtime.signals import Signals
    from robustmail.trials.execute import Outcome

    if threads:
        import torch

        torch.set_num_threads(threads)
    signals = Signals()
    try:
        with signals.caught():
            return _perform(job, signals, lambda record: None)
    except Stopped as stop:
        return Outcome(f"stopped by {signal.Signals(stop.signum).name}; the same command resumes it")


def _perform(job: Job, signals: Signals, show: Callable[[Record], Any]) -> Outcome:
    """Make one run with its log and curves; an error becomes the one line of the outcome."""
    from robustmail.records import RunStarted
    from robustmail.report.dashboard import LogFile
    from robustmail.report.figures import draw_curves
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
    except BaseException as error:  # the failure of one run must not end the others
        if asked_to_stop(error):
            raise
        return Outcome(f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")
    if signals.asked is not None:  # it came while a trunk's last epoch was saved
        raise Stopped(signals.asked)
    return Outcome("", steps, time.perf_counter() - began)


def _make_runs(
    study: Study, executor: str, jobs: int, submitit_parameters: list[str] | None, console: Console, plain: bool
) -> bool:
    """Make the missing runs and show the progress; return whether any failed."""
    from robustmail.records import CellFinished
    from robustmail.report.dashboard import TrialsProgress
    from robustmail.runtime.signals import Signals
    from robustmail.trials import execute

    signals, any_failed = Signals(), False
    with TrialsProgress(console, wants_plain(plain)) as show:
        if executor == "here":
            submit = execute.run_here(lambda job: _perform(job, signals, show))
        else:
            parameters = _parse_parameters(submitit_parameters)
            submit = execute.executor(executor, perform_in_own_process, study.out / "jobs", jobs, parameters)
        if not study.missing:
            study.save()
            return False
        study.check()
        try:
            with signals.caught():
                for record in study.carry_out(submit, 1 if executor == "here" else jobs):
                    show(record)
                    any_failed = any_failed or (isinstance(record, CellFinished) and bool(record.error))
        except Stopped as stop:
            raise stop_exit(stop, study.out) from None
    return any_failed


def _finish(study: Study, any_failed: bool, quiet: bool = False) -> None:
    """Print how much time shared epochs saved and where the results are; exit with code 1 if a run failed."""
    from robustmail.report.trial_tables import saving

    if not quiet:
        if text := saving(study.saved()):
            print(f"{text}.")
        print(f"{study.file}: every number with its provenance")
    if any_failed:
        raise typer.Exit(1)


def _parse_parameters(texts: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE texts; a value that is no Python literal is a string."""
    from robustmail.config.overrides import parse_value

    parameters: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise RecipeError(f"--with {text}", "not NAME=VALUE", "Write e.g. slurm_partition=gpu.")
        try:
            parameters[name] = parse_value(value)
        except RobustmailError:
            parameters[name] = value
    return parameters


def _warn_of_one_seed(seeds: str) -> None:
    """Note on standard error that --seeds 5 is one seed, because five seeds may have been meant."""
    if seeds.strip().isdecimal() and (n := int(seeds)) > 1:
        print(f"robustmail: one seed, {n}; {n} seeds are 0:{n}", file=sys.stderr)


def _is_override(word: str) -> bool:
    return re.match(r"[\w.]+\s*=", word) is not None
