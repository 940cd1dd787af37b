"""The files of an evaluation: results.json, ledger.csv, examples and PNGs; written, read and sealed."""

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
from robustmail.evaluation.attack_specs import pgd_runs
from robustmail.evaluation.class_accuracies import KINDS, class_row, worst_classes
from robustmail.evaluation.evaluator import accuracy_row, as_floats, worst_case
from robustmail.evaluation.examples import PARTS, WHOLE, load_examples
from robustmail.evaluation.ledger import BROKE, UNTRIED, Ledger, read_rows, row_seal, rows_as_text
from robustmail.evaluation.quantiles import by_margin, by_weight
from robustmail.evaluation.results import refuse_old_run
from robustmail.evaluation.sanity_checks import curve, judge
from robustmail.evaluation.stored_images import StoredImages
from robustmail.evaluation.task import context_of
from robustmail.norms import Norm, distances, tolerance
from robustmail.records import ATTACKED, AttackResult
from robustmail.runtime.files import atomic_write, check_folder, make_folder, remove
from robustmail.runtime.untrusted import check_shape, read_json, read_text

__all__ = [
    "FILES",
    "FORMAT",
    "with_seal",
    "StoredEvaluation",
    "write_pngs",
    "read_evaluation",
    "clear",
    "eight_bit",
    "summarize",
    "summed_again",
    "SHAPE",
    "MAX_COUNT",
    "SPEC",
]


MAX_COUNT = 10**7  # images or classes
SPEC = {
    "checkpoint": (None, str), "weights": (None, str), "model": str, "normalize": (None, str), "source": (None, str),
    "data": str, "data_given": (None, str), "attacks": [str], "own": {"*": str}, "eps": float, "norm": str, "n": int,
    "seed": int, "ignore_unused?": bool,
    "preprocess?": {"resize": (None, int), "crop": (None, int), "interpolation": str, "squash": bool},
}  # fmt: skip
SHAPE = {
    "format": int, "kind": str, "complete": bool, "name": str, "n": int, "shard": (None, [int]), "spec": SPEC,
    "weights": {"file": (None, str), "sha256": (None, str), "fingerprint": str},
    "data": {"name": str, "classes": int, "class_names": (None, [str]), "shape": [int], "fingerprint": str},
    "attacks": [ATTACKED], "measured": (None, dict), "seconds": {"*": float},
    "provenance": {"seconds": float, "command": str},
}  # fmt: skip
"""types of what is read from results.json, which anybody may have written"""

FILES = ("results.json", "ledger.csv", WHOLE, PARTS, "report.html", "png", "lock")
FORMAT = 5  # goes up whenever this version cannot check the folders of the one before


