"""`robustmail eval --eps 0,4/255,8/255`: the accuracy by eps, as a table, a CSV file and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustmail.cli.options import evaluation_stopped, result_name, wants_plain
from robustmail.cli.plans import show_curve_plan
from robustmail.errors import RecipeError, Stopped

if TYPE_CHECKING:
    from robustmail.evaluation.task import EvaluationTask

__all__ = ["evaluate_curve", "evaluations_of", "refuse_with_curve", "show_curve"]


def refuse_with_curve(eps: str | None, shard: str | None, png: bool) -> None:
    """Raise RecipeError for options that several eps do not go with, and for several processes."""
    from robustmail.runtime import distributed

    who = f"--eps {eps}"
    if distributed.launched_processes() > 1:
        raise RecipeError(who, "several processes cannot share several eps", "Give one eps, or one process.")
    for name, given in {"--shard": shard, "--png": png}.items():
        if given:
            raise RecipeError(who, f"{name} goes with one eps only", "Evaluate at each eps by itself.")


def evaluate_curve(
    make_task: Callable[[], EvaluationTask],
    budgets: Sequence[float],
    out: Path | None,
    fresh: bool,
    plain: bool,
    dry_run: bool = False,
) -> None:
    """Evaluate at each eps, smallest first; print, write and draw the curve.

    make_task: makes the evaluation, at any eps. budgets: the eps, smallest first; the first may be 0.
    dry_run: only print what would be done.
    """
    from contextlib import closing
    from dataclasses import replace

    from rich.console import Console

    from robustmail.evaluation.curve import eps_folder, run_curve
    from robustmail.report.dashboard import choose_evaluation_view
    from robustmail.runtime.progress import listening
    from robustmail.runtime.signals import Signals

    signals, folder = Signals(), out
    try:
        with signals.caught():
            task = make_task()
            tasks = [replace(task, eps=eps) for eps in budgets if eps]
            if not any(spec.stages for spec in tasks[0].attack_specs):
                raise RecipeError("--eps", "several eps, but no attack", "Name an attack besides nat.")
            folder = out or Path("evals") / f"{result_name(tasks[0].subject)}-eps"
            if dry_run:
                show_curve_plan(tasks, folder, at_zero=not budgets[0])
                return
            for text in tasks[0].subject.notes:
                print(text)
            records = run_curve(tasks, folder, fresh, at_zero=not budgets[0])
            with (
                closing(records),
                choose_evaluation_view(Console(), wants_plain(plain)) as show,
                listening(show.progress),
            ):
                for record in records:
                    show(record)
                    signals.check()
    except Stopped as stop:
        raise evaluation_stopped(stop, folder) from None
    for task in tasks:
        _write_page(folder / eps_folder(task.eps))
    show_curve(folder)


def show_curve(folder: Path) -> None:
    """Print the curve of a folder; write its CSV file and its picture."""
    from rich.console import Console

    from robustmail.evaluation.curve import read_curve
    from robustmail.report.curve import curve_table, draw_curve, write_curve_csv

    curve: dict[str, Any] = read_curve(folder)
    Console().print(curve_table(curve))
    write_curve_csv(curve, folder / "curve.csv")
    pictures = draw_curve(curve, folder / "curve")
    print(", ".join(map(str, [*pictures, folder / "curve.csv", folder / "curve.json"])))
    print(f"Each eps has an evaluation of its own in {folder}: `robustmail report {folder}` compares them")


def evaluations_of(folders: list[Path]) -> list[Path]:
    """The folders of evaluations; in place of a curve's folder those of its evaluations.

    Raises RunError: a curve does not follow from them.
    """
    from robustmail.evaluation.curve import curve_folders, is_curve

    return [one for folder in folders for one in (curve_folders(folder) if is_curve(folder) else [folder])]


def _write_page(folder: Path) -> None:
    from robustmail.report.page import write_page

    write_page(folder)
