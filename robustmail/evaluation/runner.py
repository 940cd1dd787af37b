"""An evaluation in a folder: begun, continued after any interruption, split into shards, merged, read back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from robustmail.data.dataset import Split, data_fingerprint
from robustmail.errors import RunError
from robustmail.evaluation.evaluator import (
    as_floats,
    attack_result,
    batch_sizer,
    clean_pass,
    image_batch,
    run_attack,
)
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.evaluation.ledger import BROKE, STOOD, UNTRIED, Ledger, concatenate, rows_as_text, write_rows
from robustmail.evaluation.sanity_checks import measure
from robustmail.evaluation.storage import (
    FILES,
    FORMAT,
    StoredEvaluation,
    _by_index,
    _write_examples,
    clear,
    describe_data,
    eight_bit,
    read_evaluation,
    summarize,
    with_seal,
)
from robustmail.evaluation.task import EvaluationTask, _same, _shard
from robustmail.records import AttackProgress, AttackResult
from robustmail.runtime.files import atomic_write_json, atomic_write_text, folder_lock, make_folder
from robustmail.runtime.provenance import provenance

__all__ = ["run_evaluation", "merge_shards"]

SAVE_EVERY = 20.0  # seconds


def run_evaluation(task: EvaluationTask, folder: Path, fresh: bool = False) -> Iterator[AttackProgress | AttackResult]:
    """Evaluate into a folder, or go on with what is there; the last save is at most some seconds old.

    Raises RunError for a folder of something else or one that was altered, and whatever an attack raises.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        if fresh:
            clear(folder)
        held = _resume(task, folder)
        if held and held.results["complete"] and held.results["spec"]["attacks"] == task.spec["attacks"]:
            yield from (AttackResult(**row) for row in held.results["attacks"])
            return
        if held and held.results["complete"]:  # attacks are added: until they are done, no result is whole
            atomic_write_json(folder / "results.json", with_seal({**held.results, "complete": False}))
        yield from _examine(task, folder, held)


def _examine(
    task: EvaluationTask, folder: Path, held: StoredEvaluation | None
) -> Iterator[AttackProgress | AttackResult]:
    model, part, room = task.subject.model, task.part, batch_sizer(task.subject.model, task.batch)
    began = time.perf_counter() - (held.results["provenance"]["seconds"] if held else 0.0)
    ledger = held.ledger if held else clean_pass(model, part, room, task.index)
    rows: list[AttackResult] = []

    def save(measured: dict[str, Any] | None = None, complete: bool = False) -> float:
        _save(task, folder, ledger, rows, measured, time.perf_counter() - began, complete)
        return time.monotonic()

    saved = time.monotonic()
    try:
        for what in task.plans:
            for record in run_attack(model, part, ledger, what, task.seed, room):
                saved = save() if time.monotonic() - saved >= SAVE_EVERY else saved
                yield record
            rows.append(attack_result(ledger, what, task.seed))
            yield rows[-1]
    except BaseException as stop:
        if not isinstance(stop, Exception):  # asked to stop, rather than failed
            save()
        raise
    _round(task, ledger, part, room)
    save()
    measured: dict[str, Any] | None = None
    if task.shard[0] == 1:
        for found in measure(model, task.data.part, ledger, task.eps, task.norm, task.seed, room):
            if isinstance(found, dict):
                measured = found
            else:
                yield found
    save(measured, complete=True)