def with_seal(results: dict[str, Any]) -> dict[str, Any]:
    """The results with a hash of their content, which betrays a change."""
    content = {name: value for name, value in results.items() if name != "seal"}
    return {**content, "seal": row_seal([json.dumps(content, sort_keys=True)], "results")}


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation as read from its folder.

    folder: where it is. results: the content of results.json. ledger: with its examples. rows: of ledger.csv, as text.
    originals: the clean images of the ledger's examples, by position. stored: indices of all images with an example in
    the file, also of examples that the ledger does not know yet.
    """

    folder: Path
    results: dict[str, Any]
    ledger: Ledger
    rows: list[dict[str, str]]
    originals: StoredImages
    stored: tuple[int, ...]

    @property
    def originals_by_index(self) -> StoredImages:
        """The clean images of the examples, by place in the data set."""
        return self.originals.renumbered(lambda i: int(self.ledger.index[i]))


def write_pngs(folder: Path) -> int:
    """Write each example, rounded to 8 bits inside the ball, as png/INDEX.png. Returns how many there are."""
    from PIL import Image

    stored = read_evaluation(folder)
    spec = stored.results["spec"]
    if (folder / "png").is_symlink():
        raise RunError(str(folder / "png"), "is a symbolic link", "Delete it.")
    clear_pngs(folder)  # perhaps of an earlier evaluation
    make_folder(folder / "png")
    for i, x_adv in stored.ledger.examples.items():
        clean = as_floats(stored.originals[i])[None]
        pixels = (eight_bit(clean, x_adv[None], spec["eps"], spec["norm"])[0] * 255).round().to(torch.uint8)
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
        path = folder / "png" / f"{int(stored.ledger.index[i]):05d}.png"
        atomic_write(path, partial(image.save, format="PNG"))
    return len(stored.ledger.examples)


def read_evaluation(folder: Path, strict: bool = False) -> StoredEvaluation:
    """Read an evaluation from its folder. strict: check the seals of the results and of each row.

    Raises RunError: there is no evaluation, it is of another version, or a file or a row (named) is missing, damaged or
    altered.
    """
    path = folder / "ledger.csv"
    results, context = _read_results(folder)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise RunError(str(path), f"cannot be read ({error})") from error
    if "\r" in text:
        raise RunError(str(path), "is not written as robustmail writes it: other line ends")
    ledger, rows = read_rows(str(path), text)
    if strict:
        _check_seals(folder, results, context, rows, text)
    ledger.seconds = {str(stage): float(s) for stage, s in results["seconds"].items()}
    originals, stored = _read_examples(folder, ledger, rows)
    return StoredEvaluation(folder, results, ledger, rows, originals, stored)


def _read_results(folder: Path) -> tuple[dict[str, Any], str]:
    """(content of results.json, context of the rows' seals). Raises RunError: missing, damaged, or not an
    evaluation's."""
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
        for row in results["attacks"]:
            AttackResult(**row)
        return results, context_of(results["weights"]["fingerprint"], results["spec"])
    except FileNotFoundError as error:
        raise RunError(str(folder), "holds no evaluation", "Make one with robustmail eval.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(str(path), f"damaged, or not an evaluation's ({type(error).__name__}: {error})") from error


def _check_seals(folder: Path, results: dict[str, Any], context: str, rows: list[dict[str, str]], text: str) -> None:
    for k, row in enumerate(rows):
        *values, seal = row.values()
        if row_seal(values, context) != seal:
            raise RunError(
                f"{folder / 'ledger.csv'}, row {k + 1} (image {row['index']})",
                "its seal is broken: the row, the eps or the weights were altered",
            )
    if rows_as_text(rows) != text:
        raise RunError(str(folder / "ledger.csv"), "is not written as robustmail writes it: it was altered")
    if with_seal(results) != results:
        raise RunError(str(folder / "results.json"), "its seal is broken: it was altered")


def clear(folder: Path, kind: str = "evaluation") -> None:
    """Delete the files of an evaluation, results first, so that they never describe files that are gone.

    kind: of the folder; "run" for that of a training run. Raises RunError: a folder of another kind.
    """
    if not folder.is_dir():
        return
    check_folder(folder, FILES, kind)
    remove(folder, ("results.json", "ledger.csv", WHOLE, "report.html"))
    shutil.rmtree(folder / PARTS, ignore_errors=True)  # which follows no link
    clear_pngs(folder)


def eight_bit(x: Tensor, x_adv: Tensor, eps: float, norm: Norm) -> Tensor:
    """Adversarial images rounded to 8 bits (multiples of 1/255) inside the ball, [B, C, H, W] in [0, 1].

    In l-inf these are the nearest 8-bit images in the ball. In l2 the perturbation is scaled by 0.99, 0.98, ... until
    the rounded image is in the ball; at 0 it is the rounded clean image.
    x: the clean images. x_adv: the adversarial ones. eps, norm: the ball.
    """
    rounded = (x_adv * 255).round()
    if norm == "linf":
        low, high = ((x - eps) * 255 - 1e-3).ceil(), ((x + eps) * 255 + 1e-3).floor()
        rounded = rounded.clamp(low.where(low <= high, rounded), high.where(low <= high, rounded))
    else:
        for hundredths in range(99, -1, -1):
            outside = distances(x, (rounded / 255).clamp(0, 1), norm) > eps + tolerance(eps)
            if not outside.any():
                break
            rounded[outside] = ((x + hundredths / 100 * (x_adv - x)) * 255).round()[outside]
    return (rounded / 255).clamp(0, 1)


def summarize(
    ledger: Ledger, rows: list[AttackResult], classes: int, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """Everything in results.json that follows from the ledger and from the sanity checks' measurements.

    rows: the attacks' results. classes: of the model. measured: what `sanity_checks.measure` yielded last, if it was
    run.
    """
    pgd = [stage for stages in pgd_runs(ledger.stages) for stage in stages]
    rounded = None
    if (ledger.rounded != UNTRIED).any():
        stands = ledger.right & (ledger.rounded != BROKE)
        rounded = asdict(accuracy_row("worst case, 8-bit", int(stands.sum()), len(ledger)))
    return {
        "attacks": [asdict(row) for row in rows], "worst_case": asdict(worst_case(ledger)), "eight_bit": rounded,
        **_by_class(ledger, classes), "margins": by_margin(ledger),
        "by_weight": by_weight((measured or {}).get("weights", []), ledger),
        "curve": curve(measured) if measured else None, "believable": judge(measured, ledger, pgd, classes),
        "measured": measured, "seconds": {k: round(v, 3) for k, v in ledger.seconds.items()},
    }  # fmt: skip


def _by_class(ledger: Ledger, classes: int) -> dict[str, Any]:
    """`per_class`, and `worst_classes`: natural, and robust where an attack was run."""
    rows = []
    for c in range(classes):
        in_class = ledger.label == c
        if n := int(in_class.sum()):
            natural, robust = (int((mask & in_class).sum()) for mask in (ledger.right, ledger.stands))
            rows.append(class_row(c, n, natural, robust))
    kinds = KINDS if ledger.stages else KINDS[:1]
    return {"per_class": rows, "worst_classes": {kind: worst_classes(rows, kind) for kind in kinds}}


def _read_examples(folder: Path, ledger: Ledger, rows: list[dict[str, str]]) -> tuple[StoredImages, tuple[int, ...]]:
    """Let the ledger read the examples that the rows name. Returns their clean images, by position, and the indices of
    all images with an example in the file.

    Raises RunError, naming the row: an example is missing, or is not the one that was written.
    """
    places = load_examples(folder)
    wanted = {i: places[int(row["index"])] for i, row in enumerate(rows) if int(row["index"]) in places}
    wanted = {i: place for i, place in wanted.items() if rows[i]["example"]}
    examples, originals = StoredImages("x", wanted), StoredImages("original", wanted)
    for i, row in enumerate(rows):
        if not row["example"]:
            continue
        who = f"{folder / 'ledger.csv'}, row {i + 1} (image {row['index']})"
        if i not in wanted:
            raise RunError(who, "its example is missing")
        try:
            x, clean = examples[i], originals[i]
        except Exception as error:  # damaged in any way
            raise RunError(who, f"its example cannot be read ({in_brief(error)})") from error
        if tensor_hash(x) != row["example"]:
            raise RunError(who, "its example was altered")
        if tensor_hash(as_floats(clean)) != row["image"]:
            raise RunError(who, "its original image was altered")
    ledger.examples = examples
    return originals, tuple(places)


def clear_pngs(folder: Path) -> None:
    """Delete the files that `write_pngs` wrote, and their folder if nothing else is in it."""
    pngs = folder / "png"
    if not pngs.is_dir() or pngs.is_symlink():
        return
    remove(pngs, [path.name for path in pngs.iterdir() if re.fullmatch(r"\d{5,}\.png", path.name)])
    if not any(pngs.iterdir()):
        pngs.rmdir()


def check_sizes(results: dict[str, Any]) -> None:
    """Refuse results.json in which a key is missing, of another type, or too large (raises ValueError)."""
    check_shape(results, SHAPE)
    n, shard = results["spec"]["n"], results["shard"]
    if not (1 <= n <= MAX_COUNT and 1 <= results["data"]["classes"] <= MAX_COUNT and results["spec"]["eps"] > 0):
        raise ValueError("the numbers of images or classes, or eps, are no evaluation's")
    if shard is not None and not (len(shard) == 2 and 1 <= shard[0] <= shard[1] <= n):
        raise ValueError(f"there is no shard {shard}")


def summed_again(
    folder: Path, ledger: Ledger, rows: list[AttackResult], classes: int, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """`summarize` for what was read from a folder. Raises RunError: `measured` is not what an evaluation measures."""
    try:
        return summarize(ledger, rows, classes, measured)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RunError(str(folder / "results.json"), f"is damaged or was altered ({in_brief(error)})") from error
