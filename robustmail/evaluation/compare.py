"""Comparison of two evaluations of the same images, image by image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustmail.errors import RunError
from robustmail.evaluation.class_accuracies import CLASS_METRICS, KINDS, tail_size
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.statistics import Z80, Z95, Paired, paired
from robustmail.evaluation.storage import StoredEvaluation
from robustmail.evaluation.task import attack_differences

__all__ = ["ComparedAttack", "ComparedClasses", "compare", "compare_classes"]

DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class ComparedAttack:
    """One row of a comparison."""

    name: str
    first: float
    second: float
    paired: Paired
    needed: int | None
    """about how many images tell the two apart in 80 % of all draws, (1.96 + 0.84)^2 (d - D^2) / D^2 where they differ
    by D and on a share d of the images, as here; None where they do not differ, or where so many are there"""


@dataclass(frozen=True)
class ComparedClasses:
    """Accuracy of two evaluations in the worst class, or in the worst 30 % of the classes, of each."""

    name: str
    first: float
    second: float
    difference: float
    """first - second, in [-1, 1]"""
    low: float
    """lower end of its 95 % interval"""
    high: float

    @property
    def tie(self) -> bool:
        """Can the two not be told apart at this n?"""
        return self.low <= 0 <= self.high


def compare(a: StoredEvaluation, b: StoredEvaluation) -> tuple[list[ComparedAttack], list[str]]:
    """(rows for natural accuracy, each attack that both ran, and the worst case; notes on what limits the comparison).

    Raises RunError: the two have no image in common, or other images at the same place.
    """
    first, second = _common(a, b)
    columns: dict[str, tuple[Tensor, Tensor]] = {"natural": (a.ledger.right[first], b.ledger.right[second])}
    theirs = {row["name"]: row["stages"] for row in b.results["attacks"]}
    for row in a.results["attacks"]:
        if row["name"] in theirs and row["stages"]:
            columns[row["name"]] = (_stands(a.ledger, row["stages"], first),
                                    _stands(b.ledger, theirs[row["name"]], second))  # fmt: skip
    columns["worst case"] = (a.ledger.stands[first], b.ledger.stands[second])
    return [_row(name, *pair) for name, pair in columns.items()], list(_notes(a, b, len(first)))


def compare_classes(a: StoredEvaluation, b: StoredEvaluation) -> tuple[list[ComparedClasses], str]:
    """(worst class and tail, natural and robust, over the images that both have; what has to be said with them). Each
    evaluation has worst classes of its own.

    The interval is a percentile bootstrap: images are drawn again within each class, the same for both, from a fixed
    seed. Of equal models it finds 0 to 5 in 100 different. Where one model is as good in all classes and the other is
    not, it lies too low for the first, for a minimum over resampled classes falls below the one that was seen.

    Raises RunError: as `compare`.
    """
    first, second = _common(a, b)
    labels = a.ledger.label[first]
    kinds = KINDS if a.ledger.stages and b.ledger.stages else KINDS[:1]
    stands = {"natural": (a.ledger.right, b.ledger.right), "robust": (a.ledger.stands, b.ledger.stands)}
    rows = [row for kind in kinds for row in _classes(kind, labels, stands[kind][0][first], stands[kind][1][second])]
    sizes = labels.unique(return_counts=True)[1]
    images = f"{int(sizes.min())} to {int(sizes.max())}"
    return (
        rows,
        f"worst classes are biased low, the more the fewer images a class has, here {images}; the interval is "
        "a bootstrap over the images of each class",
    )


def _classes(kind: str, labels: Tensor, first: Tensor, second: Tensor) -> Iterator[ComparedClasses]:
    # By class: how many images stand in both, in the first alone, in the second alone, in none.
    masks = (first & second, first & ~second, second & ~first, ~first & ~second)
    classes = labels.unique().tolist()
    cells = np.array([[int(((labels == c) & mask).sum()) for mask in masks] for c in classes])
    sizes, rng = cells.sum(1), np.random.default_rng(0)
    drawn = np.stack([rng.multinomial(n, cell / n, size=DRAWS) for n, cell in zip(sizes, cells, strict=True)], axis=1)
    seen, again = (_lowest(counts / sizes[:, None]) for counts in (cells[None], drawn))
    for k, name in enumerate(CLASS_METRICS[kind]):
        one, other = float(seen[0][0, k]), float(seen[1][0, k])
        low, high = np.quantile(again[0][:, k] - again[1][:, k], [0.025, 0.975]).tolist()
        yield ComparedClasses(name, one, other, one - other, low, high)


def _lowest(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each evaluation [R, 2], the accuracies of worst class and tail; shares: [R, classes, 4] of the four cells."""
    found = []
    for other in (1, 2):
        accuracy = np.sort(shares[..., 0] + shares[..., other], axis=1)
        found.append(np.stack([accuracy[:, 0], accuracy[:, : tail_size(accuracy.shape[1])].mean(1)], axis=1))
    return found[0], found[1]


def _common(a: StoredEvaluation, b: StoredEvaluation) -> tuple[Tensor, Tensor]:
    """Positions in both ledgers of the images that both have."""
    there = {int(index): at for at, index in enumerate(b.ledger.index)}
    pairs = [(at, there[int(index)]) for at, index in enumerate(a.ledger.index) if int(index) in there]
    if not pairs:
        raise RunError(f"{a.folder} and {b.folder}", "have no image in common", "Evaluate both on the same data.")
    for at, other in pairs:
        if a.rows[at]["image"] != b.rows[other]["image"] or a.rows[at]["label"] != b.rows[other]["label"]:
            raise RunError(f"{a.folder} and {b.folder}", f"image {a.rows[at]['index']} is not the same in both",
                           "Evaluate both on the same data, in the same order.")  # fmt: skip
    first, second = torch.tensor(pairs).T
    return first, second


def _stands(ledger: Ledger, stages: list[str], where: Tensor) -> Tensor:
    return ledger.standing(stages)[where]


def _row(name: str, first: Tensor, second: Tensor) -> ComparedAttack:
    n = len(first)
    found = paired(n, int((first & ~second).sum()), int((second & ~first).sum()))
    needed = None
    if found.difference:
        differ = (found.only_first + found.only_second) / n
        enough = math.ceil((Z95 + Z80) ** 2 * (differ - found.difference**2) / found.difference**2)
        needed = enough if enough > n else None
    return ComparedAttack(name, first.double().mean().item(), second.double().mean().item(), found, needed)


def _notes(a: StoredEvaluation, b: StoredEvaluation, n: int) -> list[str]:
    notes = []
    for what in ("eps", "norm", "seed"):
        one, other = a.results["spec"][what], b.results["spec"][what]
        if one != other:
            notes.append(f"{what} differs: {one} and {other}" + ("; not the same question" if what != "seed" else ""))
    for name, one, other in attack_differences(a.results["spec"], b.results["spec"]):
        notes.append(f"{name} is another attack in each: {one} and {other}")
    if n < max(len(a.ledger), len(b.ledger)):
        notes.append(f"only the {n} images that both have are compared, of {len(a.ledger)} and {len(b.ledger)}")
    notes += [f"{held.folder} is not finished" for held in (a, b) if not held.results["complete"]]
    if [r["name"] for r in a.results["attacks"]] != [r["name"] for r in b.results["attacks"]]:
        notes.append("the worst case is over different attacks")
    return notes
