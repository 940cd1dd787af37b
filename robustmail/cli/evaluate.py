"""The verbs about evaluations: eval, inspect, verify, compare, merge. Heavy modules are imported when used."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from robustmail.cli.completion import complete_runs
from robustmail.cli.corruptions import evaluate_corruptions, refuse_with_corruptions
from robustmail.cli.curve import evaluate_curve, evaluations_of, refuse_with_curve
from robustmail.cli.option_texts import check_count, parse_eps, parse_shard
from robustmail.cli.options import (
    DEFAULT_ATTACKS,
    EVALUATE,
    AcceptReading,
    AsJson,
    AttackNames,
    Batch,
    Corruptions,
    Crop,
    Data,
    Device,
    DryRun,
    Epoch,
    Eps,
    EvaluationInputs,
    File,
    Folder,
    Fresh,
    IgnoreUnused,
    MaxImages,
    Model,
    Normalize,
    NormName,
    Plain,
    Png,
    Probe,
    Resize,
    ResultsFolder,
    Seed,
    Shard,
    Transfer,
    TransferModel,
    TransferNormalize,
    Weights,
    command_line,
    evaluation_stopped,
    open_inputs,
    open_transfer,
    result_name,
    wants_plain,
)  # fmt: skip
from robustmail.cli.plans import show_download, show_evaluation_plan
from robustmail.cli.recipe_verbs import Verb
from robustmail.errors import RecipeError, RunError, Stopped
from robustmail.runtime.untrusted import printable

if TYPE_CHECKING:
    from robustmail.evaluation.model_loading import LoadedModel
    from robustmail.evaluation.task import EvaluationTask
    from robustmail.runtime.signals import Signals

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    app.command("eval", cls=Verb, rich_help_panel=EVALUATE)(eval_)
    for verb in (compare, inspect, merge, verify):
        app.command(cls=Verb, rich_help_panel=EVALUATE)(verb)


def eval_(
    file: File,
    model: Model = None,
    data: Data = None,
    attacks: AttackNames = None,
    eps: Eps = None,
    norm: NormName = None,
    n: MaxImages = None,
    normalize: Normalize = None,
    probe: Probe = False,
    accept_reading: AcceptReading = False,
    ignore_unused: IgnoreUnused = False,
    weights: Weights = None,
    epoch: Epoch = None,
    resize: Resize = None,
    crop: Crop = None,
    out: ResultsFolder = None,
    seed: Seed = 0,
    batch: Batch = None,
    shard: Shard = None,
    device: Device = "auto",
    fresh: Fresh = False,
    corruptions: Corruptions = None,
    transfer: Transfer = None,
    transfer_model: TransferModel = None,
    transfer_normalize: TransferNormalize = None,
    png: Png = False,
    dry_run: DryRun = False,
    plain: Plain = False,
) -> None:
    """Attack a checkpoint and measure its robust accuracy.

    The same command again resumes a stopped evaluation. With more attacks at the end of --attacks it adds them.
    """
    chosen = file if epoch is None else _weights_of_epoch(file, epoch)
    budgets = parse_eps(eps) if eps and "," in eps else []

    def inputs() -> EvaluationInputs:
        one_eps = repr(budgets[-1]) if budgets else eps
        return open_inputs(chosen, data, n, model, normalize, weights, probe, device, one_eps, norm, accept_reading,
                           ignore_unused, resize, crop)  # fmt: skip

    def other(opened: EvaluationInputs) -> LoadedModel | None:
        if transfer is None:
            return None
        return open_transfer(transfer, opened, transfer_model, transfer_normalize, probe, accept_reading, ignore_unused)

    if dry_run and show_download(chosen):
        return
    plan = partial(_plan, inputs, other, attacks, seed, batch, shard, out)
    if corruptions is not None:
        refuse_with_corruptions(attacks, eps, norm, shard, batch, png, transfer, dry_run)
        evaluate_corruptions(inputs(), corruptions, n, out, seed, fresh)
    elif budgets:
        refuse_with_curve(eps, shard, png)
        evaluate_curve(lambda: plan().task, budgets, out, fresh, plain, dry_run)
    elif dry_run:
        show_evaluation_plan(*plan()[:2], fresh)
    else:
        _evaluate(plan, out, device, fresh, plain, png)


class Plan(NamedTuple):
    """What this process evaluates, and where the results go."""

    task: EvaluationTask
    folder: Path
    """for the results of all processes"""
    is_shard: bool
    """whether --shard asked for a part of the images, to be merged by hand"""


def _plan(
    inputs: Callable[[], EvaluationInputs], other: Callable[[EvaluationInputs], LoadedModel | None],
    attacks: str | None, seed: int, batch: int | None, shard: str | None, out: Path | None,
) -> Plan:  # fmt: skip
    from robustmail.evaluation.attack_texts import split_attacks
    from robustmail.evaluation.task import EvaluationTask
    from robustmail.runtime import distributed

    model, data, eps, norm, _ = opened = inputs()
    if (processes := distributed.world_size()) > 1 and shard:
        raise RecipeError(f"--shard {shard}", "torchrun's processes are the shards already", "Leave it out.")
    part = (distributed.rank() + 1, processes) if processes > 1 else parse_shard(shard)
    specs = tuple(split_attacks(DEFAULT_ATTACKS if attacks is None else attacks, "--attacks"))
    task = EvaluationTask(model, data, specs, eps, norm, seed, part, check_count("--batch", batch), command_line(),
                          transfer=other(opened))  # fmt: skip
    whole = out or Path("evals") / result_name(model)
    folder = _shard_folder(whole, *part) if shard and out is None else whole
    return Plan(task, folder, is_shard=bool(shard) and part != (1, 1))


def _evaluate(
    make_plan: Callable[[], Plan], out: Path | None, device: str, fresh: bool, plain: bool, png: bool
) -> None:
    """Evaluate in all processes; the main one shows the results. A stop by a signal says how to go on.

    out: the folder, as far as it is known before there is a plan.
    """
    from datetime import timedelta

    from robustmail.runtime import distributed
    from robustmail.runtime.signals import Signals

    signals, folder = Signals(), out
    try:
        with signals.caught():
            with distributed.process_group(device, patience=timedelta(days=7)):  # shards may differ by days
                task, folder, is_shard = distributed.alike(make_plan)
                _fill_folder(task, folder, fresh, plain, signals)
                is_main = distributed.is_main_process()
            if is_main:
                _show(folder, is_shard, png)
    except Stopped as stop:
        raise evaluation_stopped(stop, folder) from None


def _weights_of_epoch(run: str, epoch: int) -> str:
    """The file of a kept epoch in a run's folder. Raises RunError: no such epoch, with those that there are."""
    from robustmail.runtime.untrusted import check_inside
    from robustmail.train.state import kept_epochs

    kept = kept_epochs(Path(run))
    if epoch not in kept:
        there = f"kept are {', '.join(map(str, kept))}" if kept else "no epoch was kept"
        raise RunError(
            f"{run} (given --epoch {epoch})", f"no weights of this epoch: {there}", "Train with keep_every=10."
        )
    path = Path(run) / kept[epoch]
    check_inside(path)
    return str(path)


