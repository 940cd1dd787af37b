"""An evaluation in a folder: started, resumed after any interruption, split into shards."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from robustmail.data.image_files import LabelledImages
from robustmail.errors import RunError
from robustmail.evaluation.evaluator import (
    attack_result,
    batch_sizer,
    clean_pass,
    image_batch,
    run_attack,
)
from robustmail.evaluation.exact_inference import BatchSizer
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
from robustmail.evaluation.task import EvaluationTask, check_same, shard_of
from robustmail.records import AttackProgress, AttackResult
from robustmail.runtime.files import atomic_write_json, atomic_write_text, check_folder, folder_lock, make_folder
from robustmail.runtime.provenance import provenance
from robustmail.runtime.untrusted import read_json

__all__ = ["continue_evaluation", "evaluation_status", "open_shard", "open_whole", "run_evaluation"]

SAVE_EVERY = 20.0  # seconds


def run_evaluation(
    task: EvaluationTask, folder: Path, fresh: bool = False, smaller: Path | None = None
) -> Generator[AttackProgress | AttackResult, None, None]:
    """Evaluate into a folder, or resume the evaluation in it; yields progress, and a result for each attack.

    task: the evaluation. folder: created if needed; saved every SAVE_EVERY seconds, so that a kill loses no more.
    fresh: delete what an earlier evaluation left in the folder. smaller: the folder of the same evaluation in a smaller
    ball: what broke an image there breaks it here.
    Raises RunError: the folder holds another evaluation or other files, or was altered. Raises whatever an attack
    raises.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        if fresh:
            clear(folder)
        yield from continue_evaluation(task, folder, smaller)


def continue_evaluation(
    task: EvaluationTask, folder: Path, smaller: Path | None = None
) -> Generator[AttackProgress | AttackResult, None, None]:
    """As `run_evaluation`, in a folder that the caller has made and locked."""
    stored = _open(task, folder, fresh=False)
    known = read_evaluation(smaller, strict=True).ledger if smaller else None
    is_new = bool(stored and known and stored.ledger.take_over(known))
    if stored and stored.results["complete"] and not is_new:
        yield from (AttackResult(**row) for row in stored.results["attacks"])
        return
    yield from _evaluate(task, folder, stored, known)


def evaluation_status(task: EvaluationTask, folder: Path, fresh: bool = False) -> str:
    """What `run_evaluation` would do in the folder: "new", "continue", "finished", or "replace" (with `fresh`). Reads
    only. Raises RunError as `run_evaluation`."""
    if not folder.exists():
        return "new"
    check_folder(folder, FILES, "evaluation")
    if fresh:
        return "replace"
    if (stored := _resume(task, folder)) is None:
        return "new"
    is_same = stored.results["spec"]["attacks"] == task.spec["attacks"]
    return "finished" if stored.results["complete"] and is_same else "continue"


def open_whole(task: EvaluationTask, folder: Path, fresh: bool = False) -> bool:
    """Whether the folder holds the whole evaluation, of which `task` is a shard, and it is complete.

    Raises RunError: the folder holds another evaluation, or other files.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        stored = _open(replace(task, shard=(1, 1)), folder, fresh)
    return stored is not None and stored.results["complete"]


def open_shard(task: EvaluationTask, folder: Path, whole: Path, fresh: bool = False) -> None:
    """Start a shard with the outcomes that the whole evaluation has for its images, unless the shard is started
    already.

    task: the shard. folder: of the shard. whole: folder of the whole evaluation. fresh: delete an earlier shard.
    Raises RunError: one of the folders holds another evaluation, or other files.
    """
    make_folder(folder, FILES, "evaluation")
    with folder_lock(folder):
        if _open(task, folder, fresh) is None and (stored := _resume(replace(task, shard=(1, 1)), whole)):
            _save(task, folder, stored.ledger.take(task.index), [], None, 0.0)


def _open(task: EvaluationTask, folder: Path, fresh: bool) -> StoredEvaluation | None:
    """What the folder holds of this evaluation; `complete` only if all attacks of the task are done."""
    if fresh:
        clear(folder)
    stored = _resume(task, folder)
    if stored and stored.results["complete"] and stored.results["spec"]["attacks"] != task.spec["attacks"]:
        stored.results["complete"] = False  # attacks were added
        atomic_write_json(folder / "results.json", with_seal(stored.results))
    return stored


def _evaluate(
    task: EvaluationTask, folder: Path, stored: StoredEvaluation | None, smaller: Ledger | None = None
) -> Iterator[AttackProgress | AttackResult]:
    """Run what is left to do, and save at intervals, at the end, and when interrupted.

    stored: what was done before. smaller: what is known from a smaller ball, which a new evaluation begins with.
    """
    model, part, sizer = task.subject.model, task.part, batch_sizer(task.subject.model, task.part, task.batch)
    start_time = time.perf_counter() - (stored.results["provenance"]["seconds"] if stored else 0.0)
    ledger = stored.ledger if stored else _first_ledger(task, sizer, smaller)
    on_disk = {i: row["example"] for i, row in enumerate(stored.rows) if row["example"]} if stored else {}
    rows: list[AttackResult] = []
    measured: dict[str, Any] | None = None

    def save(complete: bool = False) -> float:
        _save(task, folder, ledger, rows, measured, time.perf_counter() - start_time, complete, on_disk)
        return time.monotonic()

    last_save = time.monotonic()
    try:
        for spec in task.attack_specs:
            for record in run_attack(model, part, ledger, spec, task.seed, sizer):
                last_save = save() if time.monotonic() - last_save >= SAVE_EVERY else last_save
                yield record
            rows.append(attack_result(ledger, spec, task.seed))
            yield rows[-1]
        _check_rounded(task, ledger, part, sizer)
        save()
        for measurement in _measure(task, ledger, sizer):
            if isinstance(measurement, dict):
                measured = measurement
            else:
                yield measurement
    except BaseException as stop:
        if not isinstance(stop, Exception):  # interrupted, not failed
            save()
        raise
    save(complete=True)


def _first_ledger(task: EvaluationTask, sizer: BatchSizer, smaller: Ledger | None) -> Ledger:
    if smaller is None:
        return clean_pass(task.subject.model, task.part, sizer, task.index)
    ledger = smaller.unattacked()
    ledger.take_over(smaller)
    return ledger


def _measure(task: EvaluationTask, ledger: Ledger, sizer: BatchSizer) -> Iterator[AttackProgress | dict[str, Any]]:
    """The sanity checks' measurements, which the first shard makes for all."""
    is_attacked = any(spec.stages for spec in task.attack_specs)
    if task.shard[0] != 1 or not (is_attacked or task.training is None):  # a run may be evaluated on clean images alone
        return
    for record in measure(task.subject.model, task.data.part, ledger, task.eps, task.norm, task.seed, sizer):
        if isinstance(record, dict):
            weights = task.weigh(task.subject.model, task.data.part, sizer) if task.weigh else []
            record = {**record, "doubts": list(task.subject.doubts), "weights": weights}
        yield record


