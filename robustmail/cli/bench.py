"""The verb that measures speed: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustmail.cli.options import MEASURE, Device
from robustmail.cli.recipe_verbs import Verb
from robustmail.errors import RecipeError, did_you_mean

__all__ = ["add_to"]

PRECISIONS = ("auto", "bf16", "fp32")
OPTIONS = {  # which options each measurement uses
    "training": ("model", "batch", "repeats", "precision", "device", "out", "quick"),
    "evaluation": ("out", "quick"),
    "growth": ("out", "quick"),
    "paper": ("out", "device", "small", "dry_run"),
}


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command line."""
    app.command("bench", cls=Verb, rich_help_panel=MEASURE)(bench_)


def bench_(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A timm name, for images of 3 x 32 x 32.")] = "cifar_resnet18",
    batch: Annotated[int, typer.Option(min=2, help="Batch size.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each library, after a warm-up.")] = 3,
    precision: Annotated[str, typer.Option(help="Of robustmail: auto, bf16 or fp32.")] = "auto",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Folder for bench-MODEL-BATCH.json and .png.")] = Path("bench"),
    evaluation: Annotated[
        bool,
        typer.Option("--evaluation", help="An evaluation beside the official AutoAttack (extra bench), by stage."),
    ] = False,
    growth: Annotated[
        bool, typer.Option("--growth", help="How time and memory grow with images, classes, eps, runs and processes.")
    ] = False,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="What is to be measured on a GPU, step by step; resumes what was stopped."),
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="With --paper: digits, two epochs, 20 images, to try the plan in minutes.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --paper: only print the plan.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A narrow model and a small batch: about a minute on an idle machine.")
    ] = False,
) -> None:
    """Measure the speed of attacks and training steps.

    Images per second of robustmail, torchattacks, ART and plain loops, on the same model and batch, side by side.
    """
    mode = _mode(context)
    if mode == "paper":
        _perform_paper_plan(Path("paper") if out == Path("bench") else out, device, small, dry_run)
    elif mode == "growth":
        _bench_growth(out, quick)
    elif mode == "evaluation":
        _bench_evaluation(out, quick)
    else:
        _bench_training(model, batch, repeats, precision, device, out, quick)


def _mode(context: typer.Context) -> str:
    """What is measured: "paper", "growth", "evaluation" or "training". Raises RecipeError for an option not of it."""
    given = [name for name in context.params if _is_given(context, name)]
    modes = [name for name in given if name in OPTIONS]
    if len(modes) > 1:
        wrong = f"does not go with --{modes[0]}: each measures something else"
        raise RecipeError(f"bench --{modes[1]}", wrong, "Give one of them.")
    mode = modes[0] if modes else "training"
    for name in given:
        if name != mode and name not in OPTIONS[mode]:
            raise RecipeError(f"bench {_option(name)}", *_where_it_belongs(name, mode))
        if name in ("model", "batch") and "quick" in given:
            raise RecipeError(f"bench --{name}", "is not used by --quick, which has its own", "Leave one of them out.")
    return mode


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _option(name: str) -> str:
    """A parameter's option: dry_run is --dry-run."""
    return f"--{name.replace('_', '-')}"


def _where_it_belongs(name: str, mode: str) -> tuple[str, str]:
    """(what is wrong, what to do) about an option that this measurement does not use."""
    if mode == "training":
        return "is an option of --paper", f"Add --paper, or leave {_option(name)} out."
    may_stay = ", ".join(map(_option, OPTIONS[mode]))
    return f"is not used by --{mode}, which has its own networks and sizes", f"Leave it out; {may_stay} may stay."


def _bench_training(
    model: str, batch: int, repeats: int, precision: str, device: str, out: Path, quick: bool
) -> None:  # fmt: skip
    from rich.console import Console

    from robustmail.bench.training import bench
    from robustmail.report.bench import bench_table, save_bench

    if precision not in PRECISIONS:
        raise RecipeError(f"bench --precision {precision}", "no such precision", did_you_mean(precision, PRECISIONS))
    console = Console()
    model, batch = ("cifar_resnet18_w16", 32) if quick else (model, batch)
    with console.status("building") as status:
        report = bench(
            model, batch, repeats, precision=precision, device=device, progress=status.update  # type: ignore[arg-type]
        )  # fmt: skip
    console.print(bench_table(report))
    for path in save_bench(report, out):
        print(path)


def _bench_evaluation(out: Path, quick: bool) -> None:
    import torch
    from rich.console import Console

    from robustmail.bench.evaluation import bench_evaluation
    from robustmail.records import EvaluationBenchRow
    from robustmail.report.bench import evaluation_line, evaluation_table, save_evaluation
    from robustmail.runtime.files import make_folder
    from robustmail.runtime.provenance import provenance

    console, rows = Console(), list[EvaluationBenchRow]()
    facts = provenance(torch.device("cpu"))
    with console.status("building") as status:
        measured = bench_evaluation(24 if quick else 100, quick, progress=status.update)
        make_folder(out)  # fails before the first stage, not after it
        for row in measured:
            rows.append(row)
            path = save_evaluation(rows, facts, out)  # after each, for the whole takes most of an hour
            console.print(evaluation_line(row), soft_wrap=True)
    console.print(evaluation_table(rows))
    print(path)


def _bench_growth(out: Path, quick: bool) -> None:
    import torch
    from rich.console import Console

    from robustmail.bench.growth import measure_growth
    from robustmail.records import GrowthCurve
    from robustmail.report.growth import growth_table, save_growth
    from robustmail.runtime.files import make_folder
    from robustmail.runtime.provenance import provenance

    make_folder(out)
    console, curves = Console(), list[GrowthCurve]()
    facts = provenance(torch.device("cpu"))
    with console.status("starting") as status:
        for curve in measure_growth(0.1 if quick else 1.0, progress=status.update):
            curves.append(curve)
            paths = save_growth(curves, facts, out)  # after each, for the whole takes minutes
    console.print(growth_table(curves))
    print("\n".join(map(str, paths)))


def _perform_paper_plan(folder: Path, device: str, small: bool, dry_run: bool) -> None:
    from robustmail.bench.perform_plan import check_device, is_finished, perform, result_path
    from robustmail.bench.plan import plan_steps

    steps = plan_steps(folder, device, small)
    if dry_run:
        for number, step in enumerate(steps, start=1):
            state = " (finished)" if is_finished(folder, step) else ""
            needs = f", after {', '.join(step.needs)}" if step.needs else ""
            print(f"{number}. {step.name}{state}: {step.about}{needs}\n   {step.command}")
            print(f"   writes {result_path(folder, step)}")
        print("dry run: nothing was done")
        return
    check_device(device, small)
    if not perform(steps, folder, device, lambda line: print(line, flush=True)):
        raise typer.Exit(1)
    print(f"all finished. Commit {folder / 'results'}; docs/speed.md says what for")
