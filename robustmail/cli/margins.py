"""The verbs about margins: margins (is a margin worth a training run?) and figure (the paper's, for other models)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from robustmail.catalog import catalog_entries
from robustmail.cli.completion import complete_attacks, complete_plugins, complete_runs, complete_words
from robustmail.cli.option_texts import check_count, split_names
from robustmail.cli.options import (
    MEASURE,
    AcceptReading,
    Batch,
    Data,
    Device,
    Eps,
    EvaluationInputs,
    File,
    Fresh,
    IgnoreUnused,
    MaxImages,
    Model,
    Normalize,
    NormName,
    Plain,
    Probe,
    Seed,
    Weights,
    command_line,
    open_inputs,
    result_name,
    stop_exit,
    wants_plain,
)
from robustmail.cli.recipe_verbs import Verb
from robustmail.errors import DataError, PluginError, RecipeError, Stopped, did_you_mean

if TYPE_CHECKING:
    from robustmail.margin_lab.measure import MarginTask
    from robustmail.margin_lab.paper_figures import FigureInputs

__all__ = ["add_to", "load_margins"]

T = TypeVar("T")
MARGINS = "all"
ATTACKS = "pgd100,cw,apgd"  # DEFAULT_ATTACKS of margin_lab.measure, which imports torch
FIGURES = ("1a", "1b", "1c", "2", "4")


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    for verb in (margins, figure):
        app.command(cls=Verb, rich_help_panel=MEASURE)(verb)


def margins(
    file: File,
    data: Data = None,
    margins: Annotated[
        str,
        typer.Option(
            help="Names and file.py:margin, with commas; all: every built-in margin.",
            autocompletion=complete_plugins("margins", "all"),
        ),
    ] = MARGINS,
    against: Annotated[
        str | None,
        typer.Option(
            help=f"Attacks that decide which examples are broken.  [default: {ATTACKS}]",
            autocompletion=complete_attacks,
        ),
    ] = None,
    n: MaxImages = None,
    eps: Eps = None,
    norm: NormName = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training attack, PGD, and of every path.")] = 10,
    model: Model = None,
    normalize: Normalize = None,
    probe: Probe = False,
    accept_reading: AcceptReading = False,
    ignore_unused: IgnoreUnused = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.  [default: lab/NAME]")] = None,
    seed: Seed = 0,
    batch: Batch = None,
    device: Device = "auto",
    fresh: Fresh = False,
    plain: Plain = False,
) -> None:
    """Measure margins on a checkpoint, before training with them.

    For each margin: is it continuous? does it depend on the attack's path? does it predict which examples stronger
    attacks break? which of these does it miss? which other margins rank examples alike? how many passes does it add to
    a training step?
    """
    from robustmail.evaluation.attack_texts import split_attacks
    from robustmail.margin_lab.measure import MarginTask, measure_costs

    by_name, left_out = load_margins(margins)
    inputs = open_inputs(
        file, data, n, model, normalize, weights, probe, device, eps, norm, accept_reading, ignore_unused
    )
    attacks = tuple(split_attacks(ATTACKS if against is None else against, "--against"))
    task = MarginTask(inputs.model, inputs.data, by_name, inputs.eps, inputs.norm, attacks, steps, seed,
                      check_count("--batch", batch))  # fmt: skip
    measure_costs(task)  # refuses a margin that breaks its contract, before any folder is made
    if left_out:
        print(f"not measured, for lack of what training remembered: {', '.join(left_out)}")
    _measure(task, out or Path("lab") / result_name(inputs.model), fresh, plain)


def _measure(task: MarginTask, folder: Path, fresh: bool, plain: bool) -> None:
    """Measure margins into a folder, draw the pictures and print the tables."""
    from rich.console import Console

    from robustmail.margin_lab.measure import check_same_measurement, measure_margins, save_lab
    from robustmail.report.margin_figures import PICTURES, draw_lab
    from robustmail.report.margin_tables import lab_table, read_lab
    from robustmail.report.style import picture_paths
    from robustmail.runtime.files import folder_lock, make_folder, remove

    pictures = [path.name for name in PICTURES for path in picture_paths(folder / name)]
    files = ["margins.json", "provenance.json", *pictures]
    make_folder(folder, (*files, "lock"), "lab")
    with folder_lock(folder):
        if fresh:
            remove(folder, files)
        if (folder / "margins.json").exists():
            check_same_measurement(task, read_lab(folder), folder)
        print("\n".join([*task.subject.notes, task.forecast]))
        measured = _with_provenance(
            task.subject.device, folder / "provenance.json", lambda: _last(measure_margins(task), plain)
        )
        save_lab(measured, folder)
        lab = read_lab(folder)
        drawn = draw_lab(lab, folder)
    Console().print(lab_table(lab))
    print(f"{folder / 'margins.json'}: every number and every image's value. {len(drawn)} pictures beside it")


def figure(
    which: Annotated[
        str,
        typer.Argument(
            metavar="FIGURE",
            help=f"The paper's figure: {', '.join(FIGURES)}.",
            autocompletion=complete_words(*FIGURES),
        ),
    ],
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Checkpoints or runs; several only for 1c.", autocompletion=complete_runs
        ),
    ],
    data: Data = None,
    n: MaxImages = None,
    eps: Eps = None,
    norm: NormName = None,
    model: Model = None,
    normalize: Normalize = None,
    probe: Probe = False,
    accept_reading: AcceptReading = False,
    ignore_unused: IgnoreUnused = False,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.  [default: figures/NAME]")] = None,
    seed: Seed = 0,
    batch: Batch = None,
    device: Device = "auto",
    plain: Plain = False,
) -> None:
    """Redraw a figure of the paper for a checkpoint.

    Writes it as PNG and SVG, and all numbers in it as JSON.
    """
    from robustmail.margin_lab.paper_figures import FigureInputs

    if which not in FIGURES:
        wrong = "not available: the paper has no such figure, or it shows no data"
        raise RecipeError(f"figure {which}", wrong, did_you_mean(which, FIGURES))
    if len(files) > 1 and which != "1c":
        raise RecipeError(f"figure {which}", f"shows one model, not {len(files)}", "Pass one, or draw figure 1c.")
    several = [
        open_inputs(file, data, n, model, normalize, weights, probe, device, eps, norm, accept_reading, ignore_unused)
        for file in files
    ]
    first = several[0]
    if any(_attacked_unlike(first, inputs) for inputs in several[1:]):
        wrong = "models that would not be attacked alike"
        raise DataError("figure 1c", wrong, "Pass --data, --eps and --norm.")
    models = [inputs.model for inputs in several]
    figure_inputs = FigureInputs(models, first.data, first.eps, first.norm, seed, check_count("--batch", batch))
    _draw(which, figure_inputs, out or Path("figures") / result_name(models[0]), plain)


def _draw(which: str, inputs: FigureInputs, folder: Path, plain: bool) -> None:
    """Compute a figure from `FigureInputs`, write its files and print its caption."""
    from robustmail.margin_lab.paper_figures import compute_figure, save_figure
    from robustmail.report.figures import draw_figure
    from robustmail.report.style import picture_paths
    from robustmail.runtime.files import folder_lock, make_folder

    pictures = [path.name for name in FIGURES for path in picture_paths(folder / f"figure-{name}")]
    numbers = [f"{kind}-{name}.json" for name in FIGURES for kind in ("figure", "provenance")]
    make_folder(folder, (*pictures, *numbers, "lock"), "figure")
    with folder_lock(folder):
        for subject in inputs.subjects:
            for text in subject.notes:
                print(text)
        figure = _with_provenance(
            inputs.subjects[0].device,
            folder / f"provenance-{which}.json",
            lambda: _last(compute_figure(which, inputs), plain),
        )
        is_replaced = _write_over(folder / f"figure-{which}.json", lambda: save_figure(figure, folder))
        drawn = draw_figure(figure, folder)
    if is_replaced:
        print(f"{folder} held another figure {which}, which is replaced")
    print(figure.caption)
    print(", ".join(map(str, drawn)) if drawn else "No image shows what the figure is about; try more images.")


def _attacked_unlike(first: EvaluationInputs, other: EvaluationInputs) -> bool:
    shapes = (first.data.part.y.shape, other.data.part.y.shape)
    return shapes[0] != shapes[1] or (first.eps, first.norm) != (other.eps, other.norm)


def load_margins(text: str) -> tuple[dict[str, Any], list[str]]:
    """Load a list of margins; file.py:margin is called `margin`, unless two files have a margin of this name.

    `all` stands for every built-in margin without memory; returns also the names of those that it leaves out.
    """
    from robustmail.config.overrides import parse_value
    from robustmail.memory import memory_of

    names, left_out = split_names("--margins", text, MARGINS), []
    if "all" in names:
        builtin = [name for name, entry in catalog_entries("margins").items() if entry.module]
        left_out = [name for name in builtin if memory_of(parse_value(name, "margins")) and name not in names]
        names = [name for name in dict.fromkeys([*builtin, *names]) if name not in ("all", *left_out)]
    if files := [name for name in names if name.endswith(".py")]:
        raise PluginError(f"--margins {files[0]}", "a file without the name of a margin", f"Write {files[0]}:margin.")
    short_names = [name.rpartition(".py:")[2] for name in names]
    by_name = {}
    for name, short in zip(names, short_names, strict=True):
        margin = parse_value(name, "margins")
        if not callable(margin):
            raise PluginError(f"--margins {name}", "not a callable", "Name a function that takes a Step.")
        by_name[name if short_names.count(short) > 1 else short] = margin
    return by_name, left_out


def _last(records: Iterator[Any], plain: bool) -> Any:
    """Show the progress in `records`; return the last of them, which is the result."""
    from rich.console import Console

    from robustmail.records import AttackProgress, AttackResult, ProgressUpdate
    from robustmail.report.dashboard import choose_evaluation_view
    from robustmail.runtime.signals import Signals

    last = None
    try:
        with Signals().caught(), choose_evaluation_view(Console(), wants_plain(plain)) as show:
            for last in records:
                if isinstance(last, (AttackProgress, AttackResult, ProgressUpdate)):
                    show(last)
    except Stopped as stop:
        raise stop_exit(stop, None) from None
    return last


def _write_over(path: Path, write: Callable[[], Any]) -> bool:
    """Write a file; return whether it had other content before."""
    from robustmail.runtime.untrusted import read_bytes

    before = read_bytes(path) if path.exists() else None
    write()
    return before not in (None, path.read_bytes())


def _with_provenance(device: Any, path: Path, work: Callable[[], T]) -> T:
    """Do `work`, then write date, seconds and command to `path`: no result may depend on them."""
    from robustmail.runtime.files import atomic_write_json
    from robustmail.runtime.provenance import provenance

    began = time.perf_counter()
    result = work()
    seconds = round(time.perf_counter() - began, 2)
    atomic_write_json(path, {**provenance(device), "seconds": seconds, "command": command_line()})
    return result
