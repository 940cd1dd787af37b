"""An evaluation in a folder: begun, continued after any interruption, split into shards, merged, read back."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustmail.data.dataset import Split
from robustmail.errors import RunError
from robustmail.evaluation.evaluator import (
    attack_result,
    batch_sizer,
    clean_pass,
    image_batch,
    run_attack,
)
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.evaluation.examples import add_examples
from robustmail.evaluation.ledger import BROKE, STOOD, UNTRIED, Ledger, write_rows
from robustmail.evaluation.sanity_checks import measure
from robustmail.evaluation.storage import (
    FILES,
    FORMAT,
    StoredEvaluation,
    clear,
    eight_bit,
    read_evaluation,
    summarize,
    with_seal,
)
from robustmail.evaluation.task import EvaluationTask, _same, _shard
from robustmail.records import AttackProgress, AttackResult
from robustmail.runtime.files import atomic_write_json, atomic_write_text, folder_lock, make_folder
from robustmail.runtime.provenance import provenance
from robustmail.runtime.untrusted import read_json

__all__ = ["continue_evaluation", "open_shard", "open_whole", "run_evaluation"]

SAVE_EVERY = 20.0  # seconds


def run_evaluation(
    task: EvaluationTask, folder: Path, fresh: bool = False
) -> Generator[AttackProgress | AttackResult, None, None]:
    """Evaluate into a folder, or go on with what is there; the last save is at most some seconds old.

    Raises RunError for a folder of something else or one that was altered, and whatever an attack raises.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        if fresh:
            clear(folder)
        yield from continue_evaluation(task, folder)


def continue_evaluation(task: EvaluationTask, folder: Path) -> Generator[AttackProgress | AttackResult, None, None]:
    """As `run_evaluation`, in a folder that the caller has made and locked."""
    held = _open(task, folder, fresh=False)
    if held and held.results["complete"]:
        yield from (AttackResult(**row) for row in held.results["attacks"])
        return
    yield from _examine(task, folder, held)


def open_whole(task: EvaluationTask, folder: Path, fresh: bool = False) -> bool:
    """Does the folder hold, finished, the whole evaluation of which `task` is a shard?

    Raises RunError where it holds another one, or other things.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        held = _open(replace(task, shard=(1, 1)), folder, fresh)
    return held is not None and held.results["complete"]


def open_shard(task: EvaluationTask, folder: Path, whole: Path, fresh: bool = False) -> None:
    """Begin a shard with what the whole evaluation knows of its images, unless the shard's folder knows already.

    Raises RunError where either folder holds another evaluation, or other things.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        if _open(task, folder, fresh) is None and (held := _resume(replace(task, shard=(1, 1)), whole)):
            _save(task, folder, held.ledger.take(task.index), [], None, 0.0)


def _open(task: EvaluationTask, folder: Path, fresh: bool) -> StoredEvaluation | None:
    """What the folder holds of this very evaluation; complete only if nothing is left to do."""
    if fresh:
        clear(folder)
    held = _resume(task, folder)
    if held and held.results["complete"] and held.results["spec"]["attacks"] != task.spec["attacks"]:
        held.results["complete"] = False  # attacks are added: until they are done, no result is whole
        atomic_write_json(folder / "results.json", with_seal(held.results))
    return held


def _examine(
    task: EvaluationTask, folder: Path, held: StoredEvaluation | None
) -> Iterator[AttackProgress | AttackResult]:
    model, part, room = task.subject.model, task.part, batch_sizer(task.subject.model, task.batch)
    began = time.perf_counter() - (held.results["provenance"]["seconds"] if held else 0.0)
    ledger = held.ledger if held else clean_pass(model, part, room, task.index)
    stored = {at: row["example"] for at, row in enumerate(held.rows) if row["example"]} if held else {}
    rows: list[AttackResult] = []
    measured: dict[str, Any] | None = None

    def save(complete: bool = False) -> float:
        _save(task, folder, ledger, rows, measured, time.perf_counter() - began, complete, stored)
        return time.monotonic()

    saved = time.monotonic()
    try:
        for what in task.plans:
            for record in run_attack(model, part, ledger, what, task.seed, room):
                saved = save() if time.monotonic() - saved >= SAVE_EVERY else saved
                yield record
            rows.append(attack_result(ledger, what, task.seed))
            yield rows[-1]
        _round(task, ledger, part, room)
        save()
        for found in _measured(task, ledger, room):
            if isinstance(found, dict):
                measured = found
            else:
                yield found
    except BaseException as stop:
        if not isinstance(stop, Exception):  # asked to stop, rather than failed
            save()
        raise
    save(complete=True)


