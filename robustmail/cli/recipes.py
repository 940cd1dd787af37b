"""The verbs about recipes: run, show, check, list, copy. Heavy modules are imported when used."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robustmail import catalog
from robustmail.cli.completion import complete_plugins, complete_recipe, complete_words
from robustmail.cli.option_texts import split_names
from robustmail.cli.options import (
    OWN,
    TRAIN,
    DryRun,
    Overrides,
    Plain,
    RecipeName,
    load_recipe_with,
    stop_exit,
    wants_plain,
)
from robustmail.cli.plans import show_run_plan
from robustmail.cli.recipe_verbs import RecipeVerb, Verb
from robustmail.errors import PluginError, RecipeError, RunError, Stopped, did_you_mean
from robustmail.runtime.untrusted import quoted

if TYPE_CHECKING:
    from robustmail.recipe import Recipe
    from robustmail.trackers.tracker import Tracker

__all__ = ["add_to"]

COMPARED = 512  # extra images that are compared together
FORMS = ("text", "json", "yaml")
KINDS = ("recipes", *catalog.PLURALS)


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command line."""
    for name, verb in (("run", run_), ("show", show)):
        app.command(name, cls=RecipeVerb, rich_help_panel=TRAIN)(verb)
    app.command("list", cls=Verb, rich_help_panel=TRAIN)(list_)
    app.command("check", cls=RecipeVerb, rich_help_panel=OWN)(check)
    app.command("copy", cls=Verb, rich_help_panel=OWN)(copy)


def run_(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/RECIPE/SEED]")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete a finished run in the folder and start again.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fresh: delete an unfinished run, too.")] = False,
    track: Annotated[
        str | None,
        typer.Option(
            help="Trackers that follow the run, as tensorboard,wandb (robustmail list trackers).",
            autocompletion=complete_plugins("trackers"),
        ),
    ] = None,
    dry_run: DryRun = False,
    plain: Plain = False,
) -> None:
    """Train a recipe, then evaluate the model.

    The same command again resumes a stopped run. With torchrun it trains on several GPUs.
    """
    from rich.console import Console

    from robustmail.config.loader import recipe_source
    from robustmail.fields import flatten
    from robustmail.report.dashboard import LogFile, choose_run_view
    from robustmail.report.figures import draw_curves
    from robustmail.runtime import distributed
    from robustmail.runtime.signals import Signals
    from robustmail.trackers.tracking import Tracking
    from robustmail.train.run import TRACKERS, run

    resolved = load_recipe_with(recipe, overrides)
    trackers = _load_trackers(track)
    name = _run_name(recipe)
    folder = out or Path("runs") / name / str(resolved.seed)
    if dry_run:
        show_run_plan(resolved, folder, quoted("robustmail", "show", recipe, *(overrides or [])), fresh, yes)
        return
    log, signals = LogFile(folder / "log.txt"), Signals()
    try:
        with distributed.process_group(resolved.device), signals.caught():
            records = run(resolved, folder, name, recipe_source(recipe), fresh, yes, signals)
            if not distributed.is_main_process():
                for _ in records:
                    pass
                return
            console = Console()
            say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
            with Tracking(trackers, folder / TRACKERS, flatten(resolved), say) as track_record:
                with choose_run_view(console, wants_plain(plain)) as view:
                    for record in records:
                        log(record)
                        track_record(record)
                        view(record)
                if not (folder / "curves.png").exists():
                    draw_curves(folder, name)
    except Stopped as stop:
        raise stop_exit(stop, folder if (folder / "state.pt").exists() else None) from None


def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    form: Annotated[
        str,
        typer.Option(
            "--format", help="text, json (a recipe.json, as robustmail run takes it) or yaml.",
            autocompletion=complete_words(*FORMS),
        ),
    ] = "text",
) -> None:  # fmt: skip
    """Print a recipe with every default, and its loss as a formula.

    Also the forward and backward passes of a training step, which a dry run counts; json and yaml have fields only.
    """
    from robustmail.fields import flatten
    from robustmail.train.dry_run import dry_run

    if form not in FORMS:
        raise RecipeError(f"show --format {form}", "no such format", did_you_mean(form, FORMS))
    resolved = load_recipe_with(recipe, overrides)
    fields = flatten(resolved)
    if form == "json":
        print(json.dumps(fields, indent=2))
        return
    if form == "yaml":  # which has JSON's texts
        print("\n".join(f"{path}: {json.dumps(value)}" for path, value in fields.items()))
        return
    width = max(map(len, fields))
    for path, value in fields.items():
        print(f"{path:<{width}}  {value}")
    print(f"\n{resolved.formula}\n")
    if resolved.freeze:
        print(_count_trained(resolved))
    for epoch, passes in dry_run(resolved).items():
        forward, backward = passes.total
        print(
            f"from epoch {epoch + 1}: {forward} forward and {backward} backward passes a step "
            f"({passes.attack[0]} + {passes.attack[1]} in the attack)"
        )


