"""What a folder holds, read back: the results of an evaluation or of a training run, and the ledger."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from robustmail.errors import RunError, in_brief
from robustmail.evaluation.class_accuracies import CLASS_SHAPE, WORST_SHAPE, ClassAccuracy, WorstClasses, read_classes
from robustmail.evaluation.notebook import accuracy_card
from robustmail.records import ATTACKED, AttackResult
from robustmail.runtime.untrusted import check_shape, read_json, read_text
from robustmail.text import format_eps, percent, plural

__all__ = [
    "LIGHTS",
    "Check",
    "Ledger",
    "Light",
    "Results",
    "Verdict",
    "read_ledger",
    "read_results",
    "refuse_old_run",
    "undamaged",
]

T = TypeVar("T")
LIGHTS = {
    "green": "no check found a reason to doubt this number",
    "yellow": "read the flags before you quote this number",
    "red": "do not quote this number",
    "grey": "too little was run to say whether to believe this number",
}
DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, csv.Error)

DATA = {"name?": str, "fingerprint?": str, "class_names?": [str]}
SHAPE = {
    "complete": bool, "attacks": [ATTACKED], "name?": str, "n": int,
    "spec": {"eps": float, "norm": str, "seed?": int, "model?": str}, "weights?": dict, "data?": DATA,
    "worst_case?": ATTACKED, "eight_bit?": ATTACKED, "training?": {"epoch": int, "burn_in?": int, "note?": str},
    "provenance?": {"data?": DATA, "recipe?": dict}, "per_class?": [CLASS_SHAPE], "worst_classes?": {"*": WORST_SHAPE},
}  # fmt: skip
"""What is read of a results.json, of an evaluation or of the evaluation in which a training run ends"""


@dataclass(frozen=True)
class Check:
    """One check of whether a number can be believed, with what it measured."""

    name: str
    light: str
    measured: str
    meaning: str


@dataclass(frozen=True)
class Light:
    """Whether the number can be believed."""

    colour: str
    gap: float | None
    """points between the best PGD number and the strongest attack"""
    flags: tuple[Check, ...]
    examined: tuple[Check, ...]


@dataclass(frozen=True)
class Results:
    """A results.json, of an evaluation or of a training run."""

    name: str
    complete: bool
    n: int
    eps: float
    norm: str
    seed: int | None
    shard: tuple[int, int] | None
    attacks: tuple[AttackResult, ...]
    worst: AttackResult | None
    eight_bit: AttackResult | None
    light: Light | None
    classes: dict[str, tuple[ClassAccuracy, ...]]
    """by kind, natural and robust"""
    worst_classes: dict[str, WorstClasses]
    """by kind; robust only where an attack was run"""
    raw: dict[str, Any]
    """the file as it is, for what only one reader needs"""

    @classmethod
    def of(cls, raw: dict[str, Any], folder: Path = Path()) -> Results:
        """Read a parsed results.json. Raises RunError: not one, damaged, of an older format."""
        refuse_old_run(raw, folder / "results.json")
        return undamaged(folder / "results.json", lambda: _results(raw, folder))

    def _repr_html_(self) -> str:
        light = f"Light: {self.light.colour}, {LIGHTS[self.light.colour]}." if self.light else "No light."
        flags = [f"{flag.name} ({flag.light}): {flag.measured}" for flag in self.light.flags] if self.light else []
        return accuracy_card(f"{self.name}: {self.setting}", self.rows, f"{self.claim}.", *self.caveats, light, *flags)

    @property
    def rows(self) -> tuple[AttackResult, ...]:
        """Every row: attacks, worst case, 8-bit images."""
        return self.attacks + tuple(row for row in (self.worst, self.eight_bit) if row)

    @property
    def quoted(self) -> AttackResult | None:
        """The row to quote: the worst case over all attacks, or the lowest row where that is not known."""
        return self.worst or min(self.attacks, key=lambda row: row.accuracy, default=None)

    @property
    def data(self) -> dict[str, Any]:
        """What is known of the images: name, fingerprint, and of an evaluation classes and shape."""
        return self.raw.get("data") or self.provenance.get("data") or {}

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit, hardware, date; of a training run also its recipe."""
        return self.raw.get("provenance") or {}

    @property
    def setting(self) -> str:
        """`1,000 images, eps 8/255 Linf, seed 0`"""
        parts = [plural(self.n, "image"), f"eps {format_eps(self.eps, self.norm)}"]
        return ", ".join(parts + ([f"seed {self.seed}"] if self.seed is not None else []))

    @property
    def claim(self) -> str:
        """The sentence to quote."""
        if (row := self.quoted) is None:
            return "nothing was run yet"
        tried = [a.name for a in self.attacks if a.name != "nat"]
        of = f"{percent(row.accuracy)} of {plural(row.n, 'image')}"
        if not tried:
            return f"{of} are classified correctly; no attack was run"
        under = _listed(tried) if row is self.worst else row.name
        return f"{of} stand{'s' * (row.n == 1)} under {under} at eps {format_eps(self.eps, self.norm)}"

    @property
    def caveats(self) -> list[str]:
        """What must be said with the number."""
        caveats = [] if self.complete else ["The evaluation is not finished: numbers can only fall."]
        if self.shard:
            caveats.append(f"This is shard {self.shard[0]} of {self.shard[1]}, not the whole set.")
        tried = [row.name for row in self.attacks if row.name != "nat"]
        if tried and "aa" not in tried:
            caveats.append("An upper bound: aa was not among the attacks.")
        return caveats + [f"{row.name}: {row.settings['note']}" for row in self.attacks if "note" in row.settings]


