"""Accuracy on corrupted images, by corruption and severity, into a folder; no attack is run."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from robustmail.data.corruptions import COMMON, CorruptedSet
from robustmail.data.image_files import Preprocess, data_fingerprint
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.evaluator import accuracy_row, batch_sizer, clean_pass
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.records import CorruptionRow
from robustmail.runtime.files import atomic_write_json, folder_lock, make_folder
from robustmail.runtime.provenance import provenance
from robustmail.runtime.untrusted import check_shape, read_json

__all__ = ["FILES", "CorruptionTask", "corruption_means", "evaluate_corruptions"]

FILES = ("corruptions.json", "corruptions.csv", "corruptions.png", "corruptions.svg", "lock")
FORMAT = 1
ROW = {"corruption": str, "severity": int, "correct": int, "n": int, "accuracy": float, "low": float, "high": float,
       "fingerprint": str}  # fmt: skip


@dataclass(frozen=True)
class CorruptionTask:
    """What is evaluated.

    subject: the model.
    clean: the images without corruption, to compare with; as many as are evaluated of each corrupted set.
    sets: the corrupted images.
    name: of the corrupted images, for people; says so where they were made here.
    n: images of each set; by default all.
    preprocess: how image files that are not of the model's size are resized.
    seed: of images that are made here.
    """

    subject: LoadedModel
    clean: TestSet
    sets: Sequence[CorruptedSet]
    name: str
    n: int | None = None
    preprocess: Preprocess | None = None
    seed: int = 0

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the evaluation, in plain values."""
        return {
            **self.subject.spec, "weights_fingerprint": self.subject.fingerprint, "data": self.clean.name,
            "corruptions": self.name, "n": self.n, "seed": self.seed,
            "preprocess": asdict(self.preprocess) if self.preprocess else None,
        }  # fmt: skip


def evaluate_corruptions(
    task: CorruptionTask, folder: Path, fresh: bool = False, command: str = ""
) -> Generator[CorruptionRow, None, None]:
    """Measure the accuracy under each corruption and severity; yields a row for the clean images, then one for each.

    folder: for corruptions.json, written after each row; the same task goes on where it was stopped. fresh: begin anew.
    Raises RunError: the folder holds another evaluation. Raises DataError: a set cannot be read.
    """
    make_folder(folder, FILES, "corruptions")
    with folder_lock(folder):
        path = folder / "corruptions.json"
        rows = {} if fresh or not path.exists() else _stored(path, task.spec)
        clean = CorruptedSet("clean", 0, lambda: task.clean)
        for corrupted in (clean, *task.sets):
            key = corrupted.corruption, corrupted.severity
            if key not in rows:
                rows[key] = _row(task, corrupted)
                _save(path, task, rows, command)
            yield rows[key]


def corruption_means(rows: Sequence[CorruptionRow]) -> dict[str, float]:
    """Mean accuracy over the severities of each corruption, by name, and over the corruptions:
    "mean, 15 of 15" over those that papers count (COMMON), and "mean, all 19" where there are more."""
    by_name: dict[str, list[float]] = {}
    for row in rows:
        if row.severity:
            by_name.setdefault(row.corruption, []).append(row.accuracy)
    found = {name: sum(values) / len(values) for name, values in by_name.items()}
    if not found:
        return {}
    common = [found[name] for name in COMMON if name in found]
    if common:
        found[f"mean, {len(common)} of {len(COMMON)}"] = sum(common) / len(common)
    if len(by_name) > len(common):
        everything = [found[name] for name in by_name]
        found[f"mean, all {len(everything)}"] = sum(everything) / len(everything)
    return found


def _row(task: CorruptionTask, corrupted: CorruptedSet) -> CorruptionRow:
    images = corrupted.load()
    images = images.first(task.n).checked(task.preprocess, fixed=True) if corrupted.severity else images
    ledger = clean_pass(task.subject.model, images.part, batch_sizer(task.subject.model, images.part))
    row = accuracy_row(corrupted.corruption, int(ledger.right.sum()), len(ledger))
    return CorruptionRow(corrupted.corruption, corrupted.severity, row.correct, row.n, row.accuracy, row.low, row.high,
                         data_fingerprint(images.part))  # fmt: skip


def _save(path: Path, task: CorruptionTask, rows: dict[tuple[str, int], CorruptionRow], command: str) -> None:
    found = list(rows.values())
    complete = len(found) == len(task.sets) + 1
    atomic_write_json(path, {
        "format": FORMAT, "kind": "corruptions", "complete": complete, "spec": task.spec,
        "rows": [asdict(row) for row in found], "means": corruption_means(found),
        "provenance": {**provenance(task.subject.device), "command": command},
    })  # fmt: skip


def _stored(path: Path, spec: dict[str, Any]) -> dict[tuple[str, int], CorruptionRow]:
    """The rows of an evaluation that was stopped. Raises RunError: it is another one, or damaged."""
    try:
        stored = read_json(path)
        check_shape(stored, {"format": int, "spec": dict, "rows": [ROW]})
        rows = [CorruptionRow(**row) for row in stored["rows"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(str(path), f"damaged ({error})", "Pass --fresh to begin anew, or another --out.") from error
    differing = [key for key in {**spec, **stored["spec"]} if spec.get(key) != stored["spec"].get(key)]
    if differing or stored["format"] != FORMAT:
        wrong = f"holds another evaluation ({', '.join(differing) or 'another format'} differ)"
        raise RunError(str(path), wrong, "Pass another --out, or --fresh to begin anew.")
    return {(row.corruption, row.severity): row for row in rows}
