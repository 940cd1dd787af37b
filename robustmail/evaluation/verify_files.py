"""Whether the files of an evaluation agree with one another, without its weights and data; no model is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmail.errors import RunError
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, is_built_in
from robustmail.evaluation.evaluator import BLOCK, as_floats, attack_result
from robustmail.evaluation.ledger import BROKE, UNTRIED
from robustmail.evaluation.storage import StoredEvaluation, read_evaluation, summed_again
from robustmail.norms import distances
from robustmail.records import AttackResult

__all__ = [
    "CHECKED", "Verified", "broken_rows", "check_balls", "check_places", "check_results", "row_error", "unchecked",
    "verify_files",
]  # fmt: skip

CHECKED = (
    "no row, example or number was changed since it was sealed (anybody can seal anew)",
    "the numbers in results.json follow from the ledger, and attacks have the settings that their names stand for",
    "every example lies in the ball around its stored image, and in [0, 1]",
)
"""what `verify_files` finds out, in sentences"""


@dataclass(frozen=True)
class Verified:
    """The result of `verify`.

    images, examples: how many were checked. close: rows whose logits are too close to decide on this machine.
    unchecked: what could not be checked, in sentences. checked: what was, besides the examples.
    """

    images: int
    examples: int
    close: int
    unchecked: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()


def verify_files(folder: str | Path) -> Verified:
    """Check an evaluation's folder against itself, where its weights or data are not at hand.

    Whether the model misclassifies the examples, and whether the images are those of the data set, stays open:
    `unchecked` says so.

    folder: of the evaluation. Raises RunError, naming the row: something is not what it was.
    """
    held = read_evaluation(Path(folder), strict=True)
    check_results(held, held.results["data"]["classes"])
    check_places(held)
    broken = broken_rows(held)
    for some in torch.tensor(broken, dtype=torch.int64).split(256) if broken else ():
        clean = torch.stack([as_floats(held.originals[int(at)]) for at in some])
        check_balls(held, clean, torch.stack([held.ledger.examples[int(at)] for at in some]), some)
    return Verified(len(held.ledger), len(broken), 0, tuple(unchecked(held, judged=False)), CHECKED)


def row_error(held: StoredEvaluation, at: int, wrong: str) -> RunError:
    """The error that names a row of the ledger; at: its position."""
    return RunError(f"{held.folder / 'ledger.csv'}, row {at + 1} (image {int(held.ledger.index[at])})", wrong)


def unchecked(held: StoredEvaluation, judged: bool = True, brought: bool = False) -> Iterator[str]:
    """What was not checked, in sentences. judged: the model judged the images again. brought: the caller passed the
    data, so that their recorded name says nothing."""
    results = held.results
    if not judged:
        weights = results["spec"]["checkpoint"] or "a model in memory"
        yield f"that the model ({weights}) predicts what the ledger says, of images and of examples"
    if not judged or brought:
        yield f"that the images are {results['data']['name']}" + (", as you passed them yourself" if brought else "")
    yield "that images which stand were attacked at all, with these settings: only attacking them again can tell"
    if results["measured"]:
        yield "what the model was asked for the light, and the curve of accuracy by eps"
    if own := [row["name"] for row in results["attacks"] if not is_built_in(row["name"])]:
        yield f"the settings of {', '.join(own)}, which are no attacks of ours"
    if "training" in results or "recipe" in results["provenance"]:
        yield "how the model was trained: recipe, epoch and seed"
    yield "times, versions, the machine and the command"


def check_results(held: StoredEvaluation, classes: int) -> None:
    """Whether results.json follows from the ledger (raises RunError); classes: of the model."""
    try:
        _check_sums(held, classes)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # of another structure
        wrong = f"is damaged or was altered ({type(error).__name__}: {error})"
        raise RunError(str(held.folder / "results.json"), wrong) from error


def check_places(held: StoredEvaluation) -> None:
    """Whether the ledger has a row for each image of the set or shard, and each in its place (raises RunError)."""
    results, ledger = held.results, held.ledger
    k, of = results["shard"] or (1, 1)
    if (results["shard"] and not 1 <= k <= of <= -(-results["spec"]["n"] // BLOCK)) or results["shard"] == [1, 1]:
        raise RunError(str(held.folder / "results.json"), f"says it is shard {k} of {of}, which there is not")
    places = [i for i in range(results["spec"]["n"]) if (i // BLOCK) % of == k - 1]
    for at, index in enumerate(ledger.index.tolist()):
        if at >= len(places) or index != places[at]:
            raise row_error(held, at, "is out of its place: rows were moved, doubled or left out")
    if len(places) != len(ledger):
        wrong = f"has {len(ledger)} rows of {len(places)}: some were left out"
        raise RunError(str(held.folder / "ledger.csv"), wrong)


def broken_rows(held: StoredEvaluation) -> list[int]:
    """Positions of the images that an attack broke. Raises RunError: these are not those with an example."""
    broken = [at for at, by in enumerate(held.ledger.broken_by) if by not in ("", "natural")]
    if missing := [at for at in broken if at not in held.ledger.examples]:
        raise row_error(held, missing[0], "was broken, but has no example")
    if extra := [at for at in held.ledger.examples if at not in broken]:
        raise row_error(held, extra[0], "has an example, but was not broken by an attack")
    return broken


def check_balls(held: StoredEvaluation, x: Tensor, examples: Tensor, where: Tensor) -> None:
    """Whether examples are in the ball and the box, as far from their images as recorded, and of another class.

    x, examples: [B, C, H, W]. where: positions of their rows, [B]. Raises RunError.
    """
    ledger = held.ledger
    spec = AttackSpec("verify", {}, held.results["spec"]["eps"], held.results["spec"]["norm"])
    distance = distances(x, examples, spec.norm).cpu()
    inside = spec.in_ball(x, examples).cpu() & ((examples >= 0) & (examples <= 1)).flatten(1).all(1).cpu()
    for k, at in enumerate(where.tolist()):
        if not inside[k]:
            wrong = f"its example lies {float(distance[k]):.6f} away, eps is {spec.eps:.6f}; or it left [0, 1]"
            raise row_error(held, at, wrong)
        if abs(float(distance[k] - ledger.distance[at])) > 1e-6:
            wrong = f"its example lies {float(distance[k]):.6f} away, not {float(ledger.distance[at]):.6f}"
            raise row_error(held, at, wrong)
        if int(ledger.broken_as[at]) == int(ledger.label[at]):  # near or not, the true class is no break
            wrong = f"its example is recorded as {int(ledger.label[at])}, its true class, so it was not broken"
            raise row_error(held, at, wrong)


def _check_sums(held: StoredEvaluation, classes: int) -> None:
    """Whether results.json follows from the ledger, and the ledger's columns from one another (raises RunError)."""
    results, ledger = held.results, held.ledger
    path = str(held.folder / "results.json")
    if not results["complete"]:
        raise RunError(path, "is not finished", "Run the same robustmail eval command again.")
    for at, by in enumerate(ledger.broken_by):
        broke = [stage for stage, outcome in ledger.stages.items() if int(outcome[at]) == BROKE]
        wrong = int(ledger.predicted[at]) != int(ledger.label[at])
        if (by == "natural") != wrong or (by not in ("", "natural") and by not in broke) or (by == "" and broke):
            contradiction = f"broken_by says {by or 'stands'!r}, its columns {', '.join(broke) or 'nothing'}"
            raise RunError(f"{held.folder / 'ledger.csv'}, row {at + 1} (image {int(ledger.index[at])})", contradiction)
    rows = [AttackResult(**row) for row in results["attacks"]]
    for row in rows:
        if any((ledger.outcome(stage) == UNTRIED).all() and bool(ledger.right.any()) for stage in row.stages[:1]):
            raise RunError(path, f"says that {row.name} was run, the ledger knows nothing of it")
    if list(dict.fromkeys(stage for row in rows for stage in row.stages)) != list(ledger.stages):
        raise RunError(path, f"its attacks are not those of the ledger, {', '.join(ledger.stages) or 'none'}")
    spec, again = results["spec"], []
    for row in rows:
        what = attack_spec(row.name, spec["eps"], classes, spec["norm"]) if is_built_in(row.name) else row
        again.append(attack_result(ledger, what, spec["seed"]))
        if again[-1].stages != row.stages or again[-1].settings != row.settings:
            raise RunError(path, f"its stages or settings are not those of {row.name}: it was altered, or the attack "
                           "is another one in this version")  # fmt: skip
        _check_tried(held, row)
    expected = summed_again(held.folder, ledger, again, classes, results["measured"])
    for name, value in expected.items():
        if name != "seconds" and _plain(value) != _plain(results.get(name)):
            raise RunError(path, f"{name} does not follow from the ledger: it was altered")
    if [row.name for row in rows] != results["spec"]["attacks"] or results["n"] != len(ledger):
        raise RunError(path, "the attacks or the number of images do not fit the ledger: it was altered")


def _check_tried(held: StoredEvaluation, row: AttackResult) -> None:
    """Whether every stage tried every image that stood before it (raises RunError)."""
    for k, stage in enumerate(row.stages):
        skipped = held.ledger.standing(row.stages[:k]) & (held.ledger.outcome(stage) == UNTRIED)
        if skipped.any():
            at = int(skipped.nonzero()[0])
            raise RunError(f"{held.folder / 'ledger.csv'}, row {at + 1} (image {int(held.ledger.index[at])})",
                           f"stood before {stage} of {row.name}, but was not tried")  # fmt: skip


def _plain(value: Any) -> Any:
    """Without times, and with tuples as JSON reads them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k != "seconds"}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
