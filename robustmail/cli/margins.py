"""The verbs about margins: margins (is a margin worth a training run?) and figure (the paper's, redrawn)."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from robustmail.cli.options import File, Plain, Weights, attack_of, name_of, once, opened, positive
from robustmail.errors import DataError, PluginError, RecipeError, did_you_mean

__all__ = ["add_to"]

T = TypeVar("T")
MARGINS = "pm_adv,pm_nat,pm_dif,lps"
WHICH = ("1a", "1b", "1c", "2", "4")

Model = Annotated[str | None, typer.Option(help="A timm name or file.py:factory.  [default: inferred]")]
Data = Annotated[str | None, typer.Option(help="As a recipe's data=, or an npz file, or an image folder.")]
Eps = Annotated[str | None, typer.Option(help="Budget in pixels of [0, 1].  [default: 8/255, in l2 0.5]")]
Norm = Annotated[str | None, typer.Option(help="linf or l2.  [default: linf]")]
N = Annotated[int | None, typer.Option(help="Only the first so many images.")]
Normalize = Annotated[str | None, typer.Option(help="cifar10, imagenet, ..., mean/std or none.")]
Probe = Annotated[bool, typer.Option("--probe", help="Find the normalisation that fits, on 256 images.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the attacks' noise.")]
Batch = Annotated[int | None, typer.Option(help="Images under attack at once; changes no number.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew, deleting what is in the folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]


def add_to(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    for verb in (margins, figure):
        app.command()(verb)


def margins(
    file: File,
    data: Data = None,
    margins: Annotated[str, typer.Option(help="Names, or file.py:margin.")] = MARGINS,
    against: Annotated[str | None, typer.Option(help="Attacks that decide who is broken.  [default: pgd100,cw,apgd]")]
    = None,
    n: N = None,
    eps: Eps = None,
    norm: Norm = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the training attack, PGD, and of every path.")] = 10,
    model: Model = None,
    normalize: Normalize = None,
    probe: Probe = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Where results go.  [default: lab/NAME]")] = None,
    seed: Seed = 0,
    batch: Batch = None,
    device: Device = "auto",
    fresh: Fresh = False,
    plain: Plain = False,
) -> None:  # fmt: skip
    """Measure margins on a checkpoint: continuous? free of the path? true? what do they hide, and what do they cost?"""
    from rich.console import Console

    from robustmail.margin_lab.measure import (
        DEFAULT_ATTACKS,
        MarginTask,
        check_same_measurement,
        measure_costs,
        measure_margins,
        save_lab,
    )
    from robustmail.report.margin_figures import PICTURES, draw_lab
    from robustmail.report.margin_tables import lab_table, read_lab
    from robustmail.report.style import picture_paths
    from robustmail.runtime.files import folder_lock, make_folder, remove

    chosen = _margins(margins)
    subject, images, budget, measure = opened(file, data, n, model, normalize, weights, probe, device, eps, norm)
    usual = ",".join(DEFAULT_ATTACKS)
    names = tuple(attack_of(name) for name in once("--against", usual if against is None else against, usual))
    task = MarginTask(subject, images, chosen, budget, measure, names, steps, seed, positive("--batch", batch))
    measure_costs(task)
    folder = out or Path("lab") / name_of(subject)
    results = [
        "margins.json",
        "provenance.json",
        *(path.name for name in PICTURES for path in picture_paths(folder / name)),
    ]
    make_folder(folder, (*results, "lock"), "lab")
    with folder_lock(folder):
        if fresh:
            remove(folder, results)
        if (folder / "margins.json").exists():
            check_same_measurement(task, read_lab(folder), folder)
        print("\n".join([*subject.said, task.forecast]))
        save_lab(
            _stamped(
                subject.device, folder / "provenance.json", lambda: _watched(measure_margins(task), plain, folder)
            ),
            folder,
        )
        found = read_lab(folder)
        drawn = draw_lab(found, folder)
    Console().print(lab_table(found))
    print(f"{folder / 'margins.json'}: every number and every image's value. {len(drawn)} pictures beside it")


def figure(
    which: Annotated[str, typer.Argument(metavar="FIGURE", help=f"One of {', '.join(WHICH)}, as in the paper.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Checkpoints or runs; several for 1c.")],
    data: Data = None,
    n: N = None,
    eps: Eps = None,
    norm: Norm = None,
    model: Model = None,
    normalize: Normalize = None,
    probe: Probe = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Where figures go.  [default: figures/NAME]")] = None,
    seed: Seed = 0,
    batch: Batch = None,
    device: Device = "auto",
    plain: Plain = False,
) -> None:
    """Redraw a figure of the paper from a checkpoint: PNG, SVG, and the numbers in it."""
    from robustmail.margin_lab.paper_figures import FigureInputs, save_figure
    from robustmail.margin_lab.paper_figures import compute_figure as compute
    from robustmail.report.figures import draw_figure
    from robustmail.report.style import picture_paths
    from robustmail.runtime.files import folder_lock, make_folder

    if which not in WHICH:
        raise RecipeError(f"figure {which}", "the paper has it not, or it shows no data", did_you_mean(which, WHICH))
    if len(files) > 1 and which != "1c":
        raise RecipeError(f"figure {which}", f"shows one model, not {len(files)}", "Pass one, or draw figure 1c.")
    read = [opened(file, data, n, model, normalize, weights, probe, device, eps, norm) for file in files]
    subjects = [subject for subject, *_ in read]
    _, images, budget, measure = read[0]
    if any((of.part.y.shape, e, m) != (images.part.y.shape, budget, measure) for _, of, e, m in read[1:]):
        raise DataError("figure 1c", "the models would not be attacked alike", "Pass --data, --eps and --norm.")
    sitter = FigureInputs(subjects, images, budget, measure, seed, positive("--batch", batch))
    folder = out or Path("figures") / name_of(subjects[0])
    drawings = [path.name for name in WHICH for path in picture_paths(folder / f"figure-{name}")]
    numbers = [f"{kind}-{name}.json" for name in WHICH for kind in ("figure", "provenance")]
    make_folder(folder, (*drawings, *numbers, "lock"), "figure")
    with folder_lock(folder):
        said = [text for subject in subjects for text in subject.said]
        print("\n".join(said), end="\n" * bool(said))
        found = _stamped(subjects[0].device, folder / f"provenance-{which}.json",
                         lambda: _watched(compute(which, sitter), plain, folder))  # fmt: skip
        other = _replaced(folder / f"figure-{which}.json", lambda: save_figure(found, folder))
        drawn = draw_figure(found, folder)
    if other:
        print(f"{folder} held another figure {which}, which is replaced")
    print(found.said)
    print(", ".join(str(path) for path in drawn) if drawn else "There is nothing to draw; more images may have some.")


def _margins(text: str) -> dict[str, Any]:
    """The margins of a list, by the name that the table gives them: without their file, where that is clear."""
    from robustmail.config.overrides import parse_value

    names = once("--margins", text, MARGINS)
    if files := [name for name in names if name.endswith(".py")]:
        raise PluginError(f"--margins {files[0]}", "names a file and no margin in it", f"Write {files[0]}:margin.")
    short = [name.rpartition(".py:")[2] for name in names]
    found = {}
    for name, brief in zip(names, short, strict=True):
        margin = parse_value(name, "margins")
        if not callable(margin):
            raise PluginError(f"--margins {name}", "is no function of a step", "Name one that takes a step.")
        found[name if short.count(brief) > 1 else brief] = margin
    return found


def _watched(records: Iterator[Any], plain: bool, folder: Path) -> Any:
    """The last record; the others are shown."""
    from rich.console import Console

    from robustmail.records import AttackProgress, AttackResult, ProgressUpdate
    from robustmail.report.dashboard import choose_evaluation_view
    from robustmail.runtime.signals import Signals
    from robustmail.train.run import Stopped

    last = None
    try:
        with Signals().caught(), choose_evaluation_view(Console(), plain or bool(os.environ.get("CI"))) as show:
            for last in records:
                if isinstance(last, (AttackProgress, AttackResult, ProgressUpdate)):
                    show(last)
    except Stopped as stop:
        print(f"robustmail: stopped; nothing was written to {folder}", file=sys.stderr)
        raise typer.Exit(128 + stop.signum) from None
    return last


def _replaced(path: Path, write: Callable[[], Any]) -> bool:
    """Write a file; did it hold something else before?"""
    from robustmail.runtime.untrusted import read_bytes

    before = read_bytes(path) if path.exists() else None
    write()
    return before not in (None, path.read_bytes())


def _stamped(device: Any, to: Path, work: Callable[[], T]) -> T:
    """Do some work; `to` says when, for how long and by which command, which no result may depend on."""
    from robustmail.runtime.files import atomic_write_json
    from robustmail.runtime.provenance import provenance

    began = time.perf_counter()
    done = work()
    command = shlex.join(["robustmail", *sys.argv[1:]])
    seconds = round(time.perf_counter() - began, 2)
    atomic_write_json(to, {**provenance(device), "seconds": seconds, "command": command})
    return done
