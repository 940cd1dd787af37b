"""Comparison of two evaluations of the same images, image by image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustmail.errors import RunError
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.statistics import Z80, Z95, Paired, paired
from robustmail.evaluation.storage import StoredEvaluation
from robustmail.evaluation.task import attack_differences

__all__ = ["ComparedAttack", "compare"]


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