def _fill_folder(task: EvaluationTask, folder: Path, fresh: bool, plain: bool, signals: Signals) -> None:
    """Evaluate into a folder. Under torchrun every process fills a folder of its own, and the first merges them."""
    from robustmail.evaluation.merge import merge_shards
    from robustmail.evaluation.runner import open_shard, open_whole
    from robustmail.runtime import distributed

    if (processes := distributed.world_size()) == 1:
        _run_and_show(task, folder, fresh, plain, signals)
        return
    if distributed.from_main_process(lambda: open_whole(task, folder, fresh)):
        return
    shard_folders = [_shard_folder(folder, k + 1, processes) for k in range(processes)]
    own_folder = shard_folders[distributed.rank()]
    distributed.alike(lambda: open_shard(task, own_folder, folder, fresh))
    _run_and_show(task, own_folder, False, plain, signals)
    distributed.all_gather_lists([own_folder])  # wait for all processes
    distributed.from_main_process(lambda: merge_shards(shard_folders, folder, again=True))


def _run_and_show(task: EvaluationTask, folder: Path, fresh: bool, plain: bool, signals: Signals) -> None:
    from contextlib import closing

    from rich.console import Console

    from robustmail.evaluation.runner import run_evaluation
    from robustmail.report.dashboard import choose_evaluation_view
    from robustmail.runtime import distributed
    from robustmail.runtime.progress import listening

    with closing(run_evaluation(task, folder, fresh)) as records:  # closing saves, whenever it is stopped
        if not distributed.is_main_process():
            for _ in records:
                signals.check()
            return
        for text in task.subject.notes:
            print(text)
        with choose_evaluation_view(Console(), wants_plain(plain)) as show, listening(show.progress):
            for record in records:
                show(record)
                signals.check()


def _shard_folder(whole: Path, number: int, of: int) -> Path:
    return whole.with_name(f"{whole.name}-shard-{number}-of-{of}")


