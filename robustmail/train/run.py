"""A training run in a folder: started, resumed, evaluated, finished; never mixed with another run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from robustmail.data.image_files import data_fingerprint
from robustmail.data.mixed import tested_source
from robustmail.data.testsets import from_image_data
from robustmail.errors import RunError, Stopped
from robustmail.evaluation.attack_specs import attack_spec
from robustmail.evaluation.evaluator import BLOCK
from robustmail.evaluation.merge import merge_into
from robustmail.evaluation.model_loading import trained_model
from robustmail.evaluation.results import refuse_old_run
from robustmail.evaluation.runner import continue_evaluation, open_shard, run_evaluation
from robustmail.evaluation.storage import FILES as EVALUATION_FILES
from robustmail.evaluation.storage import clear
from robustmail.evaluation.task import EvaluationTask
from robustmail.fields import describe, flatten
from robustmail.models.classifier import check_name
from robustmail.models.timm_model import TimmModel
from robustmail.recipe import Recipe
from robustmail.records import ATTACKED, AttackProgress, AttackResult, Record, RunFinished
from robustmail.runtime.devices import pick_device
from robustmail.runtime.distributed import (
    alike,
    all_gather_lists,
    from_main_process,
    is_main_process,
    rank,
    world_size,
)
from robustmail.runtime.files import atomic_write, atomic_write_json, check_folder, folder_lock, make_folder, remove
from robustmail.runtime.signals import Signals
from robustmail.runtime.untrusted import check_shape, read_json
from robustmail.train.dry_run import dry_run
from robustmail.train.image_weights import weights_of
from robustmail.train.initial_weights import init_sha256
from robustmail.train.loop import fit, worse
from robustmail.train.state import State, kept_epochs

__all__ = ["TRACKERS", "Stopped", "preflight", "recorded_hashes", "run", "status", "write_recipe"]

TRACKERS = "trackers"  # folder of what trackers keep (robustmail.trackers), which training neither reads nor writes
OURS = (
    TRACKERS, "state.pt", "recipe.py", "recipe.json", "metrics.csv", "log.txt", "best.safetensors", "last.safetensors",
    "curves.png", "nonfinite.pt", "forked.json", *EVALUATION_FILES,
)  # fmt: skip
RESULTS = {
    "complete": bool, "attacks": [ATTACKED], "weights": {"file": str},
    "training": {"epoch": int, "burn_in": int, "note": str},
}  # fmt: skip
SHARDS = "shards"  # folder of what several processes evaluate, until it is joined
FILES = ("init", "teacher")  # fields that name a file; its hash stands beside them in recipe.json, as init.sha256
# A run may go on elsewhere, and keep more or fewer epochs; of a file the content counts, not the path.
NOT_THE_METHOD = {"device", "keep_every"}


def preflight(recipe: Recipe) -> None:
    """Check names of models and attacks, and the device, before data are loaded. Writes nothing.

    Raises DeviceError, ModelError or RecipeError.
    """
    pick_device(recipe.device)
    if isinstance(recipe.model, str):
        check_name(recipe.model)
    elif isinstance(recipe.model, TimmModel):
        recipe.model.check()
    for attack in (*recipe.validate_attacks, *recipe.evaluate):
        attack_spec(attack, recipe.budget, classes=10, norm=recipe.norm)


def status(recipe: Recipe, folder: Path, fresh: bool = False, yes: bool = False) -> str:
    """What `run` would do in the folder: "new", "continue", "finished", or "replace" (with `fresh`). Reads only.

    recipe: what would be trained.
    folder: of the run.
    fresh: delete what is there.
    yes: also an unfinished run.

    Raises RunError: a run of another recipe (naming the fields that differ), files that would be overwritten and are no
    run's, results of an older version, or an unfinished run that `fresh` would delete without `yes`.
    """
    if not folder.exists():
        return "new"
    if not folder.is_dir():
        raise RunError(str(folder), "is a file, not a folder", "Pass another --out.")
    check_folder(folder, (*OURS, *kept_epochs(folder).values()), "run")
    begun = (folder / "state.pt").exists()
    if fresh:
        if begun and not yes and not _read_results(folder).get("complete"):
            raise RunError(str(folder), "holds a run that is not finished", "Add --yes to delete it, or drop --fresh.")
        return "replace"
    if not begun:
        return "new"
    _refuse_another(recipe, _read_json(folder / "recipe.json"), folder)
    return "finished" if _read_results(folder).get("complete") else "continue"


def run(
    recipe: Recipe, folder: Path, name: str, source: Path | None = None, fresh: bool = False, yes: bool = False,
    signals: Signals | None = None, save_every: float = 30.0,
) -> Iterator[Record]:  # fmt: skip
    """Train in a folder, or resume there, then evaluate the chosen weights on the test set; yields records.

    recipe: what to train.
    folder: of the run, created if missing.
    name: of the recipe, for people.
    source: the recipe's file, of which the folder gets a copy.
    fresh: begin anew, deleting a finished run in the folder.
    yes: with fresh, delete an unfinished run too.
    signals: whose `asked` stops the run after the current step.
    save_every: seconds between two saves within an epoch.

    Nothing is written before the dry run has passed, the data are loaded and the model is built. Raises RunError if the
    folder is in use or another recipe's, Stopped after a signal, and whatever `fit` raises.
    """
    preflight(recipe)
    before = from_main_process(lambda: status(recipe, folder, fresh, yes))
    if before == "finished":
        yield _finished(folder, before=True)
        return
    state = State.fresh(recipe, read_init=before != "continue")
    state.save_every = save_every
    dry_run(recipe, state.images.classes, state.images.shape)
    text = source.read_bytes() if source is not None else None  # in whatever encoding it is
    if not is_main_process():
        yield from _follow(recipe, state, folder, name, signals or Signals())
        return
    make_folder(folder)
    with folder_lock(folder):
        folder_status = status(recipe, folder, fresh, yes)
        if folder_status == "finished":  # by another process, while this one was loading
            from_main_process(lambda: False)
            yield _finished(folder, before=True)
            return
        _prepare_folder(recipe, state, folder, folder_status, text)
        from_main_process(lambda: True)
        yield from _train(recipe, state, name, signals or Signals())
        yield from _evaluate(recipe, state, folder)
        yield _finished(folder)


def _follow(recipe: Recipe, state: State, folder: Path, name: str, signals: Signals) -> Iterator[Record]:
    """Training on ranks other than 0: load rank 0's state, then train and evaluate without writing."""
    if from_main_process(lambda: True):
        state.folder = folder
        state.load()
        yield from _train(recipe, state, name, signals)
        yield from _evaluate(recipe, state, folder)


