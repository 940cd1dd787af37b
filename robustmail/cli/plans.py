"""--dry-run: what a verb would do, in words. Nothing is written, downloaded or trained."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustmail.errors import RobustmailError
from robustmail.runtime.untrusted import printable
from robustmail.text import format_eps, plural

if TYPE_CHECKING:
    from robustmail.evaluation.task import EvaluationTask
    from robustmail.recipe import Recipe
    from robustmail.train.dry_run import Passes
    from robustmail.trials.study import Study

__all__ = ["show_curve_plan", "show_download", "show_evaluation_plan", "show_grid_plan", "show_run_plan"]

NOTHING = "dry run: nothing was written"
RUN_STATES = {
    "new": "would be made", "continue": "has this run, which would go on",
    "finished": "has this run, finished: nothing to do", "replace": "has a run, which would be deleted",
}  # fmt: skip
EVALUATION_STATES = {
    "new": "would be made", "continue": "has this evaluation, which would go on",
    "finished": "has this evaluation, finished: it would be shown", "replace": "has results, which would be deleted",
}  # fmt: skip


def show_run_plan(recipe: Recipe, folder: Path, show_command: str, fresh: bool, yes: bool) -> None:
    """Print what `run` would do; show_command: prints every field. Raises what `run` raises before it trains."""
    from robustmail.evaluation.attack_specs import passes_per_image
    from robustmail.runtime.devices import describe_device, pick_device
    from robustmail.train.dry_run import dry_run
    from robustmail.train.run import preflight, status

    preflight(recipe)
    state = status(recipe, folder, fresh, yes)
    images, missing = _images(recipe)
    shape = {} if images is None else {"classes": images.classes, "shape": images.shape}
    passes = dry_run(recipe, **shape)
    say("recipe", f"every field: {show_command}")
    say("loss", recipe.formula.removeprefix("loss = "))
    say("data", missing or _sizes(recipe, images))
    say("model", _network(recipe, images))
    say("device", f"{describe_device(pick_device(recipe.device))}, precision {recipe.precision}")
    steps = None if images is None else _steps(recipe, images)
    per_epoch = "" if steps is None else f" of {plural(steps, 'step')}, {recipe.epochs * steps:,} in all"
    say("training", f"{plural(recipe.epochs, 'epoch')}{per_epoch}, batches of {recipe.batch}, seed {recipe.seed}")
    say("cost", f"{_cost(passes, recipe.epochs, steps)}. How long that takes, a run says after its first steps")
    n = "" if images is None else f" on {plural(len(images.test.first(recipe.test_size).y), 'test image')}"
    at_most = sum(map(passes_per_image, recipe.evaluate))
    say("then", f"{', '.join(recipe.evaluate)}{n}, at most {at_most:,.0f} passes an image")
    say("folder", f"{folder} {RUN_STATES[state]}")
    print(NOTHING)


def show_grid_plan(study: Study) -> None:
    """Print the runs that a grid would make. Raises what the grid raises before it trains."""
    from robustmail.runtime.devices import describe_device, pick_device

    study.check()
    missing = {job.folder for job in study.missing}
    counts = Counter(job.until is None for job in study.missing)
    say("runs", f"{counts[True]} of {len(study.recipes)} to make, {len(study.recipes) - counts[True]} finished")
    if counts[False]:
        say("shared", f"{plural(counts[False], 'start')} that several of them have in common, each trained once")
    epochs = sum((job.until or study.recipes[job.cell].epochs) - job.begin for job in study.missing)
    say("training", f"{plural(epochs, 'epoch')} in all")
    first = next(iter(study.recipes.values()))
    say("device", describe_device(pick_device(first.device)))
    say("folder", str(study.out))
    for row in dict.fromkeys(cell.row for cell in study.folders):
        folders = [folder for cell, folder in study.folders.items() if cell.row == row]
        print(f"  {row}: {sum(folder in missing for folder in folders)} of {plural(len(folders), 'run')} to make")
    print(NOTHING)


def show_evaluation_plan(task: EvaluationTask, folder: Path, fresh: bool) -> None:
    """Print what `eval` would do. Raises what `eval` raises before it attacks."""
    from robustmail.evaluation.runner import evaluation_status

    state = evaluation_status(task, folder, fresh)
    _show_subject(task)
    say("eps", f"{format_eps(task.eps, task.norm)}, seed {task.seed}")
    _show_attacks(task)
    say("folder", f"{folder} {EVALUATION_STATES[state]}")
    print(NOTHING)


def show_curve_plan(tasks: list[EvaluationTask], folder: Path, at_zero: bool) -> None:
    """Print what `eval` with several eps would do."""
    _show_subject(tasks[0])
    budgets = ["0 (the natural accuracy)"] * at_zero + [format_eps(task.eps, task.norm) for task in tasks]
    say("eps", f"{', '.join(budgets)}; seed {tasks[0].seed}")
    _show_attacks(tasks[0])
    say("folder", f"{folder} {'is there' if folder.exists() else 'would be made'}, a folder in it for each eps")
    print(NOTHING)


def show_download(file: str) -> bool:
    """Whether a file has to be downloaded first, which is then said. Raises ModelError: not a file of the hub."""
    from robustmail.checkpoints.hub import hub_address, is_hub

    if is_remote := is_hub(file):
        hub_address(file)
        say("model", f"{file}: would be downloaded, and then attacked. Nothing was done")
    return is_remote


def say(name: str, text: str) -> None:
    """Print a line of a plan; further lines of the text are indented."""
    head, *more = text.splitlines()
    print("\n".join([f"{name:<9} {printable(head)}", *(f"{'':<9} {printable(line)}" for line in more)]))


def _show_subject(task: EvaluationTask) -> None:
    from robustmail.runtime.devices import describe_device

    subject = task.subject
    say("model", f"{subject.name}, {plural(sum(p.numel() for p in subject.model.parameters()), 'parameter')}")
    for note in subject.notes:
        say("", note)
    part = f", shard {task.shard[0]} of {task.shard[1]}" if task.shard != (1, 1) else ""
    say("data", f"{task.data.name}, {plural(len(task.part.y), 'image')}{part}")
    say("device", describe_device(subject.device))


def _show_attacks(task: EvaluationTask) -> None:
    from robustmail.evaluation.attack_specs import passes_per_image

    for spec in task.attack_specs:
        cost = f"at most {passes_per_image(spec.name):,.0f} passes an image" if spec.stages else "one pass an image"
        say("attack", f"{spec.name}: {cost}")


def _images(recipe: Recipe) -> tuple[Any, str]:
    """(the images of a recipe, ""), or (None, why they are not known) where they would be downloaded."""
    from robustmail.data.dataset import ImageData
    from robustmail.data.torchvision_sets import NotDownloadedError, no_downloads
    from robustmail.errors import RecipeError
    from robustmail.fields import describe
    from robustmail.plugin_calls import call_plugin

    try:
        with no_downloads():
            images = call_plugin("data", recipe.data)
    except NotDownloadedError as error:
        return None, f"{describe(recipe.data)}: would be downloaded ({error.wrong})"
    if not isinstance(images, ImageData):
        raise RecipeError(f"data={describe(recipe.data)}", f"returned {type(images).__name__}, not ImageData")
    return images, ""


def _cost(passes: dict[int, Passes], epochs: int, steps: int | None) -> str:
    """Passes of a step, where they change, and of the run."""
    before, changes = -1, []
    for epoch, found in passes.items():
        if (now := sum(found.total)) != before:
            changes.append(f"{now} passes a step" + f" from epoch {epoch + 1}" * bool(epoch))
        before = now
    if steps is not None:
        in_all = steps * sum((end - begin) * sum(passes[begin].total) for begin, end in pairwise([*passes, epochs]))
        changes.append(f"{in_all:,} passes of a batch in all, forward or backward")
    return ", ".join(changes)


def _sizes(recipe: Recipe, images: Any) -> str:
    from robustmail.data.dataset import hold_out

    train, validation = (len(part.y) for part in hold_out(images, recipe.seed))
    test, shape = len(images.test.first(recipe.test_size).y), "x".join(map(str, images.shape))
    return f"{images.mixture}: {train:,} images of {shape} to train on, {validation:,} to validate, {test:,} to test"


def _steps(recipe: Recipe, images: Any) -> int:
    from robustmail.data.dataset import hold_out
    from robustmail.train.batches import epoch_batches

    n = len(hold_out(images, recipe.seed)[0].y)
    return len(epoch_batches(n, recipe.batch, recipe.seed, epoch=0, extra=images.extra))


def _network(recipe: Recipe, images: Any) -> str:
    """The model and its number of parameters; without memory where its name is known."""
    import torch

    from robustmail.fields import describe
    from robustmail.models.classifier import build
    from robustmail.models.timm_model import TimmModel

    name = describe(recipe.model).strip("'")
    if images is None:
        return name
    try:
        with torch.device("meta" if isinstance(recipe.model, (str, TimmModel)) else "cpu"):
            model = build(recipe.model, images.classes, images.shape[0])
    except RobustmailError:
        raise
    except Exception:  # it computes with its parameters
        return name
    return f"{name}, {plural(sum(p.numel() for p in model.parameters()), 'parameter')}"
