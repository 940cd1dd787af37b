"""Accuracy by class: of every class with its interval, of the worst class, and of the worst 30 % of the classes.

Papers on class-wise robustness report these two. Both choose classes after looking, so chance lowers them: the fewer
images a class has, the more. `lowest_by_chance` says by how much where nothing but chance tells the classes apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustmail.evaluation.statistics import wilson
from robustmail.text import percent

__all__ = [
    "KINDS",
    "CLASS_METRICS",
    "CLASS_SHAPE",
    "WORST_SHAPE",
    "ClassAccuracy",
    "WorstClasses",
    "bias_note",
    "class_row",
    "lowest_by_chance",
    "read_classes",
    "tail_size",
    "worst_classes",
]

KINDS = ("natural", "robust")
"""accuracy without an attack, and under all attacks that were run"""
CLASS_METRICS = {kind: (f"{kind} worst class", f"{kind} tail 30 %") for kind in KINDS}
"""names of the accuracies in the worst class and in the tail, in tables"""
TAIL = 0.3
"""share of the classes over which the tail is a mean, as RA-Tail-30 in papers"""
MAX_IMAGES = 10**7
INTERVAL = [float]
CLASS_SHAPE = {
    "class": int, "n": int, "natural": float, "robust": float, "natural_interval?": INTERVAL,
    "robust_interval?": INTERVAL,
}  # fmt: skip
"""of a row of `per_class` in results.json, for `untrusted.check_shape`"""
WORST_SHAPE = {
    "class": int, "n": int, "accuracy": float, "interval": INTERVAL, "tail": float, "tail_classes": [int],
}  # fmt: skip
"""of an entry of `worst_classes` in results.json"""


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy in one class of n images, with its 95 % Wilson interval."""

    number: int
    n: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class WorstClasses:
    """Where the accuracy is lowest; `worst.low` and `worst.high` are of that class alone, not of a minimum."""

    worst: ClassAccuracy
    tail: float
    """mean accuracy of the worst 30 % of the classes"""
    tail_classes: tuple[int, ...]


def class_row(number: int, n: int, natural: int, robust: int) -> dict[str, Any]:
    """A row of `per_class` in results.json; natural, robust: how many of the n images of the class are right, and
    stand."""
    return {
        "class": number, "n": n, "natural": natural / n, "robust": robust / n,
        "natural_interval": list(wilson(natural, n)), "robust_interval": list(wilson(robust, n)),
    }  # fmt: skip


def tail_size(classes: int) -> int:
    """How many classes the tail has: 30 % of them, rounded, and one at least."""
    return max(1, round(TAIL * classes))


def worst_classes(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """The entry of `worst_classes` in results.json.

    rows: of `per_class`, one at least; classes without images have none. kind: one of KINDS.
    """
    ordered = sorted(rows, key=lambda row: (row[kind], row["class"]))
    tail = ordered[: tail_size(len(ordered))]
    return {
        "class": ordered[0]["class"], "n": ordered[0]["n"], "accuracy": ordered[0][kind],
        "interval": ordered[0][f"{kind}_interval"], "tail": sum(row[kind] for row in tail) / len(tail),
        "tail_classes": [row["class"] for row in tail],
    }  # fmt: skip


def read_classes(raw: Mapping[str, Any]) -> tuple[dict[str, tuple[ClassAccuracy, ...]], dict[str, WorstClasses]]:
    """(accuracies of all classes, worst classes), both by kind, of a results.json that has CLASS_SHAPE and
    WORST_SHAPE; empty where it has none. Raises ValueError: numbers that no evaluation has."""
    rows = [row for row in raw.get("per_class") or () if row["n"]]
    if any(row["n"] < 0 for row in rows) or sum(row["n"] for row in rows) > MAX_IMAGES:
        raise ValueError("the numbers of images in per_class are no evaluation's")
    if any(not 0 <= row[kind] <= 1 for row in rows for kind in KINDS):
        raise ValueError("the accuracies in per_class are no shares")
    classes = {kind: tuple(_read_class(row, kind) for row in rows) for kind in KINDS if rows}
    entries = raw.get("worst_classes") if rows else None
    worst = {
        kind: WorstClasses(
            ClassAccuracy(entry["class"], entry["n"], entry["accuracy"], *_pair(entry["interval"])),
            entry["tail"], tuple(entry["tail_classes"]),
        )
        for kind, entry in (entries or {}).items()
        if kind in KINDS
    }  # fmt: skip
    return classes, worst


def lowest_by_chance(accuracy: float, sizes: Iterable[int]) -> float:
    """The lowest accuracy that classes of these sizes show on average, if all of them have the same true accuracy.

    E[min_c X_c / n_c] with X_c ~ Binomial(n_c, accuracy), within 0.001: the integral of prod_c P(X_c / n_c >= t) over
    t in [0, 1]. accuracy: in [0, 1]. sizes: n_c, at least 1 each.
    """
    import numpy as np
    from scipy.stats import binom

    counts, repeats = np.unique(np.asarray(list(sizes)), return_counts=True)
    thousandths = np.arange(1, 1001)
    needed = -(-thousandths[:, None] * counts // 1000)  # t n_c, rounded up, in whole numbers
    return float(np.prod(binom.sf(needed - 1, counts, accuracy) ** repeats, axis=1).mean())


def bias_note(classes: Sequence[ClassAccuracy]) -> str:
    """What has to be said with the accuracy of a worst class: how many images a class has, and what chance does."""
    sizes = [c.n for c in classes]
    mean = sum(c.accuracy for c in classes) / len(classes)
    images = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    chance = percent(lowest_by_chance(mean, sizes))
    return (
        f"The worst of {len(classes):,} classes with {images} images each is biased low, the more the fewer images: "
        f"if all classes had the same true accuracy, {percent(mean)}, the worst would show {chance} on average"
    )


def _read_class(row: Mapping[str, Any], kind: str) -> ClassAccuracy:
    n, accuracy = row["n"], row[kind]
    interval = row.get(f"{kind}_interval") or wilson(round(accuracy * n), n)  # older results have none
    return ClassAccuracy(row["class"], n, accuracy, *_pair(interval))


def _pair(interval: Sequence[float]) -> tuple[float, float]:
    low, high = interval
    return low, high