def _measured(task: EvaluationTask, ledger: Ledger, room: BatchSizer) -> Iterator[AttackProgress | dict[str, Any]]:
    """What the first shard examines for all of them."""
    attacked = any(what.stages for what in task.plans)
    if task.shard[0] == 1 and (attacked or task.training is None):  # a run may be evaluated on clean images alone
        for found in measure(task.subject.model, task.data.part, ledger, task.eps, task.norm, task.seed, room):
            yield {**found, "doubts": list(task.subject.doubts)} if isinstance(found, dict) else found


def _resume(task: EvaluationTask, folder: Path) -> StoredEvaluation | None:
    """What the folder holds of this very evaluation, or None where it holds nothing."""
    if not (folder / "results.json").exists():
        if (folder / "ledger.csv").exists():
            raise RunError(str(folder), "has a ledger, but its results.json is missing",
                           "Restore it, pass another --out, or --fresh to begin anew.")  # fmt: skip
        return None
    if not (folder / "ledger.csv").exists() and _just_begun(folder):
        return None
    held = read_evaluation(folder, strict=True)
    mine = {"spec": task.spec, "weights": {"fingerprint": task.subject.fingerprint},
            "data": task.told, "shard": _shard(task)}  # fmt: skip
    _same(held.results, mine, folder, shard=True)
    before, now = held.results["spec"]["attacks"], task.spec["attacks"]
    if now[: len(before)] != before:
        raise RunError(str(folder), f"holds the attacks {', '.join(before)}, not {', '.join(now)}",
                       "Attacks can be added at the end; otherwise pass another --out, or --fresh.")  # fmt: skip
    return held


def _just_begun(folder: Path) -> bool:
    """Was its process killed within its first save, before there was anything to lose?"""
    try:
        return read_json(folder / "results.json")["complete"] is False
    except (OSError, ValueError, LookupError, TypeError):  # read_folder says what is wrong
        return False


def _round(task: EvaluationTask, ledger: Ledger, part: Split, room: BatchSizer) -> None:
    """Does each example still break its image as a file does, rounded to 8 bits inside the ball?"""
    where = torch.tensor(sorted(at for at in ledger.examples if int(ledger.rounded[at]) == UNTRIED), dtype=torch.int64)
    for some in where.split(room.batch) if len(where) else ():
        x, y = image_batch(task.subject.model, part, some)
        found = torch.stack([ledger.examples[int(at)] for at in some]).to(x)
        bytes_ = eight_bit(x, found, task.eps, task.norm)
        with exact_inference(task.subject.model, room.slice) as view, torch.no_grad():
            broke = view(bytes_).argmax(1) != y
        inside = task.plans[0].holds(x, bytes_)
        ledger.rounded[some] = torch.where((broke & inside).cpu(), BROKE, STOOD).to(torch.int8)


def _save(
    task: EvaluationTask,
    folder: Path,
    ledger: Ledger,
    rows: list[AttackResult],
    measured: dict[str, Any] | None,
    seconds: float,
    complete: bool = False,
    stored: dict[int, str] | None = None,
) -> None:
    """Examples first, then the ledger that speaks of them, then the results that sum it up: a kill in between leaves
    more than is spoken of, never less. `stored`: the examples, position -> hash, that the folder holds already."""
    stored = {} if stored is None else stored
    results = {
        "format": FORMAT, "kind": "evaluation", "complete": complete, "name": task.subject.name, "n": len(ledger),
        "shard": _shard(task), "spec": task.spec, "weights": task.subject.weights, "data": task.told,
        **summarize(ledger, rows, task.subject.classes, measured),
        **({} if task.training is None else {"training": task.training}),
        "provenance": {
            **provenance(task.subject.device), **task.provenance, "seconds": round(seconds, 2), "command": task.command,
        },
    }  # fmt: skip
    path = folder / "results.json"
    if not path.exists():  # else a kill before the last line would leave a ledger of which nothing is known
        atomic_write_json(path, with_seal({**results, "complete": False}))
    add_examples(folder, ledger, task.part.x, stored, complete)
    atomic_write_text(folder / "ledger.csv", write_rows(ledger, task.hashes, stored, task.context))
    atomic_write_json(path, with_seal(results))