def _prepare_folder(recipe: Recipe, state: State, folder: Path, folder_status: str, source: bytes | None) -> None:
    """Load the folder's state, or empty the folder and save the fresh state."""
    state.folder = folder
    if folder_status == "continue":
        state.load()
        if recipe.init is not None and init_sha256(recipe.init) is None:
            gone = f"init={recipe.init} is not there any more, and not needed: the run goes on from its saved state"
            state.note = "; ".join(filter(None, [state.note, gone]))
        return
    if recipe.init is not None and state.init_sha256 is None:
        raise RunError(str(folder), "was emptied while this process was loading", "Run it again.")
    (folder / "state.pt").unlink(missing_ok=True)  # first: a kill from here on leaves a run that begins anew
    clear(folder, "run")
    for name in (SHARDS, TRACKERS):
        shutil.rmtree(folder / name, ignore_errors=True)  # a symbolic link stays, unfollowed
    ours = (name for name in OURS if name not in (TRACKERS, *EVALUATION_FILES))
    remove(folder, [*kept_epochs(folder).values(), *ours])
    write_recipe(recipe, folder, source, state.file_hashes)
    state.save()


def write_recipe(recipe: Recipe, folder: Path, source: bytes | None, hashes: Mapping[str, str]) -> None:
    """Write recipe.json, every field of the recipe, and recipe.py, the bytes of its source file.

    hashes: SHA-256 of the files that the recipe names, {"init.sha256": ...}, which recipe.json has, too.
    """
    atomic_write_json(folder / "recipe.json", {**flatten(recipe), **hashes})
    if source is not None:
        atomic_write(folder / "recipe.py", lambda temporary: temporary.write_bytes(source))


def _train(recipe: Recipe, state: State, name: str, signals: Signals) -> Iterator[Record]:
    with signals.deferred():
        records = fit(recipe, state, name)
        for record in records:
            yield record
            if (signum := max(all_gather_lists([signals.asked or 0]))) != 0:  # all stop after the same step
                records.close()
                state.save()
                raise Stopped(signum)


