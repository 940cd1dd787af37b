"""The verbs that judge: inspect, eval, verify, compare, merge, report. Nothing heavy is imported early."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustmail.cli.options import (
    File,
    Folder,
    Folders,
    Plain,
    Weights,
    _shard,
    _weights_of,
    attack_of,
    name_of,
    once,
    opened,
    positive,
)
from robustmail.errors import RecipeError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from robustmail.evaluation.task import EvaluationTask

__all__ = ["add_to"]

STANDARD = "nat,pgd100,cw,apgd,aa"


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command("eval")(eval_)
    for verb in (inspect, verify, compare, merge, report):
        app.command()(verb)


def inspect(
    file: File,
    weights: Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, without running any code in it: format, weights, architecture, normalisation.

    The exit code is 1 for weights that cannot be used, such as ones with NaN.
    """
    from robustmail.checkpoints import inspect_checkpoint as examine

    found = examine(_weights_of(file), weights)
    print(json.dumps(found.as_dict(), indent=2) if as_json else "\n".join(found.lines()))
    if found.checkpoint.ailments:
        raise typer.Exit(1)


def eval_(
    file: File,
    model: Annotated[str | None, typer.Option(help="A timm name or file.py:factory.  [default: inferred]")] = None,
    data: Annotated[str | None, typer.Option(help="As a recipe's data=, or an npz file, or an image folder.")] = None,
    attacks: Annotated[str | None, typer.Option(help=f"Names, or file.py:attack.  [default: {STANDARD}]")] = None,
    eps: Annotated[str | None, typer.Option(help="Budget in pixels of [0, 1].  [default: 8/255, in l2 0.5]")] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2.  [default: linf]")] = None,
    n: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    normalize: Annotated[str | None, typer.Option(help="cifar10, imagenet, ..., mean/std or none.")] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Find the normalisation that fits, on 256 images.")] = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Where results go.  [default: evals/NAME]")] = None,
    seed: Annotated[int, typer.Option(help="Of the attacks' noise.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Images under attack at once; changes no verdict.")] = None,
    shard: Annotated[str | None, typer.Option(help="K/N: only the K-th of N parts; robustmail merge joins.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, deleting what is in the folder.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Save the examples as 8-bit PNG files too.")] = False,
    plain: Plain = False,
) -> None:
    """Attack a checkpoint and say how many images stand; the same command again continues."""
    from datetime import timedelta

    from rich.console import Console

    from robustmail.evaluation.runner import merge_shards
    from robustmail.evaluation.storage import write_pngs
    from robustmail.evaluation.task import EvaluationTask
    from robustmail.runtime import distributed

    # Days of patience: one process may be done long before another.
    with distributed.process_group(device, patience=timedelta(days=7)):
        subject, chosen, budget, measure = opened(file, data, n, model, normalize, weights, probe, device, eps, norm)
        part, whole = _shard(shard), out or Path("evals") / name_of(subject)
        parts = [whole]
        if (processes := distributed.world_size()) > 1:
            if shard:
                raise RecipeError(f"--shard {shard}", "torchrun's processes are the shards already", "Leave it out.")
            part = (distributed.rank() + 1, processes)
            parts = [_share(whole, k + 1, processes) for k in range(processes)]
        elif shard and out is None:
            parts = [_share(whole, *part)]
        names = tuple(attack_of(name) for name in once("--attacks", STANDARD if attacks is None else attacks, STANDARD))
        command = shlex.join(["robustmail", *sys.argv[1:]])
        task = EvaluationTask(subject, chosen, names, budget, measure, seed, part, positive("--batch", batch), command)
        folder = parts[distributed.rank()]
        if processes == 1 or not _merged(whole, fresh):
            _attack_and_show(task, folder, fresh, plain)
            distributed.all_gather_lists([folder])  # nobody goes on before all are done
            if processes > 1 and distributed.is_main_process():
                merge_shards(parts, whole)
        if not distributed.is_main_process():
            return
    _show(Console(), folder if shard else whole, task.shard != (1, 1) and processes == 1)
    if png:
        shown = folder if processes == 1 else whole
        print(f"{write_pngs(shown)} PNG files in {shown / 'png'}")


