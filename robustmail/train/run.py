"""A run is a recipe in a folder: begun, continued, evaluated, finished; never mixed up with another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustmail.data.dataset import data_fingerprint
from robustmail.errors import RunError, Stopped
from robustmail.evaluation.attack_specs import attack_spec
from robustmail.evaluation.evaluator import evaluate_attack
from robustmail.fields import describe, flatten
from robustmail.models.classifier import check_name
from robustmail.recipe import Recipe
from robustmail.records import ATTACKED, AttackResult, Record, RunFinished
from robustmail.runtime.devices import pick_device
from robustmail.runtime.distributed import all_gather_lists, from_main_process, is_main_process
from robustmail.runtime.files import atomic_write, atomic_write_json, check_folder, folder_lock, make_folder, remove
from robustmail.runtime.provenance import provenance
from robustmail.runtime.signals import Signals
from robustmail.runtime.untrusted import check_shape, read_json
from robustmail.train.dry_run import dry_run
from robustmail.train.loop import fit, worse
from robustmail.train.state import State

__all__ = ["Stopped", "preflight", "run", "status", "write_recipe"]

OURS = (  # the state first: what begins anew takes that away before anything else
    "state.pt", "recipe.py", "recipe.json", "metrics.csv", "log.txt", "best.safetensors", "last.safetensors",
    "results.json", "curves.png", "nonfinite.pt", "forked.json", "report.html", "lock",
)  # fmt: skip
RESULTS = {
    "complete": bool, "attacks": [ATTACKED], "weights": {"file": str, "epoch": int, "burn_in?": int},
}  # fmt: skip
NOT_THE_METHOD = {"device"}  # a run may go on elsewhere


def preflight(recipe: Recipe) -> None:
    """What can be known to be wrong before data are loaded: names of models and attacks, the device.

    Raises the error of whatever is wrong; writes nothing.
    """
    pick_device(recipe.device)
    if isinstance(recipe.model, str):
        check_name(recipe.model)
    for attack in (recipe.validate, *recipe.evaluate):
        attack_spec(attack, recipe.budget, classes=10, norm=recipe.norm)


def status(recipe: Recipe, folder: Path, fresh: bool = False, yes: bool = False) -> str:
    """What running the recipe in the folder means: "new", "continue", "finished", or "replace" with `fresh`.

    Reads only. Raises RunError: a folder of another recipe (naming the fields that differ), files that would be
    overwritten and are no run's, or an unfinished run that `fresh` would delete without `yes`.
    """
    if not folder.exists():
        return "new"
    if not folder.is_dir():
        raise RunError(str(folder), "is a file, not a folder", "Pass another --out.")
    check_folder(folder, OURS, "run")
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
    """Train, or go on training, in a folder; evaluate the chosen weights on the test set; write results.json.

    Raises RunError if the folder is in use or not this recipe's, Stopped after a signal, and whatever `fit` raises.
    Nothing is written before the recipe was rehearsed, the data loaded and the model built.
    """
    preflight(recipe)
    if from_main_process(lambda: status(recipe, folder, fresh, yes)) == "finished":
        yield _finished(folder, before=True)
        return
    state = State.fresh(recipe)
    state.save_every = save_every
    dry_run(recipe, state.images.classes, state.images.shape)
    text = source.read_bytes() if source is not None else None  # in whatever encoding it is
    if not is_main_process():
        yield from _follow(recipe, state, folder, name, signals or Signals())
        return
    make_folder(folder)
    with folder_lock(folder):
        what = status(recipe, folder, fresh, yes)
        if what == "finished":  # by another process, while this one was loading
            from_main_process(lambda: False)
            yield _finished(folder, before=True)
            return
        _enter(recipe, state, folder, what, text)
        from_main_process(lambda: True)
        yield from _train(recipe, state, name, signals or Signals())
        yield from _evaluate(recipe, state, folder)
        yield _finished(folder)


def _follow(recipe: Recipe, state: State, folder: Path, name: str, signals: Signals) -> Iterator[Record]:
    """The part of the processes that neither write nor decide; they begin where the first one says they do."""
    if from_main_process(lambda: True):
        state.folder = folder
        state.load()
        yield from _train(recipe, state, name, signals)
        yield from _evaluate(recipe, state, folder)


def _enter(recipe: Recipe, state: State, folder: Path, what: str, source: bytes | None) -> None:
    """Put the state into the folder, or the folder's state into ours."""
    state.folder = folder
    if what == "continue":
        state.load()
        return
    remove(folder, [name for name in OURS if name != "lock"])
    write_recipe(recipe, folder, source)
    state.save()


