"""The files of an evaluation: written, read back, sealed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmail.data.dataset import tensor_hash
from robustmail.errors import RunError, in_brief
from robustmail.evaluation.evaluator import accuracy_row, as_floats, worst_case
from robustmail.evaluation.examples import PARTS, WHOLE, load_examples
from robustmail.evaluation.ledger import BROKE, UNTRIED, Ledger, read_rows, row_seal, rows_as_text
from robustmail.evaluation.results import refuse_old_run
from robustmail.evaluation.sanity_checks import curve, judge
from robustmail.evaluation.task import context_of
from robustmail.norms import Norm, distances, tolerance
from robustmail.records import ATTACKED, AttackResult
from robustmail.runtime.files import atomic_write, check_folder, make_folder, remove
from robustmail.runtime.untrusted import check_shape, read_json, read_text

__all__ = [
    "FILES",
    "FORMAT",
    "QUANTILES",
    "with_seal",
    "StoredEvaluation",
    "write_pngs",
    "read_evaluation",
    "clear",
    "eight_bit",
    "summarize",
    "summed_again",
    "SHAPE",
    "MOST",
    "SPEC",
]


MOST = 10**7  # images or classes
SPEC = {
    "checkpoint": (None, str), "weights": (None, str), "model": str, "normalize": (None, str), "source": (None, str),
    "data": str, "data_given": (None, str), "attacks": [str], "own": {"*": str}, "eps": float, "norm": str, "n": int,
    "seed": int,
}  # fmt: skip
SHAPE = {
    "format": int, "kind": str, "complete": bool, "name": str, "n": int, "shard": (None, [int]), "spec": SPEC,
    "weights": {"file": (None, str), "sha256": (None, str), "fingerprint": str},
    "data": {"name": str, "classes": int, "class_names": (None, [str]), "shape": [int], "fingerprint": str},
    "attacks": [ATTACKED], "measured": (None, dict), "seconds": {"*": float},
    "provenance": {"seconds": float, "command": str},
}  # fmt: skip
"""What is read of an evaluation's results.json, which anybody may have written"""

FILES = ("results.json", "ledger.csv", WHOLE, PARTS, "report.html", "png", "lock")


FORMAT = 3  # raised whenever older folders can no longer be judged by what is written here


QUANTILES = 5


def with_seal(results: dict[str, Any]) -> dict[str, Any]:
    """The results with a hash of all that they say."""
    content = {name: value for name, value in results.items() if name != "seal"}
    return {**content, "seal": row_seal([json.dumps(content, sort_keys=True)], "results")}


@dataclass(frozen=True)
class StoredEvaluation:
    """What a folder holds: the results as they are written, the ledger with its examples, and its rows."""

    folder: Path
    results: dict[str, Any]
    ledger: Ledger
    rows: list[dict[str, str]]
    originals: dict[int, Tensor]
    stored: tuple[int, ...]
    """the images of which there are examples in the file, whether the ledger speaks of them or not"""


def write_pngs(folder: Path) -> int:
    """Write every example as png/INDEX.png, of whole 255ths inside the ball; how many there are."""
    from PIL import Image

    held = read_evaluation(folder)
    spec = held.results["spec"]
    if (folder / "png").is_symlink():
        raise RunError(str(folder / "png"), "is a symbolic link", "Delete it.")
    clear_pngs(folder)  # of images that may stand now
    make_folder(folder / "png")
    for at, found in held.ledger.examples.items():
        clean = as_floats(held.originals[at])[None]
        pixels = (eight_bit(clean, found[None], spec["eps"], spec["norm"])[0] * 255).round().to(torch.uint8)
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
        path = folder / "png" / f"{int(held.ledger.index[at]):05d}.png"
        atomic_write(path, partial(image.save, format="PNG"))
    return len(held.ledger.examples)