def _attack_and_show(task: EvaluationTask, folder: Path, fresh: bool, plain: bool) -> None:
    from rich.console import Console

    from robustmail.evaluation.runner import run_evaluation
    from robustmail.report.dashboard import choose_watch
    from robustmail.runtime import distributed
    from robustmail.runtime.signals import Signals, Stopped

    signals = Signals()
    try:
        with signals.caught():
            records = run_evaluation(task, folder, fresh)
            if not distributed.is_main_process():
                for _ in records:
                    pass
                return
            for text in task.subject.said:
                print(text)
            with choose_watch(Console(), plain or bool(os.environ.get("CI"))) as show:
                for record in records:
                    show(record)
    except Stopped as stop:
        print(f"robustmail: stopped; the same command goes on from {folder}", file=sys.stderr)
        raise typer.Exit(128 + stop.signum) from None


def _share(whole: Path, number: int, of: int) -> Path:
    return whole.with_name(f"{whole.name}-shard-{number}-of-{of}")


def _merged(whole: Path, fresh: bool) -> bool:
    """Has the first of several processes put the whole together before? With `fresh`, not any more."""
    from robustmail.evaluation.storage import clear
    from robustmail.runtime import distributed

    if distributed.is_main_process() and fresh:
        clear(whole)
    return distributed.from_main_process(lambda: (whole / "results.json").exists())


def verify(
    folder: Folder,
    checkpoint: Annotated[Path | None, typer.Option(help="Where the weights lie now, if they have moved.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data lie now, if they have moved.")] = None,
    model: Annotated[str | None, typer.Option(help="Where file.py:factory is now, if it has moved.")] = None,
) -> None:
    """Judge an evaluation's stored examples again; anything that was altered is found, and its row named."""
    from robustmail.evaluation.verify import verify as check

    found = check(folder, checkpoint=checkpoint, data=data, factory=model)
    close = f"; {found.close} too close to call on this machine" if found.close else ""
    print(f"{folder}: in order. {found.images} images, {found.examples} examples judged again{close}")
    print("not to be told from files: " + "; ".join(found.unchecked))


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An evaluation's folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another's, on the same images.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two evaluations image by image: the difference, its interval, and whether it is one."""
    from dataclasses import asdict

    from rich.console import Console

    from robustmail.evaluation.compare import compare as pair
    from robustmail.evaluation.storage import read_evaluation
    from robustmail.report.tables import comparison_table

    rows, notes = pair(read_evaluation(first, strict=True), read_evaluation(second, strict=True))
    if as_json:
        print(
            json.dumps({"rows": [{**asdict(r), "paired": r.paired._asdict()} for r in rows], "notes": notes}, indent=2)
        )
        return
    Console().print(comparison_table(rows, str(first), str(second), notes))


def merge(
    folders: Folders,
    out: Annotated[Path, typer.Option(help="A new folder for the whole.")],
) -> None:
    """Join the shards of one evaluation."""
    from rich.console import Console

    from robustmail.evaluation.runner import merge_shards as join

    join(folders, out)
    _show(Console(), out, shard=False)


def report(
    folders: Folders,
    form: Annotated[str, typer.Option("--format", help="table, csv, markdown, latex, json or html.")] = "table",
    out: Annotated[Path | None, typer.Option(help="A file instead of the terminal.")] = None,
) -> None:
    """Print results as a table, CSV, Markdown, LaTeX or JSON, or write each folder's page."""
    from robustmail.evaluation.results import read_results
    from robustmail.report.export import export
    from robustmail.report.page import write_page
    from robustmail.runtime.files import atomic_write_text

    for folder in folders:  # nothing is shown of an evaluation whose files are missing or do not agree
        there = (folder / "results.json").exists() and read_results(folder).raw.get("kind") == "evaluation"
        if there or (folder / "ledger.csv").exists():
            _sound(folder)
    if form == "html":
        if out is not None:
            raise RunError(f"--out {out}", "a page goes into its evaluation's own folder", "Leave --out away.")
        for folder in folders:
            print(write_page(folder))
        return
    text = export(folders, form)
    if out is None:
        print(text.rstrip("\n"))
    else:
        atomic_write_text(out, text)


def _sound(folder: Path) -> None:
    """Refuse a folder whose files are damaged (raises RunError, naming the row)."""
    from robustmail.evaluation.storage import read_evaluation

    read_evaluation(folder, strict=True)


def _show(console: Console, folder: Path, shard: bool) -> None:
    from robustmail.evaluation.results import read_results
    from robustmail.report.page import write_page
    from robustmail.report.tables import evaluation_table

    console.print(evaluation_table(read_results(folder).raw, folder))
    page = write_page(folder)
    print(f"{page}: the same with pictures. Ledger, examples and results are beside it; robustmail verify {folder}")
    if shard:
        print("This is one shard: robustmail merge DIR... --out DIR puts them together")