def _count_trained(recipe: Recipe) -> str:
    """How many parameters are trained, on a model without memory where its name is known."""
    import torch

    from robustmail.models.classifier import build
    from robustmail.models.freezing import freeze, trained_parameters
    from robustmail.models.timm_model import TimmModel

    is_ours = isinstance(recipe.model, (str, TimmModel))
    with torch.device("meta" if is_ours else "cpu"):
        model = build(recipe.model, 10, 3)
    freeze(model, recipe.freeze)
    trained, whole = (sum(p.numel() for p in part) for part in (trained_parameters(model), model.parameters()))
    return f"with 10 classes and 3 channels {trained:,} of {whole:,} parameters are trained"


def check(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe, as in robustmail run; or a file of plugins.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Try a recipe on four random images, and test its plugins.

    Every margin, weighter, objective or attack of your own is tested against all laws of its kind. A file without a
    recipe is searched for plugins, and each of them is tested. The extra images of mixed(...) are
    compared with the images that the model is validated and tested on.
    """
    from robustmail.config.loader import load_plugins
    from robustmail.contracts import assert_lawful, laws, tried_on
    from robustmail.data.mixed import tested_source
    from robustmail.plugin_calls import plugin_name
    from robustmail.text import plural
    from robustmail.train.dry_run import dry_run
    from robustmail.train.initial_weights import open_initial
    from robustmail.train.run import preflight

    if plugins := load_plugins(recipe):
        _check_plugins(plugins)
        return
    resolved = load_recipe_with(recipe, overrides)
    preflight(resolved)
    if resolved.init is not None:
        open_initial(resolved.init)
    dry_run(resolved)
    phases, changes = resolved.change_points(), resolved.change_points()[1:]
    report = f"dry run passed in {plural(len(phases), 'phase')}"
    if changes:
        epochs = ", ".join(str(epoch + 1) for epoch in changes)
        report += f" (something changes at epoch{'s' * (len(changes) > 1)} {epochs})"
    for kind, plugin in resolved.own_plugins():
        assert_lawful(plugin, kind, resolved.margin)
        report += f"; {kind} {plugin_name(plugin)} passes all {plural(len(laws(kind)), 'law')}"
        report += tried_on(plugin, resolved.margin) if kind == "weighter" else ""
    print(f"{recipe}: {report}")
    if tested_source(resolved.data) is not resolved.data:
        _check_extra(resolved)


def _check_extra(recipe: Recipe) -> None:
    """Warn of extra images that are near-copies of images on which the model is tested or validated."""
    from robustmail.data.dataset import Extra, hold_out
    from robustmail.data.near_duplicates import find_near_copies
    from robustmail.plugin_calls import call_plugin
    from robustmail.report.progress import shown_progress
    from robustmail.runtime.devices import pick_device
    from robustmail.train.batches import epoch_batches

    images = call_plugin("data", recipe.data)
    train, validation = hold_out(images, recipe.seed)
    epoch_batches(len(train.y), recipe.batch, recipe.seed, 0, images.extra)  # refuses batches without extra images
    targets = {"test": images.test.x, "validation": validation.x}
    device = pick_device(recipe.device)
    with shown_progress(wants_plain(False)):
        found, usual = (
            find_near_copies(
                part.blocks(COMPARED),
                targets,
                images.flip,
                device,
                functools.partial(_compared, len(part)),
            )
            for part in (images.extra, Extra((train,), share=1.0))
        )
    for name, copies in found.items():
        touched, n = len({copy.target for copy in copies}), len(images.extra)
        print(
            f"{'warning: ' if copies else ''}near-copies of {name} images among the extra images: {len(copies):,} of "
            f"{n:,} ({100 * len(copies) / n:.2g} %), of {touched:,} of {len(targets[name]):,} {name} images; "
            f"among the training images {100 * len(usual[name]) / len(train.y):.2g} %"
        )
        for copy in sorted(copies, key=lambda copy: -copy.correlation)[:3]:
            print(f"  extra image {copy.image}, {name} image {copy.target}, correlation {copy.correlation:.3f}")


def _compared(n: int, done: int) -> None:
    from robustmail.runtime.progress import progress

    progress("images compared", done, n)


def _check_plugins(plugins: dict[str, Any]) -> None:
    """Test every plugin of a file; what is of no kind is named and left out, unless it is the only one."""
    from robustmail.contracts import assert_lawful, kind_of, laws, tried_on
    from robustmail.text import plural

    for name, plugin in plugins.items():
        try:
            kind = kind_of(plugin)
        except PluginError as error:
            if len(plugins) == 1:
                raise
            print(f"{name}: not tested, it {error.wrong}")
            continue
        assert_lawful(plugin, kind)
        tried = tried_on(plugin) if kind == "weighter" else ""
        print(f"{name}: {kind}, passes all {plural(len(laws(kind)), 'law')}{tried}")


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help=f"One of {', '.join(KINDS)}; or runs, all that are below here.",
            autocompletion=complete_words(*KINDS, "runs"),
        ),
    ] = None,
) -> None:
    """List recipes, plugins, models, or runs.

    Those of installed packages are listed, too. A plugin of your own needs no list: write file.py:name.
    Of each run below this folder: its state, its epoch, the best robust accuracy in validation, the training time left.
    """
    if kind == "runs":
        _list_runs()
        return
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"list {kind}", "no such kind", did_you_mean(kind, [*KINDS, "runs"]))
    for heading in [kind] if kind else KINDS:
        if heading == "recipes":
            summaries = {name: catalog.summary(path) for name, path in catalog.recipe_files().items()}
        else:
            summaries = {name: entry.summary for name, entry in catalog.catalog_entries(heading).items()}
            summaries |= catalog.PLURALS[heading].patterns
        if kind is None:
            print(f"\n{heading}")
        for name, text in summaries.items():
            print(f"  {name:<26} {text}")


def _list_runs() -> None:
    from rich.console import Console

    from robustmail.report.runs import find_runs, read_run, runs_table

    runs = [read_run(folder, time.time()) for folder in find_runs(Path())]
    if not runs:
        print("no runs below this folder")
        return
    Console().print(runs_table(runs))
    if any(run.state == "stopped" for run in runs):
        print("stopped: the command that began a run resumes it")


def copy(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe.", autocompletion=complete_recipe)],
    to: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="File to write.  [default: RECIPE.py, here]")
    ] = None,
) -> None:
    """Write a copy of a built-in recipe, to edit and run."""
    from robustmail.runtime.files import atomic_write_text

    built_in = catalog.recipe_files()
    if recipe not in built_in:
        raise RecipeError(f"copy {recipe}", "no such built-in recipe", did_you_mean(recipe, built_in))
    target = to or Path(f"{recipe}.py")
    target = target / f"{recipe}.py" if target.is_dir() else target
    if target.exists():
        raise RunError(str(target), "exists already", "Name another file: robustmail copy RECIPE FILE.")
    if not target.parent.is_dir():
        raise RunError(str(target.parent), "no such folder", "Make it first.")
    atomic_write_text(target, built_in[recipe].read_text(encoding="utf-8"))
    print(f"{target}: edit it, then robustmail run {target}")


def _load_trackers(names: str | None) -> dict[str, Tracker]:
    """The trackers that --track names. Raises PluginError: no such tracker, or its library is not installed."""
    from robustmail.config.loader import find_plugin
    from robustmail.plugin_calls import call_plugin

    chosen = split_names("--track", names, "--track tensorboard,wandb") if names is not None else []
    return {name: call_plugin("tracker", find_plugin(name, "trackers")) for name in chosen}


def _run_name(recipe: str) -> str:
    """mail_at -> mail_at; my.py -> my; my.py:wide -> my-wide; runs/at/0/recipe.json -> at; kept/it.json -> it"""
    path = Path(recipe)
    if path.suffix == ".json":
        folders = [part for part in path.absolute().parent.parts if not part.isdigit()]
        return folders[-1] if path.name == "recipe.json" else path.stem
    file, _, variable = recipe.partition(":")
    return Path(file).stem + (f"-{variable}" if variable and variable != "recipe" else "")