def _show(folder: Path, is_shard: bool, png: bool = False) -> None:
    """Print the results of an evaluation, write its page and, with `png`, its examples as images."""
    from rich.console import Console

    from robustmail.evaluation.results import read_results
    from robustmail.evaluation.storage import write_pngs
    from robustmail.report.page import write_page
    from robustmail.report.tables import evaluation_table
    from robustmail.runtime.untrusted import verify_command

    results = read_results(folder).raw
    Console().print(evaluation_table(results, folder))
    print(f"{write_page(folder)}: the same with pictures. Ledger, examples and results are beside it")
    print(f"Check the stored examples: {verify_command(folder, results['spec'])}")
    if is_shard:
        print("This is one shard. To merge all: robustmail merge DIR... --out DIR")
    if png:
        print(f"{write_pngs(folder)} PNG files in {folder / 'png'}")


def inspect(file: File, weights: Weights = None, as_json: AsJson = False) -> None:
    """Describe a checkpoint without running any code in it.

    Prints its format, state_dicts, architecture and normalization. The exit code is 1 for weights that cannot be
    used, such as weights with NaN.
    """
    from robustmail.checkpoints import inspect_checkpoint

    inspection = inspect_checkpoint(file, weights)
    print(json.dumps(inspection.as_dict(), indent=2) if as_json else "\n".join(inspection.lines()))
    if inspection.checkpoint.problems:
        raise typer.Exit(1)


def verify(
    folder: Folder,
    checkpoint: Annotated[str | None, typer.Option(help="The weights, where they are not in the folder.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The data, where they are not built in: an npz file, an image folder, ...")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The file.py:factory of the model, where one was used.")] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Compare the files with one another; needs no weights and no data.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Check an evaluation: classify its stored examples again.

    No attack is run. An altered example or number is an error that names the row. At the end it says what was verified
    and what cannot be.
    """
    from robustmail.evaluation.verify import verify as verify_evaluation
    from robustmail.evaluation.verify_files import verify_files
    from robustmail.report.progress import shown_progress

    if files_only and (given := [k for k, v in (("checkpoint", checkpoint), ("data", data), ("model", model)) if v]):
        raise RecipeError("verify --files-only", f"does not read --{given[0]}", "Leave one of them out.")
    for one in evaluations_of([folder]):
        if files_only:
            result = verify_files(one)
            print(f"{one}: its files agree. {result.images} images, {result.examples} examples; no model was run")
        else:
            with shown_progress(wants_plain(False)):
                result = verify_evaluation(one, checkpoint=checkpoint, data=data, factory=model, device=device)
            close = f"; {result.close} too close to call on this machine" if result.close else ""
            print(f"{one}: in order. {result.images} images, {result.examples} examples classified again{close}")
        print("verified: " + "; ".join(result.checked))
        print(printable("cannot be verified from files: " + "; ".join(result.unchecked)))


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="The folder of an evaluation or a run.", autocompletion=complete_runs)
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.", autocompletion=complete_runs)],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations or runs, image by image.

    Prints for each attack the paired difference in accuracy, its 95 % interval and McNemar's exact p; then the
    accuracy in the worst classes. Of two runs also the fields of their recipes that differ, and their curves.
    """
    from dataclasses import asdict

    from rich.console import Console

    from robustmail.report.run_comparison import compare_fields, curves_table, fields_table, is_run

    differ: dict[str, tuple[str, str]] | None = None
    legend = f"A: {printable(str(first))}\nB: {printable(str(second))}"
    if is_run(first) and is_run(second):
        differ = compare_fields(first, second)
        if not as_json:
            print(legend)
            console = Console()
            console.print(fields_table(differ), curves_table(first, second, console.width))
        if unfinished := [folder for folder in (first, second) if not (folder / "ledger.csv").exists()]:
            text = f"{', '.join(map(str, unfinished))}: not evaluated yet, so no results to compare"
            print(json.dumps({"fields": differ, "notes": [text]}, indent=2) if as_json else text)
            return
    from robustmail.evaluation.compare import compare as compare_evaluations
    from robustmail.evaluation.compare import compare_classes
    from robustmail.evaluation.storage import read_evaluation
    from robustmail.report.tables import comparison_table

    evaluations = [read_evaluation(folder, strict=True) for folder in (first, second)]
    rows, notes = compare_evaluations(*evaluations)
    classes, about_classes = compare_classes(*evaluations)
    notes.append(about_classes)
    if as_json:
        as_dicts = [{**asdict(row), "paired": row.paired._asdict()} for row in rows]
        found = {"rows": as_dicts, "worst_classes": list(map(asdict, classes)), "notes": notes}
        print(json.dumps(found if differ is None else {"fields": differ, **found}, indent=2))
        return
    if differ is None:
        print(legend)
    Console().print(comparison_table(rows, classes, notes))


def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="DIR...", help="The folders of all shards.")],
    out: Annotated[Path, typer.Option(help="A new folder for the whole evaluation.")],
) -> None:
    """Merge the shards of an evaluation, made by eval --shard."""
    from robustmail.evaluation.merge import merge_shards

    merge_shards(shards, out)
    _show(out, is_shard=False)