def _evaluate(recipe: Recipe, state: State, folder: Path) -> Iterator[Record]:
    """Evaluate the chosen weights on the test set into the run's folder; resumes within an attack."""
    state.read_weights(recipe.kept_epoch)
    if is_main_process() and not (folder / "results.json").exists():
        clear(folder, "run")  # a ledger without its results cannot be resumed
    task = _evaluation_task(recipe, state, folder)
    n_shards = min(world_size(), -(-len(task.data.part.y) // BLOCK))
    if n_shards > 1:
        yield from _evaluate_shards(task, folder, n_shards)
        return
    if is_main_process():
        yield from continue_evaluation(task, folder)
    from_main_process(lambda: None)  # the other processes wait


def _evaluate_shards(task: EvaluationTask, folder: Path, n_shards: int) -> Iterator[Record]:
    """Evaluate a shard of the test set in each process, in a folder of its own; rank 0 joins them."""
    shards = [folder / SHARDS / f"{k + 1}-of-{n_shards}" for k in range(n_shards)]
    if rank() < n_shards:
        shard, own = replace(task, shard=(rank() + 1, n_shards)), shards[rank()]
        alike(lambda: open_shard(shard, own, folder))
        yield from (record for record in run_evaluation(shard, own) if isinstance(record, AttackProgress))
    else:
        alike(lambda: None)
    all_gather_lists([0])  # until all are done

    def join() -> list[AttackResult]:
        merge_into(shards, folder)
        shutil.rmtree(folder / SHARDS)
        return list(_finished(folder).rows)

    yield from from_main_process(join)


def _evaluation_task(recipe: Recipe, state: State, folder: Path) -> EvaluationTask:
    test = replace(from_image_data(state.images), given=describe(tested_source(recipe.data)))
    test = replace(test, part=test.part.first(recipe.test_size))
    model = trained_model(state.eval_model, folder / f"{recipe.kept_epoch}.safetensors", test)
    epoch = state.best_epoch if recipe.kept_epoch == "best" else recipe.epochs - 1
    n_validation = len(state.validation.y)
    training = {
        "epoch": epoch,
        "burn_in": recipe.burn_in if recipe.weighter else 0,
        "chosen_by": f"{' and '.join(recipe.validate_attacks)} on {n_validation} images held out of train"
        if recipe.kept_epoch == "best"
        else "last epoch",
        "weights": recipe.kept_weights,
        "note": ". ".join(
            filter(None, (worse(state.history[epoch], n_validation, recipe.kept_weights), state.memory_note))
        ),
    }
    about = {
        "seed": recipe.seed,
        "precision": state.compute_models.description,
        "data": {"name": state.images.name, "fingerprint": data_fingerprint(test.part)},
        "recipe": {**flatten(recipe), **recorded_hashes(folder)},
        "text": describe(recipe),
    }
    return EvaluationTask(
        model, test, recipe.evaluate, recipe.budget, recipe.norm, recipe.seed, training=training, provenance=about,
        weigh=partial(weights_of, recipe) if recipe.weighter else None,
    )  # fmt: skip


def _finished(folder: Path, before: bool = False) -> RunFinished:
    results = _read_results(folder)
    rows = tuple(AttackResult(**row) for row in results["attacks"])
    training, file = results["training"], Path(results["weights"]["file"]).name
    return RunFinished(
        str(folder), rows, file, training["epoch"], before, training["burn_in"], training["note"], results
    )


def _refuse_another(recipe: Recipe, recorded: dict[str, Any], folder: Path) -> None:
    own = flatten(recipe)
    for name in FILES:
        path, key = getattr(recipe, name), f"{name}.sha256"
        if key in recorded:
            own[name] = recorded.get(name, "")  # the content counts
            if path not in (None, "ema"):  # a file that is gone is not needed any more, or missed later
                own[key] = init_sha256(path) or recorded[key]
    differ = [k for k in {**recorded, **own} if recorded.get(k) != own.get(k) and k not in NOT_THE_METHOD]
    if differ:
        shown = "; ".join(f"{k}: {recorded.get(k, 'absent')} there, {own.get(k, 'absent')} here" for k in differ[:4])
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise RunError(
            str(folder), f"holds a run of another recipe ({shown}{more})",
            "Pass another --out, or --fresh to begin anew.",
        )  # fmt: skip


def recorded_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a run's recipe names, as its recipe.json has them: {"init.sha256": ...}."""
    recorded = _read_json(folder / "recipe.json")
    return {key: value for name in FILES if isinstance(value := recorded.get(key := f"{name}.sha256"), str)}


def _read_results(folder: Path) -> dict[str, Any]:
    """The results of a run, or nothing. Raises RunError: written by an older version, or by no run."""
    path = folder / "results.json"
    content = _read_json(path)
    refuse_old_run(content, path)
    if content:
        _check(path, content, RESULTS)
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    _check(path, content, dict)
    return content


def _check(path: Path, content: Any, shape: Any) -> None:
    try:
        check_shape(content, shape)
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(str(path), f"damaged ({error})", "Begin anew with --fresh --yes.")