def write_recipe(recipe: Recipe, folder: Path, source: bytes | None) -> None:
    """Say in the folder which run it is: every field resolved, and the file that it was read from."""
    atomic_write_json(folder / "recipe.json", flatten(recipe))
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
    """Attack the test set, once; a verdict that is in results.json already is not computed again."""
    chosen = state.best_epoch if recipe.select == "best" else recipe.epochs - 1
    rows = from_main_process(lambda: [AttackResult(**row) for row in _read_results(folder).get("attacks", [])])
    state.read_weights(recipe.select)
    test = state.images.test.first(recipe.test_size)
    data = {"name": state.images.name, "fingerprint": data_fingerprint(test)}
    test = test.to(state.device)
    done = {row.name for row in rows}
    yield from rows
    for name in recipe.evaluate:
        if name in done:
            continue
        for record in evaluate_attack(
            state.eval_model, test, attack_spec(name, recipe.budget, state.images.classes, recipe.norm), recipe.seed
        ):
            yield record
            if isinstance(record, AttackResult):
                rows.append(record)
                _write_results(recipe, state, folder, rows, chosen, data)
    _write_results(recipe, state, folder, rows, chosen, data, complete=True)


def _write_results(
    recipe: Recipe, state: State, folder: Path, rows: list[AttackResult], chosen: int, data: dict[str, str],
    complete: bool = False,
) -> None:  # fmt: skip
    content = {
        "complete": complete,
        "weights": {
            "file": f"{recipe.select}.safetensors", "epoch": chosen,
            "burn_in": recipe.burn_in if recipe.weighter else 0,
            "chosen_by": f"{recipe.validate} on {len(state.validation.y)} images held out of train"
            if recipe.select == "best" else "last epoch",
            **({"note": note} if (note := worse(state.history[chosen], len(state.validation.y))) else {}),
        },
        "attacks": [asdict(row) for row in rows],
        "provenance": {
            **provenance(state.device), "seed": recipe.seed, "precision": state.compute_models.said,
            "data": data,
            "recipe": flatten(recipe), "text": describe(recipe),
        },
    }  # fmt: skip
    if is_main_process():
        atomic_write_json(folder / "results.json", content)


def _finished(folder: Path, before: bool = False) -> RunFinished:
    results = _read_results(folder)
    rows = tuple(AttackResult(**row) for row in results["attacks"])
    weights = results["weights"]
    burn_in, note = weights.get("burn_in", 0), weights.get("note", "")
    return RunFinished(str(folder), rows, weights["file"], weights["epoch"], before, burn_in, note)


def _refuse_another(recipe: Recipe, there: dict[str, Any], folder: Path) -> None:
    here = flatten(recipe)
    differ = [k for k in {**there, **here} if there.get(k) != here.get(k) and k not in NOT_THE_METHOD]
    if differ:
        shown = "; ".join(f"{k}: {there.get(k, 'absent')} there, {here.get(k, 'absent')} here" for k in differ[:4])
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise RunError(
            str(folder), f"holds a run of another recipe ({shown}{more})",
            "Pass another --out, or --fresh to begin anew.",
        )  # fmt: skip


def _read_results(folder: Path) -> dict[str, Any]:
    """The results of a run, or nothing; raises RunError for what no run writes."""
    return _read_json(folder / "results.json", RESULTS)


def _read_json(path: Path, shape: Any = dict) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(path)
        check_shape(content, shape)
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(str(path), f"damaged ({error})", "Begin anew with --fresh --yes.") from error
