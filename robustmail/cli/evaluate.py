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
    from robustmail.runtime.signals import Signals

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
    accept_reading: Annotated[bool, typer.Option("--accept-reading", help="Evaluate a doubtful reading.")] = False,
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

    from robustmail.evaluation.storage import write_pngs
    from robustmail.evaluation.task import EvaluationTask
    from robustmail.runtime import distributed
    from robustmail.runtime.signals import Signals
    from robustmail.train.run import Stopped

    def prepared() -> tuple[EvaluationTask, Path]:
        """The task of this process, and the folder of what all of them find."""
        subject, chosen, budget, measure = opened(file, data, n, model, normalize, weights, probe, device, eps, norm,
                                                  accept_reading)  # fmt: skip
        if (processes := distributed.world_size()) > 1 and shard:
            raise RecipeError(f"--shard {shard}", "torchrun's processes are the shards already", "Leave it out.")
        part = (distributed.rank() + 1, processes) if processes > 1 else _shard(shard)
        names = tuple(attack_of(name) for name in once("--attacks", STANDARD if attacks is None else attacks, STANDARD))
        command = shlex.join(["robustmail", *sys.argv[1:]])
        task = EvaluationTask(subject, chosen, names, budget, measure, seed, part, positive("--batch", batch), command)
        whole = out or Path("evals") / name_of(subject)
        return task, _share(whole, *part) if shard and out is None else whole

    signals, folder = Signals(), out
    try:
        with signals.caught():
            # Days of patience: one process may be done long before another.
            with distributed.process_group(device, patience=timedelta(days=7)):
                task, folder = distributed.alike(prepared)
                _attack(task, folder, fresh, plain, signals)
                leads = distributed.is_main_process()
            if leads:
                _show(Console(), folder, shard=bool(shard) and task.shard != (1, 1))
                if png:
                    print(f"{write_pngs(folder)} PNG files in {folder / 'png'}")
    except Stopped as stop:
        _say_stopped(stop.signum, folder)
        raise typer.Exit(128 + stop.signum) from None


def _say_stopped(signum: int, folder: Path | None) -> None:
    from signal import Signals

    from robustmail.runtime import distributed

    if distributed.speaks():
        begun = folder is not None and folder.exists()
        said = f"the same command goes on from {folder}" if begun else "nothing was begun"
        print(f"robustmail: stopped by {Signals(signum).name}; {said}", file=sys.stderr)


def _attack(task: EvaluationTask, folder: Path, fresh: bool, plain: bool, signals: Signals) -> None:
    """Evaluate into a folder; several processes into one each, which the first of them puts together."""
    from robustmail.evaluation.merge import merge_shards
    from robustmail.evaluation.runner import open_shard, open_whole
    from robustmail.runtime import distributed

    if (processes := distributed.world_size()) == 1:
        _attack_and_show(task, folder, fresh, plain, signals)
        return
    if distributed.from_main_process(lambda: open_whole(task, folder, fresh)):
        return
    parts = [_share(folder, k + 1, processes) for k in range(processes)]
    mine = parts[distributed.rank()]
    distributed.alike(lambda: open_shard(task, mine, folder, fresh))
    _attack_and_show(task, mine, False, plain, signals)
    distributed.all_gather_lists([mine])  # nobody goes on before all are done
    distributed.from_main_process(lambda: merge_shards(parts, folder, again=True))


def _attack_and_show(task: EvaluationTask, folder: Path, fresh: bool, plain: bool, signals: Signals) -> None:
    from contextlib import closing

    from rich.console import Console

    from robustmail.evaluation.runner import run_evaluation
    from robustmail.report.dashboard import choose_watch
    from robustmail.runtime import distributed

    with closing(run_evaluation(task, folder, fresh)) as records:  # at whatever moment it is stopped, it saves
        if not distributed.is_main_process():
            for _ in records:
                signals.check()
            return
        for text in task.subject.said:
            print(text)
        with choose_watch(Console(), plain or bool(os.environ.get("CI"))) as show:
            for record in records:
                show(record)
                signals.check()


def _share(whole: Path, number: int, of: int) -> Path:
    return whole.with_name(f"{whole.name}-shard-{number}-of-{of}")


def verify(
    folder: Folder,
    checkpoint: Annotated[Path | None, typer.Option(help="The weights, if they lie outside of the folder.")] = None,
    data: Annotated[str | None, typer.Option(help="The data, if they are a file, a folder or your own.")] = None,
    model: Annotated[str | None, typer.Option(help="The file.py:factory that made the network, if one did.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
) -> None:
    """Judge an evaluation's stored examples again; anything that was altered is found, and its row named."""
    from robustmail.evaluation.verify import verify as check

    found = check(folder, checkpoint=checkpoint, data=data, factory=model, device=device)
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

    from robustmail.evaluation.merge import merge_shards as join

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
        read_results(folder)
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
    from robustmail.runtime.untrusted import verify_command

    results = read_results(folder).raw
    console.print(evaluation_table(results, folder))
    print(f"{write_page(folder)}: the same with pictures. Ledger, examples and results are beside it")
    print(f"Judge the examples again: {verify_command(folder, results['spec'])}")
    if shard:
        print("This is one shard: robustmail merge DIR... --out DIR puts them together")