def read_evaluation(folder: Path, strict: bool = False) -> StoredEvaluation:
    """The files of an evaluation; `strict`: every row must still bear its seal.

    Raises RunError, naming the row, for one that is missing, damaged or altered.
    """
    path = folder / "results.json"
    try:
        results = read_json(path)
        refuse_old_run(results, path)
        if results["format"] != FORMAT:
            age = "an older" if isinstance(results["format"], int) and results["format"] < FORMAT else "another"
            wrong = f"was made by {age} version (format {results['format']}, this one reads {FORMAT})"
            raise RunError(str(path), wrong, "Evaluate again into another folder, or read it with that version.")
        if results["kind"] != "evaluation":
            raise RunError(str(path), f"is of kind {results['kind']!r}, not an evaluation's")
        check_sizes(results)
        context = context_of(results["weights"]["fingerprint"], results["spec"])
        for row in results["attacks"]:
            AttackResult(**row)
    except FileNotFoundError as error:
        raise RunError(str(folder), "holds no evaluation", "Make one with robustmail eval.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(str(path), f"damaged, or not an evaluation's ({type(error).__name__}: {error})") from error
    try:
        text = read_text(folder / "ledger.csv")
    except (OSError, ValueError) as error:
        raise RunError(str(folder / "ledger.csv"), f"cannot be read ({error})") from error
    if "\r" in text:
        raise RunError(str(folder / "ledger.csv"), "is not written as robustmail writes it: other line ends")
    ledger, rows = read_rows(str(folder / "ledger.csv"), text)
    if strict:
        for k, row in enumerate(rows):
            *values, said = row.values()
            if row_seal(values, context) != said:
                raise RunError(
                    f"{folder / 'ledger.csv'}, row {k + 1} (image {row['index']})",
                    "its seal is broken: the row, the eps or the weights were altered",
                )
    if strict and rows_as_text(rows) != text:
        raise RunError(str(folder / "ledger.csv"), "is not written as robustmail writes it: it was altered")
    if strict and with_seal(results) != results:
        raise RunError(str(path), "its seal is broken: it was altered")
    ledger.seconds = {str(stage): float(s) for stage, s in results["seconds"].items()}
    originals, stored = _read_examples(folder, ledger, rows)
    return StoredEvaluation(folder, results, ledger, rows, originals, stored)


def clear(folder: Path, kind: str = "evaluation") -> None:
    """Delete what an evaluation left in its folder, the results first: nothing may stand in them that is gone.

    kind: of the folder; "run" for that of a training run. Raises RunError for a folder of another kind.
    """
    if not folder.is_dir():
        return
    check_folder(folder, FILES, kind)
    remove(folder, ("results.json", "ledger.csv", WHOLE, "report.html"))
    shutil.rmtree(folder / PARTS, ignore_errors=True)  # which follows no link
    clear_pngs(folder)


def eight_bit(x: Tensor, found: Tensor, eps: float, norm: Norm) -> Tensor:
    """The nearest images of whole 255ths; in l-inf the nearest inside the ball. In l2, where these lie outside, the
    perturbation is shortened by hundredths until they do not: with none left, they are the original's."""
    rounded = (found * 255).round()
    if norm == "linf":
        low, high = ((x - eps) * 255 - 1e-3).ceil(), ((x + eps) * 255 + 1e-3).floor()
        rounded = rounded.clamp(low.where(low <= high, rounded), high.where(low <= high, rounded))
    else:
        for hundredths in range(99, -1, -1):
            outside = distances(x, (rounded / 255).clamp(0, 1), norm) > eps + tolerance(eps)
            if not outside.any():
                break
            rounded[outside] = ((x + hundredths / 100 * (found - x)) * 255).round()[outside]
    return (rounded / 255).clamp(0, 1)


def summarize(
    ledger: Ledger, rows: list[AttackResult], classes: int, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything that follows from the ledger and from what was measured on the model."""
    pgd = [stage for stage in ledger.stages if stage.startswith("pgd") and stage[3:].isdigit()]
    bytes_ = None
    if (ledger.rounded != UNTRIED).any():
        stands = ledger.right & (ledger.rounded != BROKE)
        bytes_ = asdict(accuracy_row("worst case, 8-bit", int(stands.sum()), len(ledger)))
    return {
        "attacks": [asdict(row) for row in rows], "worst_case": asdict(worst_case(ledger)), "eight_bit": bytes_,
        "per_class": _per_class(ledger, classes), "margins": _by_margin(ledger),
        "curve": curve(measured) if measured else None, "believable": judge(measured, ledger, pgd, classes),
        "measured": measured, "seconds": {k: round(v, 3) for k, v in ledger.seconds.items()},
    }  # fmt: skip


def _per_class(ledger: Ledger, classes: int) -> list[dict[str, Any]]:
    found = []
    for c in range(classes):
        mine = ledger.label == c
        if n := int(mine.sum()):
            natural, robust = (int((mask & mine).sum()) / n for mask in (ledger.right, ledger.stands))
            found.append({"class": c, "n": n, "natural": natural, "robust": robust})
    return found


def _by_margin(ledger: Ledger) -> list[dict[str, Any]]:
    """Accuracies in quantiles of the clean margin, smallest first."""
    found = []
    for some in ledger.margin.argsort(stable=True).tensor_split(min(QUANTILES, len(ledger))):
        margin, n = ledger.margin[some], len(some)
        natural, robust = (int(mask[some].sum()) / n for mask in (ledger.right, ledger.stands))
        low, high = (round(float(v), 6) for v in (margin.min(), margin.max()))
        found.append({"low": low, "high": high, "n": n, "natural": natural, "robust": robust})
    return found


def _read_examples(
    folder: Path, ledger: Ledger, rows: list[dict[str, str]]
) -> tuple[dict[int, Tensor], tuple[int, ...]]:
    """Put the examples into the ledger whose rows speak of them; the originals of these, by position, and all
    images of which the file has an example.

    Raises RunError, naming the row, where one is missing or is not the one that was written.
    """
    found = load_examples(folder)
    originals = {}
    for at, row in enumerate(rows):
        if not row["example"]:
            continue
        who = f"{folder / 'ledger.csv'}, row {at + 1} (image {row['index']})"
        if int(row["index"]) not in found:
            raise RunError(who, "its example is missing")
        x, clean = found[int(row["index"])]
        if tensor_hash(x) != row["example"]:
            raise RunError(who, "its example was altered")
        if tensor_hash(as_floats(clean)) != row["image"]:
            raise RunError(who, "its original image was altered")
        ledger.examples[at], originals[at] = x, clean
    return originals, tuple(found)


def _by_index(held: StoredEvaluation) -> dict[int, Tensor]:
    return {int(held.ledger.index[at]): x for at, x in held.originals.items()}


def clear_pngs(folder: Path) -> None:
    """Delete what `write_pngs` wrote; whatever else lies there stays, and so does its folder then."""
    there = folder / "png"
    if not there.is_dir() or there.is_symlink():
        return
    remove(there, [path.name for path in there.iterdir() if re.fullmatch(r"\d{5,}\.png", path.name)])
    if not any(there.iterdir()):
        there.rmdir()


def check_sizes(results: dict[str, Any]) -> None:
    """Refuse results.json where a part is missing, of another type, or larger than any evaluation (ValueError)."""
    check_shape(results, SHAPE)
    n, shard = results["spec"]["n"], results["shard"]
    if not (1 <= n <= MOST and 1 <= results["data"]["classes"] <= MOST and results["spec"]["eps"] > 0):
        raise ValueError("the numbers of images or classes, or eps, are no evaluation's")
    if shard is not None and not (len(shard) == 2 and 1 <= shard[0] <= shard[1] <= n):
        raise ValueError(f"there is no shard {shard}")


def summed_again(
    folder: Path, ledger: Ledger, rows: list[AttackResult], classes: int, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """As `summarize`. Raises RunError where `measured` is not what an evaluation measures."""
    try:
        return summarize(ledger, rows, classes, measured)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RunError(str(folder / "results.json"), f"is damaged or was altered ({in_brief(error)})") from error