def _resume(task: EvaluationTask, folder: Path) -> StoredEvaluation | None:
    """What the folder holds of this evaluation, or None if it holds nothing."""
    if not (folder / "results.json").exists():
        if (folder / "ledger.csv").exists():
            raise RunError(str(folder), "has a ledger, but its results.json is missing",
                           "Restore it, pass another --out, or --fresh to begin anew.")  # fmt: skip
        return None
    if not (folder / "ledger.csv").exists() and _is_first_save(folder):
        return None
    stored = read_evaluation(folder, strict=True)
    wanted = {"spec": task.spec, "weights": {"fingerprint": task.subject.fingerprint},
              "data": task.data_info, "shard": shard_of(task)}  # fmt: skip
    check_same(stored.results, wanted, folder, shard=True)
    before, now = stored.results["spec"]["attacks"], task.spec["attacks"]
    if now[: len(before)] != before:
        raise RunError(str(folder), f"holds the attacks {', '.join(before)}, not {', '.join(now)}",
                       "Attacks can be added at the end; otherwise pass another --out, or --fresh.")  # fmt: skip
    return stored


def _is_first_save(folder: Path) -> bool:
    """Whether a process was killed within its first save, before any outcome was written."""
    try:
        return read_json(folder / "results.json")["complete"] is False
    except (OSError, ValueError, LookupError, TypeError):  # read_evaluation reports what is wrong
        return False


def _check_rounded(task: EvaluationTask, ledger: Ledger, part: LabelledImages, sizer: BatchSizer) -> None:
    """Enter into the ledger which examples still break their image when they are rounded to 8 bits inside the ball."""
    positions = [i for i in sorted(ledger.examples) if int(ledger.rounded[i]) == UNTRIED]
    where = torch.tensor(positions, dtype=torch.int64)
    for batch in where.split(sizer.max_batch) if len(where) else ():
        x, y = image_batch(task.subject.model, part, batch)
        x_adv = torch.stack([ledger.examples[int(i)] for i in batch]).to(x)
        rounded = eight_bit(x, x_adv, task.eps, task.norm)
        with sizer.exact_inference(task.subject.model, x[:1]) as view, torch.no_grad():
            is_wrong = view(rounded).argmax(1) != y
        is_broken = is_wrong & task.attack_specs[0].in_ball(x, rounded)
        ledger.rounded[batch] = torch.where(is_broken.cpu(), BROKE, STOOD).to(torch.int8)


def _save(
    task: EvaluationTask,
    folder: Path,
    ledger: Ledger,
    rows: list[AttackResult],
    measured: dict[str, Any] | None,
    seconds: float,
    complete: bool = False,
    on_disk: dict[int, str] | None = None,
) -> None:
    """Write examples, then the ledger, then the results: a kill in between may leave examples of which the ledger does
    not know, never a missing one. on_disk: examples that the folder has already, position -> hash."""
    on_disk = {} if on_disk is None else on_disk
    results = {
        "format": FORMAT, "kind": "evaluation", "complete": complete, "name": task.subject.name, "n": len(ledger),
        "shard": shard_of(task), "spec": task.spec, "weights": task.subject.weights, "data": task.data_info,
        **summarize(ledger, rows, task.subject.classes, measured),
        **({} if task.training is None else {"training": task.training}),
        "provenance": {
            **provenance(task.subject.device), **task.provenance, "seconds": round(seconds, 2), "command": task.command,
        },
    }  # fmt: skip
    path = folder / "results.json"
    if not path.exists():  # otherwise a kill before the last line would leave a ledger without its spec
        atomic_write_json(path, with_seal({**results, "complete": False}))
    add_examples(folder, ledger, task.part.x, on_disk, complete)
    atomic_write_text(folder / "ledger.csv", write_rows(ledger, task.image_hashes, on_disk, task.context))
    atomic_write_json(path, with_seal(results))
