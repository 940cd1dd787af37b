"""Accuracy by eps: one evaluation for each eps, in folders of their own, and the curve that follows from them."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robustmail.errors import RunError
from robustmail.evaluation.evaluator import accuracy_row
from robustmail.evaluation.results import Results, read_results
from robustmail.evaluation.runner import run_evaluation
from robustmail.evaluation.task import EvaluationTask
from robustmail.fields import describe
from robustmail.records import ATTACKED, AttackProgress, AttackResult
from robustmail.runtime.files import atomic_write_json, folder_lock, make_folder
from robustmail.runtime.untrusted import check_shape, read_json

__all__ = ["FILES", "curve_folders", "eps_folder", "is_curve", "read_curve", "run_curve"]

NAME = "curve.json"
FILES = (NAME, "curve.csv", "curve.png", "curve.svg", "lock")
FORMAT = 1
POINT = {"eps": float, "attacks": [ATTACKED], "worst_case": ATTACKED, "light": (None, str)}
SHAPE = {"format": int, "kind": str, "name": str, "norm": str, "n": int, "seed": int, "points": [POINT]}


def run_curve(
    tasks: Sequence[EvaluationTask], folder: Path, fresh: bool = False, at_zero: bool = False
) -> Generator[AttackProgress | AttackResult, None, None]:
    """Evaluate at each eps into folder/eps-..., smallest first, then write curve.json; resumes what was stopped.

    What broke an image at a smaller eps breaks it at a larger one: its example lies in the larger ball too, and is
    taken over. So no accuracy rises with eps.
    tasks: the same evaluation at several eps, smallest first. folder: made if needed. fresh: begin anew.
    at_zero: whether the curve begins at eps 0, the accuracy on the clean images.
    Raises RunError: the folder holds something else, or one of the evaluations another one.
    """
    make_folder(folder, FILES, "curve")
    with folder_lock(folder):
        smaller = None
        for task in tasks:
            inside = folder / eps_folder(task.eps)
            yield from run_evaluation(task, inside, fresh, smaller)
            smaller = inside
        atomic_write_json(folder / NAME, _curve([folder / eps_folder(task.eps) for task in tasks], at_zero))


def eps_folder(eps: float) -> str:
    """The name of the folder of one eps: eps-8-255, eps-0.031."""
    return f"eps-{describe(float(eps)).replace('/', '-')}"


def is_curve(folder: Path) -> bool:
    """Whether the folder holds a curve."""
    return (folder / NAME).is_file()


def read_curve(folder: Path) -> dict[str, Any]:
    """The content of curve.json, which anybody may have written.

    Raises RunError: it is missing, damaged, or does not follow from the evaluations beside it.
    """
    path = folder / NAME
    try:
        found = read_json(path)
        check_shape(found, SHAPE)
        points = found["points"]
        if found["format"] != FORMAT or not points:
            raise ValueError("another format, or no points")
    except (OSError, ValueError) as error:
        raise RunError(str(path), f"cannot be read ({error})", "The command that made it writes it again.") from error
    inside = [folder / eps_folder(point["eps"]) for point in points if point["eps"] > 0]
    if not inside or found != _curve(inside, points[0]["eps"] == 0):
        raise RunError(str(path), "does not follow from the evaluations beside it: one of them was altered",
                       "The command that made it writes it again.")  # fmt: skip
    return dict(found)


def curve_folders(folder: Path) -> list[Path]:
    """The folders of the evaluations of a curve, smallest eps first. Raises RunError as `read_curve`."""
    return [folder / eps_folder(point["eps"]) for point in read_curve(folder)["points"] if point["eps"] > 0]


def _curve(folders: list[Path], at_zero: bool) -> dict[str, Any]:
    """The content of curve.json: a point for each evaluation, and one for the clean images."""
    every = [read_results(folder) for folder in folders]
    last = every[-1]
    points = [_clean_point(last)] if at_zero else []
    points += [
        {
            "eps": r.eps, "attacks": [_plain(row) for row in r.attacks], "worst_case": _plain(r.quoted),
            "light": r.light and r.light.colour,
        }
        for r in every
    ]  # fmt: skip
    return {"format": FORMAT, "kind": "curve", "name": last.name, "norm": last.norm, "n": last.n,
            "seed": last.seed or 0, "points": points}  # fmt: skip


def _clean_point(r: Results) -> dict[str, Any]:
    """At eps 0 every attack leaves the clean images as they are."""
    found = [int(count) for row in r.attacks if (count := _before_attack(row)) is not None]
    if not found:
        raise RunError(r.name, "has no attack, so that there is no curve", "Name an attack besides nat.")
    clean = {**_plain(accuracy_row("nat", found[0], r.n)), "seconds": 0.0}
    rows = [{**clean, "name": row.name} for row in r.attacks]
    return {"eps": 0.0, "attacks": rows, "worst_case": {**clean, "name": "worst case"}, "light": None}


def _before_attack(row: AttackResult) -> str | None:
    """How many images were right before the attack, as its settings say: `60 after natural, 58 after pgd20`."""
    match = re.match(r"(\d+) after natural", row.settings.get("standing", ""))
    return match[1] if match else None


def _plain(row: AttackResult | None) -> dict[str, Any]:
    return {} if row is None else {k: v for k, v in asdict(row).items() if k not in ("settings", "stages")}