@dataclass(frozen=True)
class Verdict:
    """One row of the ledger: what became of an image."""

    index: int
    label: int
    predicted: int
    margin: float
    broken_by: str
    broken_as: int | None

    @property
    def fate(self) -> str:
        """`wrong` as it is, `broken` by an attack, or it `stands`."""
        if self.broken_by == "natural" or self.predicted != self.label:
            return "wrong"
        return "broken" if self.broken_by else "stands"


@dataclass(frozen=True)
class Ledger:
    """A row per image, and the stages of the attacks in the order in which they were run."""

    stages: tuple[str, ...]
    verdicts: tuple[Verdict, ...]


def read_results(folder: Path) -> Results:
    """The results of a folder; raises RunError where it has none or they are damaged."""
    path = folder / "results.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise RunError(
            str(folder), "has no results.json", "Pass a folder that robustmail eval or robustmail run wrote."
        ) from None
    except OSError as error:
        raise RunError(str(path), f"cannot be read ({error})") from error
    except ValueError as error:
        raise _damaged(path, error) from error
    return Results.of(raw, folder)


def read_ledger(folder: Path) -> Ledger | None:
    """The ledger of an evaluation, None where there is none; raises RunError where it is damaged."""
    path = folder / "ledger.csv"
    if not path.exists():
        return None
    return undamaged(path, lambda: _ledger(path))


def refuse_old_run(raw: Any, path: Path) -> None:
    """Refuse the results of a training run from before a run ended in an evaluation (raises RunError)."""
    weights = raw.get("weights") if isinstance(raw, dict) and "format" not in raw else None
    if isinstance(weights, dict) and "epoch" in weights:
        wrong = "was written by an older version of robustmail, in another format"
        raise RunError(str(path), wrong, "Delete it; the command that made the run evaluates it again.")


def undamaged(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; raises RunError where it stumbles over something missing or of another type."""
    try:
        return read()
    except DAMAGED as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(str(path), f"is damaged ({in_brief(error)})", "Restore it, or evaluate again into another folder.")


def _results(raw: dict[str, Any], folder: Path) -> Results:
    check_shape(raw, SHAPE, "it")
    attacks = tuple(map(_row, raw["attacks"]))
    spec, shard, light = raw["spec"], raw.get("shard"), raw.get("believable")
    classes, worst_classes = read_classes(raw)
    return Results(
        name=str(raw.get("name") or "/".join(folder.absolute().parts[-2:])),
        complete=bool(raw["complete"]),
        n=int(raw["n"]),
        eps=float(spec["eps"]),
        norm=str(spec["norm"]),
        seed=spec.get("seed"),
        shard=(int(shard[0]), int(shard[1])) if shard else None,
        attacks=attacks,
        worst=_row(raw["worst_case"]) if raw.get("worst_case") else None,
        eight_bit=_row(raw["eight_bit"]) if raw.get("eight_bit") else None,
        light=_light(light) if light else None,
        classes=classes,
        worst_classes=worst_classes,
        raw=raw,
    )


def _row(row: dict[str, Any]) -> AttackResult:
    row = {field.name: row[field.name] for field in fields(AttackResult) if field.name in row}
    settings = {str(k): str(v) for k, v in row.pop("settings", {}).items()}
    done = AttackResult(**row, settings=settings)
    return AttackResult(
        str(done.name), int(done.correct), int(done.n), float(done.accuracy), float(done.low), float(done.high),
        float(done.seconds), done.settings,
    )  # fmt: skip


def _light(raw: dict[str, Any]) -> Light:
    colour, gap = raw["light"], raw.get("gap")
    checks = [
        tuple(
            Check(str(c["name"]), str(c.get("light", light)), str(c.get("measured", "")), str(c.get("meaning", "")))
            for c in raw.get(kind) or ()
        )
        for kind, light in (("flags", colour), ("examined", "green"))
    ]
    return Light(colour if colour in LIGHTS else "grey", None if gap is None else float(gap), *checks)


def _ledger(path: Path) -> Ledger:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names = list(reader.fieldnames or ())
    stages = tuple(names[names.index("distance") + 1 : names.index("rounded")])
    return Ledger(stages, tuple(map(_verdict, reader)))


def _verdict(row: dict[str, str]) -> Verdict:
    index, label, predicted = (int(row[name]) for name in ("index", "label", "predicted"))
    became = int(row["broken_as"]) if row["broken_as"] else None
    return Verdict(index, label, predicted, float(row["margin"]), row["broken_by"], became)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
