"""An evaluation in a folder: begun, continued after any interruption, split into shards, merged, read back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustmail.attacks.view import Norm, distances, slack
from robustmail.data.images import Part
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation.believable import curve, judge, measure
from robustmail.evaluation.exact import Room, exact
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
from robustmail.files import locked, make_folder, write, write_json, write_text
from robustmail.provenance import provenance
from robustmail.records import Attacked, Attacking, so_many
from robustmail.step import Attack
from robustmail.values import identity

__all__ = [
    "FILES", "Held", "Task", "clear", "context_of", "differences", "examine", "fingerprint_of", "merge", "read_folder",
    "summed", "told_of", "write_pngs",
]  # fmt: skip

FILES = ("results.json", "ledger.csv", "examples.safetensors", "report.html", "png", "lock")
FORMAT = 3  # raised whenever older folders can no longer be judged by what is written here
SAVE_EVERY = 20.0  # seconds
QUANTILES = 5
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

    @property
    def index(self) -> Tensor:
        """Places in the data set of this shard's images."""
        index = torch.arange(len(self.data.part.y))
        k, of = self.shard
        return index[(index // CHUNK) % of == k - 1]

    @property
    def part(self) -> Part:
        """This shard's images."""
        return Part(self.data.part.x[self.index], self.data.part.y[self.index])

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


def examine(task: Task, folder: Path, fresh: bool = False) -> Iterator[Attacking | Attacked]:
    """Evaluate into a folder, or go on with what is there; the last save is at most some seconds old.

    Raises RunError for a folder of something else or one that was altered, and whatever an attack raises.
    """
    make_folder(folder, FILES, "evaluation")
    with locked(folder):
        if fresh:
            clear(folder)
        held = _resume(task, folder)
        if held and held.results["complete"] and held.results["spec"]["attacks"] == task.spec["attacks"]:
            yield from (Attacked(**row) for row in held.results["attacks"])
            return
        if held and held.results["complete"]:  # attacks are added: until they are done, no result is whole
            write_json(folder / "results.json", sealed({**held.results, "complete": False}))
        yield from _examine(task, folder, held)


def _examine(task: Task, folder: Path, held: Held | None) -> Iterator[Attacking | Attacked]:
    model, part, room = task.subject.model, task.part, room_of(task.subject.model, task.batch)
    began = time.perf_counter() - (held.results["provenance"]["seconds"] if held else 0.0)
    ledger = held.ledger if held else look(model, part, room, task.index)
    rows: list[Attacked] = []

    def save(measured: dict[str, Any] | None = None, complete: bool = False) -> float:
        _save(task, folder, ledger, rows, measured, time.perf_counter() - began, complete)
        return time.monotonic()

    saved = time.monotonic()
    try:
        for what in task.plans:
            for record in attempt(model, part, ledger, what, task.seed, room):
                saved = save() if time.monotonic() - saved >= SAVE_EVERY else saved
                yield record
            rows.append(verdict(ledger, what, task.seed))
            yield rows[-1]
    except BaseException as stop:
        if not isinstance(stop, Exception):  # asked to stop, rather than failed
            save()
        raise
    _round(task, ledger, part, room)
    save()
    measured: dict[str, Any] | None = None
    if task.shard[0] == 1:
        for found in measure(model, task.data.part, ledger, task.eps, task.norm, task.seed, room):
            if isinstance(found, dict):
                measured = {**found, "doubts": list(task.subject.doubts)}
            else:
                yield found
    save(measured, complete=True)


def merge(folders: list[Path], to: Path) -> None:
    """Put the shards of one evaluation together; the ledger is the one that a single process would have written.

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
    if (to / "results.json").exists():
        raise RunError(str(to), "holds results already", "Pass another --out.")
    measured = next((other.results["measured"] for other in held if other.results["measured"]), None)
    attacks = [verdict(ledger, Attacked(**row), first["spec"]["seed"]) for row in first["attacks"]]
    seconds = sum(other.results["provenance"]["seconds"] for other in held)
    results = {
        **first, "n": len(ledger), "shard": None, **summed(ledger, attacks, first["data"]["classes"], measured),
        "provenance": {**first["provenance"], "seconds": seconds, "merged": [str(other.folder) for other in held]},
    }  # fmt: skip
    originals = {place[i]: x for other in held for i, x in _by_index(other).items()}
    _write_examples(to, ledger, originals)
    write_text(to / "ledger.csv", text_of(rows))
    write_json(to / "results.json", sealed(results))


def write_pngs(folder: Path) -> int:
    """Write every example as png/INDEX.png, of whole 255ths inside the ball; how many there are."""
    from PIL import Image

    held = read_folder(folder)
    spec = held.results["spec"]
    shutil.rmtree(folder / "png", ignore_errors=True)  # of images that may stand now
    (folder / "png").mkdir()
    for at, found in held.ledger.examples.items():
        clean = floats(held.originals[at])[None]
        pixels = (eight_bit(clean, found[None], spec["eps"], spec["norm"])[0] * 255).round().to(torch.uint8)
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
        path = folder / "png" / f"{int(held.ledger.index[at]):05d}.png"
        write(path, partial(image.save, format="PNG"))
    return len(held.ledger.examples)


def read_folder(folder: Path, strict: bool = False) -> Held:
    """The files of an evaluation; `strict`: every row must still bear its seal.

    Raises RunError, naming the row, for one that is missing, damaged or altered.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
        if isinstance(results, dict) and "spec" not in results and results.get("kind", "run") == "run":
            raise RunError(str(folder), "is a training run, not an evaluation", "robustmail eval it first.")
        spec, fingerprint, _ = results["spec"], results["weights"]["fingerprint"], results["seconds"].items()
        context = context_of(fingerprint, spec)
        if results["format"] != FORMAT:
            age = "an older" if isinstance(results["format"], int) and results["format"] < FORMAT else "another"
            wrong = f"was made by {age} version (format {results['format']}, this one reads {FORMAT})"
            raise RunError(str(path), wrong, "Evaluate again into another folder, or read it with that version.")
        if results["kind"] != "evaluation":
            raise RunError(str(path), f"is of kind {results['kind']!r}, not an evaluation's")
        for row in results["attacks"]:
            Attacked(**row)
    except FileNotFoundError as error:
        raise RunError(str(folder), "holds no evaluation", "Make one with robustmail eval.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(str(path), f"damaged, or not an evaluation's ({type(error).__name__}: {error})") from error
    try:
        text = (folder / "ledger.csv").read_bytes().decode()  # as it is: read_text would turn line ends into ours
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


def _resume(task: Task, folder: Path) -> Held | None:
    """What the folder holds of this very evaluation, or None where it holds nothing."""
    if not (folder / "results.json").exists():
        if (folder / "ledger.csv").exists():
            raise RunError(str(folder), "has a ledger, but its results.json is missing",
                           "Restore it, pass another --out, or --fresh to begin anew.")  # fmt: skip
        return None
    held = read_folder(folder, strict=True)
    mine = {"spec": task.spec, "weights": {"fingerprint": task.subject.fingerprint},
            "data": {"fingerprint": fingerprint_of(task.data.part)}, "shard": _shard(task)}  # fmt: skip
    _same(held.results, mine, folder, shard=True)
    before, now = held.results["spec"]["attacks"], task.spec["attacks"]
    if now[: len(before)] != before:
        raise RunError(str(folder), f"holds the attacks {', '.join(before)}, not {', '.join(now)}",
                       "Attacks can be added at the end; otherwise pass another --out, or --fresh.")  # fmt: skip
    return held


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
    for name in ("results.json", "ledger.csv", "examples.safetensors", "report.html"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "png", ignore_errors=True)


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
    complete: bool = False,
) -> None:  # fmt: skip
    """Examples first, then the ledger that speaks of them, then the results that sum it up: a kill in between leaves
    more than is spoken of, never less."""
    part = task.part
    _write_examples(folder, ledger, {at: part.x[at] for at in ledger.examples})
    write_text(folder / "ledger.csv", write_rows(ledger, floats(part.x), task.context))
    results = {
        "format": FORMAT, "kind": "evaluation", "complete": complete, "name": task.subject.name, "n": len(ledger),
        "shard": _shard(task), "spec": task.spec, "weights": task.subject.weights,
        "data": told_of(task.data, task.subject.classes),
        **summed(ledger, rows, task.subject.classes, measured),
        "provenance": {**provenance(task.subject.device), "seconds": round(seconds, 2), "command": task.command},
    }  # fmt: skip
    write_json(folder / "results.json", sealed(results))


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


def _write_examples(folder: Path, ledger: Ledger, originals: dict[int, Tensor]) -> None:
    where = sorted(ledger.examples)
    shape = next(iter(ledger.examples.values())).shape if where else (0,)
    content = {
        "index": ledger.index[where],
        "x": torch.stack([ledger.examples[at].float() for at in where]) if where else torch.empty(0, *shape),
        "original": torch.stack([originals[at].cpu() for at in where]) if where else torch.empty(0, *shape),
    }
    write(
        folder / "examples.safetensors", lambda path: save_file({k: v.contiguous() for k, v in content.items()}, path)
    )


def _read_examples(
    folder: Path, ledger: Ledger, rows: list[dict[str, str]]
) -> tuple[dict[int, Tensor], tuple[int, ...]]:
    """Put the examples into the ledger whose rows speak of them; the originals of these, by position, and all
    images of which the file has an example.

    Raises RunError, naming the row, where one is missing or is not the one that was written.
    """
    path = folder / "examples.safetensors"
    try:
        content = load_file(path)
        index, x, original = (content[name] for name in ("index", "x", "original"))
        place = {int(i): k for k, i in enumerate(index)}
        if extra := sorted(set(content) - {"index", "x", "original"}):
            raise ValueError(f"holds {extra[0]!r}, which no evaluation writes")
    except Exception as error:  # missing, or damaged in any way
        raise RunError(str(path), f"damaged or missing ({type(error).__name__}: {error})") from error
    originals = {}
    for at, row in enumerate(rows):
        if not row["example"]:
            continue
        who = f"{folder / 'ledger.csv'}, row {at + 1} (image {row['index']})"
        k = place.get(int(row["index"]))
        if k is None or digest(x[k]) != row["example"]:
            raise RunError(who, "its example is missing" if k is None else "its example was altered")
        clean = original[k]
        if digest(floats(clean)) != row["image"]:
            raise RunError(who, "its original image was altered")
        ledger.examples[at], originals[at] = x[k], clean
    return originals, tuple(map(int, index))


def _by_index(held: Held) -> dict[int, Tensor]:
    return {int(held.ledger.index[at]): x for at, x in held.originals.items()}


def fingerprint_of(part: Part) -> str:
    """A hash of images and labels."""
    return digest(part.x)[:8] + digest(part.y)[:8]


def _shard(task: Task) -> list[int] | None:
    return None if task.shard == (1, 1) else list(task.shard)