def merge_shards(folders: list[Path], to: Path) -> None:
    """Put the shards of one evaluation together; the ledger is the one that a single process would have written.

    Raises RunError for shards of different evaluations, unfinished ones, or too few.
    """
    if not folders:
        raise RunError("merge", "nothing to merge", "Name the shards' folders.")
    held = [read_evaluation(folder, strict=True) for folder in folders]
    first = held[0].results
    for other in held:
        _same(first, other.results, other.folder)
        if not other.results["shard"]:
            raise RunError(str(other.folder), "is a whole evaluation, not a shard", "There is nothing to merge.")
        if not other.results["complete"]:
            raise RunError(str(other.folder), "is not finished", "Run the same command again until it is.")
        if (tried := other.results["spec"]["attacks"]) != first["spec"]["attacks"]:
            wrong = f"was attacked by {', '.join(tried)}, {held[0].folder} by {', '.join(first['spec']['attacks'])}"
            raise RunError(str(other.folder), wrong, "Run the same attacks, in the same order, on every shard.")
    there = sorted(other.results["shard"][0] for other in held)
    of = first["shard"][1]
    if there != list(range(1, of + 1)):
        said = ", ".join(map(str, there))
        raise RunError("merge", f"given the shards {said} of {of}", f"Name each of 1 ... {of} once.")
    ledger = concatenate([other.ledger for other in held])
    place = {int(index): i for i, index in enumerate(ledger.index)}
    rows = sorted((row for other in held for row in other.rows), key=lambda row: int(row["index"]))
    make_folder(to, FILES, "evaluation")
    if (to / "results.json").exists():
        raise RunError(str(to), "holds results already", "Pass another --out.")
    measured = next((other.results["measured"] for other in held if other.results["measured"]), None)
    attacks = [attack_result(ledger, AttackResult(**row), first["spec"]["seed"]) for row in first["attacks"]]
    seconds = sum(other.results["provenance"]["seconds"] for other in held)
    results = {
        **first, "n": len(ledger), "shard": None, **summarize(ledger, attacks, first["data"]["classes"], measured),
        "provenance": {**first["provenance"], "seconds": seconds, "merged": [str(other.folder) for other in held]},
    }  # fmt: skip
    originals = {place[i]: x for other in held for i, x in _by_index(other).items()}
    _write_examples(to, ledger, originals)
    atomic_write_text(to / "ledger.csv", rows_as_text(rows))
    atomic_write_json(to / "results.json", with_seal(results))


def _resume(task: EvaluationTask, folder: Path) -> StoredEvaluation | None:
    """What the folder holds of this very evaluation, or None where it holds nothing."""
    if not (folder / "results.json").exists():
        if (folder / "ledger.csv").exists():
            raise RunError(str(folder), "has a ledger, but its results.json is missing",
                           "Restore it, pass another --out, or --fresh to begin anew.")  # fmt: skip
        return None
    held = read_evaluation(folder, strict=True)
    mine = {"spec": task.spec, "weights": {"fingerprint": task.subject.fingerprint},
            "data": {"fingerprint": data_fingerprint(task.data.part)}, "shard": _shard(task)}  # fmt: skip
    _same(held.results, mine, folder, shard=True)
    before, now = held.results["spec"]["attacks"], task.spec["attacks"]
    if now[: len(before)] != before:
        raise RunError(str(folder), f"holds the attacks {', '.join(before)}, not {', '.join(now)}",
                       "Attacks can be added at the end; otherwise pass another --out, or --fresh.")  # fmt: skip
    return held


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
    task: EvaluationTask, folder: Path, ledger: Ledger, rows: list[AttackResult], measured: dict[str, Any] | None, seconds: float,
    complete: bool = False,
) -> None:  # fmt: skip
    """Examples first, then the ledger that speaks of them, then the results that sum it up: a kill in between leaves
    more than is spoken of, never less."""
    part = task.part
    _write_examples(folder, ledger, {at: part.x[at] for at in ledger.examples})
    atomic_write_text(folder / "ledger.csv", write_rows(ledger, as_floats(part.x), task.context))
    results = {
        "format": FORMAT, "kind": "evaluation", "complete": complete, "name": task.subject.name, "n": len(ledger),
        "shard": _shard(task), "spec": task.spec, "weights": task.subject.weights,
        "data": describe_data(task.data, task.subject.classes),
        **summarize(ledger, rows, task.subject.classes, measured),
        "provenance": {**provenance(task.subject.device), "seconds": round(seconds, 2), "command": task.command},
    }  # fmt: skip
    atomic_write_json(folder / "results.json", with_seal(results))
