"""An evaluation in a folder: begun, continued after any interruption, split into shards, merged, read back."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustmail.attacks.view import Norm, distances, slack
from robustmail.data.images import Part
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError, in_brief
from robustmail.evaluation.believable import curve, judge, measure
from robustmail.evaluation.exact import Room, exact
from robustmail.evaluation.examples import PARTS, WHOLE, add_examples, load_examples, write_examples
from robustmail.evaluation.ledger import (
    BROKE,
    STOOD,
    UNTRIED,
    Ledger,
    digest,
    joined,
    read_rows,
    seal,
    text_of,
    write_rows,
)
from robustmail.evaluation.plans import Plan, check_eps, is_ours
from robustmail.evaluation.subject import Subject
from robustmail.evaluation.suite import (
    CHUNK,
    attempt,
    counted,
    floats,
    images,
    look,
    planned,
    room_of,
    verdict,
    worst_case,
)
from robustmail.files import check_folder, locked, make_folder, remove, write, write_json, write_text
from robustmail.provenance import provenance
from robustmail.records import ATTACKED, Attacked, Attacking, so_many
from robustmail.step import Attack
from robustmail.untrusted import check_shape, read_json, read_text
from robustmail.values import identity

__all__ = [
    "FILES", "Held", "Task", "clear", "context_of", "differences", "examine", "fingerprint_of", "merge",
    "open_shard", "open_whole", "read_folder", "summed_again", "told_of", "write_pngs",
]  # fmt: skip

FILES = ("results.json", "ledger.csv", WHOLE, PARTS, "report.html", "png", "lock")
FORMAT = 3  # raised whenever older folders can no longer be judged by what is written here
SAVE_EVERY = 20.0  # seconds
QUANTILES = 5
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
MOST = 10**7  # images or classes
MAY_DIFFER = ("checkpoint", "data", "data_given", "attacks", "own")  # where files lie, and attacks that are added later


@dataclass
class Task:
    """What to evaluate, on what, and with what: everything that a result depends on.

    data: the images, n of them. shard: (k, of), the k-th of so many parts, counted from 1; whole blocks of images.
    """

    subject: Subject
    data: TestSet
    attacks: tuple[str | Attack, ...]
    eps: float
    norm: Norm = "linf"
    seed: int = 0
    shard: tuple[int, int] = (1, 1)
    batch: int | None = None
    command: str = ""
    plans: list[Plan] = field(init=False)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        blocks = -(-len(self.data.part.y) // CHUNK)
        if self.shard[1] > blocks:
            raise RunError(f"--shard {self.shard[0]}/{self.shard[1]}",
                           f"{len(self.data.part.y)} images make {so_many(blocks, 'block')} of {CHUNK}, "
                           "and a shard has at least one",
                           f"Use {so_many(blocks, 'shard')} at most.")  # fmt: skip
        self.plans = planned(self.attacks, self.eps, self.subject.classes, self.norm)

    @cached_property
    def index(self) -> Tensor:
        """Places in the data set of this shard's images."""
        index = torch.arange(len(self.data.part.y))
        k, of = self.shard
        return index[(index // CHUNK) % of == k - 1]

    @cached_property
    def part(self) -> Part:
        """This shard's images."""
        return Part(self.data.part.x[self.index], self.data.part.y[self.index])

    @cached_property
    def hashes(self) -> list[str]:
        """Of each of this shard's images, as rows of the ledger say it."""
        return [digest(floats(x)) for x in self.part.x]

    @cached_property
    def told(self) -> dict[str, Any]:
        """What the results say of the images."""
        return told_of(self.data, self.subject.classes)

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the evaluation, in plain values."""
        return {
            **self.subject.described, "data": self.data.name, "data_given": self.data.given,
            "attacks": [what.name for what in self.plans],
            "own": {w.name: identity(a) for w in self.plans if not is_ours(w.name) for a in w.stages.values()},
            "eps": self.eps, "norm": self.norm, "n": len(self.data.part.y), "seed": self.seed,
        }  # fmt: skip

    @property
    def context(self) -> str:
        """What every row's seal covers besides the row."""
        return context_of(self.subject.fingerprint, self.spec)


def context_of(fingerprint: str, spec: dict[str, Any]) -> str:
    """The weights and the budget, which no row may be separated from."""
    return f"{fingerprint}|{spec['eps']!r}|{spec['norm']}|{spec['n']}|{spec['seed']}"


def sealed(results: dict[str, Any]) -> dict[str, Any]:
    """The results with a hash of all that they say."""
    content = {name: value for name, value in results.items() if name != "seal"}
    return {**content, "seal": seal([json.dumps(content, sort_keys=True)], "results")}


@dataclass(frozen=True)
class Held:
    """What a folder holds: the results as they are written, the ledger with its examples, and its rows."""

    folder: Path
    results: dict[str, Any]
    ledger: Ledger
    rows: list[dict[str, str]]
    originals: dict[int, Tensor]
    stored: tuple[int, ...]
    """the images of which there are examples in the file, whether the ledger speaks of them or not"""


def examine(task: Task, folder: Path, fresh: bool = False) -> Generator[Attacking | Attacked, None, None]:
    """Evaluate into a folder, or go on with what is there; the last save is at most some seconds old.

    Raises RunError for a folder of something else or one that was altered, and whatever an attack raises.
    """
    make_folder(folder, FILES, "evaluation")
    with locked(folder):
        held = _open(task, folder, fresh)
        if held and held.results["complete"]:
            yield from (Attacked(**row) for row in held.results["attacks"])
            return
        yield from _examine(task, folder, held)


def open_whole(task: Task, folder: Path, fresh: bool = False) -> bool:
    """Does the folder hold, finished, the whole evaluation of which `task` is a shard?

    Raises RunError where it holds another one, or other things.
    """
    make_folder(folder, FILES, "evaluation")
    with locked(folder):
        held = _open(replace(task, shard=(1, 1)), folder, fresh)
    return held is not None and held.results["complete"]


def open_shard(task: Task, folder: Path, whole: Path, fresh: bool = False) -> None:
    """Begin a shard with what the whole evaluation knows of its images, unless the shard's folder knows already.

    Raises RunError where either folder holds another evaluation, or other things.
    """
    make_folder(folder, FILES, "evaluation")
    with locked(folder):
        if _open(task, folder, fresh) is None and (held := _resume(replace(task, shard=(1, 1)), whole)):
            _save(task, folder, held.ledger.take(task.index), [], None, 0.0)


def _open(task: Task, folder: Path, fresh: bool) -> Held | None:
    """What the folder holds of this very evaluation; complete only if nothing is left to do."""
    if fresh:
        clear(folder)
    held = _resume(task, folder)
    if held and held.results["complete"] and held.results["spec"]["attacks"] != task.spec["attacks"]:
        held.results["complete"] = False  # attacks are added: until they are done, no result is whole
        write_json(folder / "results.json", sealed(held.results))
    return held


def _examine(task: Task, folder: Path, held: Held | None) -> Iterator[Attacking | Attacked]:
    model, part, room = task.subject.model, task.part, room_of(task.subject.model, task.batch)
    began = time.perf_counter() - (held.results["provenance"]["seconds"] if held else 0.0)
    ledger = held.ledger if held else look(model, part, room, task.index)
    stored = {at: row["example"] for at, row in enumerate(held.rows) if row["example"]} if held else {}
    rows: list[Attacked] = []
    measured: dict[str, Any] | None = None

    def save(complete: bool = False) -> float:
        _save(task, folder, ledger, rows, measured, time.perf_counter() - began, complete, stored)
        return time.monotonic()

    saved = time.monotonic()
    try:
        for what in task.plans:
            for record in attempt(model, part, ledger, what, task.seed, room):
                saved = save() if time.monotonic() - saved >= SAVE_EVERY else saved
                yield record
            rows.append(verdict(ledger, what, task.seed))
            yield rows[-1]
        _round(task, ledger, part, room)
        save()
        for found in _measured(task, ledger, room):
            if isinstance(found, dict):
                measured = found
            else:
                yield found
    except BaseException as stop:
        if not isinstance(stop, Exception):  # asked to stop, rather than failed
            save()
        raise
    save(complete=True)


def _measured(task: Task, ledger: Ledger, room: Room) -> Iterator[Attacking | dict[str, Any]]:
    """What the first shard examines for all of them."""
    if task.shard[0] == 1:
        for found in measure(task.subject.model, task.data.part, ledger, task.eps, task.norm, task.seed, room):
            yield {**found, "doubts": list(task.subject.doubts)} if isinstance(found, dict) else found


def merge(folders: list[Path], to: Path, again: bool = False) -> None:
    """Put the shards of one evaluation together; the ledger is the one that a single process would have written.

    again: `to` may hold an unfinished result of this evaluation, as `open_whole` leaves it.

    Raises RunError for shards of different evaluations, unfinished ones, or too few.
    """
    if not folders:
        raise RunError("merge", "nothing to merge", "Name the shards' folders.")
    held = [read_folder(folder, strict=True) for folder in folders]
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
    ledger = joined([other.ledger for other in held])
    place = {int(index): i for i, index in enumerate(ledger.index)}
    rows = sorted((row for other in held for row in other.rows), key=lambda row: int(row["index"]))
    make_folder(to, FILES, "evaluation")
    if (to / "results.json").exists() and not again:
        raise RunError(str(to), "holds results already", "Pass another --out.")
    measured = next((other.results["measured"] for other in held if other.results["measured"]), None)
    attacks = [verdict(ledger, Attacked(**row), first["spec"]["seed"]) for row in first["attacks"]]
    seconds = sum(other.results["provenance"]["seconds"] for other in held)
    results = {
        **first, "n": len(ledger), "shard": None,
        **summed_again(to, ledger, attacks, first["data"]["classes"], measured),
        "provenance": {**first["provenance"], "seconds": seconds, "merged": [str(other.folder) for other in held]},
    }  # fmt: skip
    originals = {place[i]: x for other in held for i, x in _by_index(other).items()}
    with locked(to):
        write_examples(to, ledger, originals)
        write_text(to / "ledger.csv", text_of(rows))
        write_json(to / "results.json", sealed(results))


def write_pngs(folder: Path) -> int:
    """Write every example as png/INDEX.png, of whole 255ths inside the ball; how many there are."""
    from PIL import Image

    held = read_folder(folder)
    spec = held.results["spec"]
    if (folder / "png").is_symlink():
        raise RunError(str(folder / "png"), "is a symbolic link", "Delete it.")
    _clear_pngs(folder)  # of images that may stand now
    make_folder(folder / "png")
    for at, found in held.ledger.examples.items():
        clean = floats(held.originals[at])[None]
        pixels = (eight_bit(clean, found[None], spec["eps"], spec["norm"])[0] * 255).round().to(torch.uint8)
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
        path = folder / "png" / f"{int(held.ledger.index[at]):05d}.png"
        write(path, partial(image.save, format="PNG"))
    return len(held.ledger.examples)


def _clear_pngs(folder: Path) -> None:
    """Delete what `write_pngs` wrote; whatever else lies there stays, and so does its folder then."""
    there = folder / "png"
    if not there.is_dir() or there.is_symlink():
        return
    remove(there, [path.name for path in there.iterdir() if re.fullmatch(r"\d{5,}\.png", path.name)])
    if not any(there.iterdir()):
        there.rmdir()


def read_folder(folder: Path, strict: bool = False) -> Held:
    """The files of an evaluation; `strict`: every row must still bear its seal.

    Raises RunError, naming the row, for one that is missing, damaged or altered.
    """
    path = folder / "results.json"
    try:
        results = read_json(path)
        if isinstance(results, dict) and "spec" not in results and results.get("kind", "run") == "run":
            raise RunError(str(folder), "is a training run, not an evaluation", "robustmail eval it first.")
        if results["format"] != FORMAT:
            age = "an older" if isinstance(results["format"], int) and results["format"] < FORMAT else "another"
            wrong = f"was made by {age} version (format {results['format']}, this one reads {FORMAT})"
            raise RunError(str(path), wrong, "Evaluate again into another folder, or read it with that version.")
        if results["kind"] != "evaluation":
            raise RunError(str(path), f"is of kind {results['kind']!r}, not an evaluation's")
        _check_sizes(results)
        context = context_of(results["weights"]["fingerprint"], results["spec"])
        for row in results["attacks"]:
            Attacked(**row)
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
            if seal(values, context) != said:
                raise RunError(
                    f"{folder / 'ledger.csv'}, row {k + 1} (image {row['index']})",
                    "its seal is broken: the row, the eps or the weights were altered",
                )
    if strict and text_of(rows) != text:
        raise RunError(str(folder / "ledger.csv"), "is not written as robustmail writes it: it was altered")
    if strict and sealed(results) != results:
        raise RunError(str(path), "its seal is broken: it was altered")
    ledger.seconds = {str(stage): float(s) for stage, s in results["seconds"].items()}
    originals, stored = _read_examples(folder, ledger, rows)
    return Held(folder, results, ledger, rows, originals, stored)


def _check_sizes(results: dict[str, Any]) -> None:
    """Refuse results.json where a part is missing, of another type, or larger than any evaluation (ValueError)."""
    check_shape(results, SHAPE)
    n, shard = results["spec"]["n"], results["shard"]
    if not (1 <= n <= MOST and 1 <= results["data"]["classes"] <= MOST and results["spec"]["eps"] > 0):
        raise ValueError("the numbers of images or classes, or eps, are no evaluation's")
    if shard is not None and not (len(shard) == 2 and 1 <= shard[0] <= shard[1] <= n):
        raise ValueError(f"there is no shard {shard}")


def _resume(task: Task, folder: Path) -> Held | None:
    """What the folder holds of this very evaluation, or None where it holds nothing."""
    if not (folder / "results.json").exists():
        if (folder / "ledger.csv").exists():
            raise RunError(str(folder), "has a ledger, but its results.json is missing",
                           "Restore it, pass another --out, or --fresh to begin anew.")  # fmt: skip
        return None
    if not (folder / "ledger.csv").exists() and _just_begun(folder):
        return None
    held = read_folder(folder, strict=True)
    mine = {"spec": task.spec, "weights": {"fingerprint": task.subject.fingerprint},
            "data": task.told, "shard": _shard(task)}  # fmt: skip
    _same(held.results, mine, folder, shard=True)
    before, now = held.results["spec"]["attacks"], task.spec["attacks"]
    if now[: len(before)] != before:
        raise RunError(str(folder), f"holds the attacks {', '.join(before)}, not {', '.join(now)}",
                       "Attacks can be added at the end; otherwise pass another --out, or --fresh.")  # fmt: skip
    return held


def _just_begun(folder: Path) -> bool:
    """Was its process killed within its first save, before there was anything to lose?"""
    try:
        return read_json(folder / "results.json")["complete"] is False
    except (OSError, ValueError, LookupError, TypeError):  # read_folder says what is wrong
        return False


def _same(there: dict[str, Any], here: dict[str, Any], folder: Path, shard: bool = False) -> None:
    """Refuse to mix two evaluations (raises RunError naming what differs); `shard`: nor two shards of one."""
    said = differences(there, here)
    if shard and there["shard"] != here["shard"]:
        said.append(f"shard: {there['shard']} there, {here['shard']} here")
    if said:
        raise RunError(str(folder), f"holds another evaluation ({'; '.join(said[:4])})",
                       "Pass another --out, or --fresh to begin anew.")  # fmt: skip


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What tells two measurements apart: their `spec`, and the fingerprints of `weights` and `data`."""
    ours, theirs = here["spec"], there["spec"]
    differ = [k for k in {**theirs, **ours} if k not in MAY_DIFFER and theirs.get(k) != ours.get(k)]
    said = [f"{k}: {_plain(theirs.get(k))} there, {_plain(ours.get(k))} here" for k in differ]
    said += [f"attack {name}: {one} there, {other} here" for name, one, other in others(theirs, ours)]
    return said + [f"other {w}" for w in ("weights", "data") if there[w]["fingerprint"] != here[w]["fingerprint"]]


def others(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, what it is there, what it is here) of every attack that has one name in two specs and is not the same."""
    first, second = there.get("own", {}), here.get("own", {})
    return [(name, first[name], second[name]) for name in first if second.get(name, first[name]) != first[name]]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def clear(folder: Path) -> None:
    """Delete what an evaluation left in its folder, the results first: nothing may stand in them that is gone."""
    if not folder.is_dir():
        return
    check_folder(folder, FILES, "evaluation")
    remove(folder, ("results.json", "ledger.csv", WHOLE, "report.html"))
    shutil.rmtree(folder / PARTS, ignore_errors=True)  # which follows no link
    _clear_pngs(folder)


def _round(task: Task, ledger: Ledger, part: Part, room: Room) -> None:
    """Does each example still break its image as a file does, rounded to 8 bits inside the ball?"""
    where = torch.tensor(sorted(at for at in ledger.examples if int(ledger.rounded[at]) == UNTRIED), dtype=torch.int64)
    for some in where.split(room.batch) if len(where) else ():
        x, y = images(task.subject.model, part, some)
        found = torch.stack([ledger.examples[int(at)] for at in some]).to(x)
        bytes_ = eight_bit(x, found, task.eps, task.norm)
        with exact(task.subject.model, room.slice) as view, torch.no_grad():
            broke = view(bytes_).argmax(1) != y
        inside = task.plans[0].holds(x, bytes_)
        ledger.rounded[some] = torch.where((broke & inside).cpu(), BROKE, STOOD).to(torch.int8)


def eight_bit(x: Tensor, found: Tensor, eps: float, norm: Norm) -> Tensor:
    """The nearest images of whole 255ths; in l-inf the nearest inside the ball. In l2, where these lie outside, the
    perturbation is shortened by hundredths until they do not: with none left, they are the original's."""
    rounded = (found * 255).round()
    if norm == "linf":
        low, high = ((x - eps) * 255 - 1e-3).ceil(), ((x + eps) * 255 + 1e-3).floor()
        rounded = rounded.clamp(low.where(low <= high, rounded), high.where(low <= high, rounded))
    else:
        for hundredths in range(99, -1, -1):
            outside = distances(x, (rounded / 255).clamp(0, 1), norm) > eps + slack(eps)
            if not outside.any():
                break
            rounded[outside] = ((x + hundredths / 100 * (found - x)) * 255).round()[outside]
    return (rounded / 255).clamp(0, 1)


def _save(
    task: Task, folder: Path, ledger: Ledger, rows: list[Attacked], measured: dict[str, Any] | None, seconds: float,
    complete: bool = False, stored: dict[int, str] | None = None,
) -> None:  # fmt: skip
    """Examples first, then the ledger that speaks of them, then the results that sum it up: a kill in between leaves
    more than is spoken of, never less. `stored`: the examples, position -> hash, that the folder holds already."""
    stored = {} if stored is None else stored
    results = {
        "format": FORMAT, "kind": "evaluation", "complete": complete, "name": task.subject.name, "n": len(ledger),
        "shard": _shard(task), "spec": task.spec, "weights": task.subject.weights, "data": task.told,
        **summed(ledger, rows, task.subject.classes, measured),
        "provenance": {**provenance(task.subject.device), "seconds": round(seconds, 2), "command": task.command},
    }  # fmt: skip
    path = folder / "results.json"
    if not path.exists():  # else a kill before the last line would leave a ledger of which nothing is known
        write_json(path, sealed({**results, "complete": False}))
    add_examples(folder, ledger, task.part.x, stored, complete)
    write_text(folder / "ledger.csv", write_rows(ledger, task.hashes, stored, task.context))
    write_json(path, sealed(results))


def told_of(data: TestSet, classes: int) -> dict[str, Any]:
    """What the results say of the images; `classes`: of the model."""
    names = None if data.class_names is None else list(data.class_names)
    return {"name": data.name, "classes": classes, "class_names": names, "shape": list(data.part.x.shape[1:]),
            "fingerprint": fingerprint_of(data.part)}  # fmt: skip


def summed(ledger: Ledger, rows: list[Attacked], classes: int, measured: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that follows from the ledger and from what was measured on the model."""
    pgd = [stage for stage in ledger.stages if stage.startswith("pgd") and stage[3:].isdigit()]
    bytes_ = None
    if (ledger.rounded != UNTRIED).any():
        stands = ledger.right & (ledger.rounded != BROKE)
        bytes_ = asdict(counted("worst case, 8-bit", int(stands.sum()), len(ledger)))
    return {
        "attacks": [asdict(row) for row in rows], "worst_case": asdict(worst_case(ledger)), "eight_bit": bytes_,
        "per_class": _per_class(ledger, classes), "margins": _by_margin(ledger),
        "curve": curve(measured) if measured else None, "believable": judge(measured, ledger, pgd, classes),
        "measured": measured, "seconds": {k: round(v, 3) for k, v in ledger.seconds.items()},
    }  # fmt: skip


def summed_again(
    folder: Path, ledger: Ledger, rows: list[Attacked], classes: int, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """As `summed`, of what anybody may have written: RunError where `measured` is not what an evaluation measures."""
    try:
        return summed(ledger, rows, classes, measured)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise RunError(str(folder / "results.json"), f"is damaged or was altered ({in_brief(error)})") from error


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
        if digest(x) != row["example"]:
            raise RunError(who, "its example was altered")
        if digest(floats(clean)) != row["image"]:
            raise RunError(who, "its original image was altered")
        ledger.examples[at], originals[at] = x, clean
    return originals, tuple(found)


def _by_index(held: Held) -> dict[int, Tensor]:
    return {int(held.ledger.index[at]): x for at, x in held.originals.items()}


def fingerprint_of(part: Part) -> str:
    """A hash of images and labels."""
    return digest(part.x)[:8] + digest(part.y)[:8]


def _shard(task: Task) -> list[int] | None:
    return None if task.shard == (1, 1) else list(task.shard)
