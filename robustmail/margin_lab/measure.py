"""From a model, images and margins to findings: paths are walked, margins asked, the truth found by strong attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as File
from typing import Any

import numpy as np
import numpy.typing as npt

from robustmail.attacks.torchattacks import torchattack
from robustmail.data.dataset import fingerprint_of
from robustmail.data.testsets import TestSet
from robustmail.errors import DataError, RunError
from robustmail.evaluation.attack_specs import Plan, check_eps, plan
from robustmail.evaluation.attack_specs import cost as passes_of
from robustmail.evaluation.evaluator import attempt, look, named, room_of, verdict
from robustmail.evaluation.ledger import BROKE, Ledger
from robustmail.evaluation.model_loading import Subject
from robustmail.evaluation.statistics import wilson
from robustmail.evaluation.storage import told_of
from robustmail.evaluation.task import differences
from robustmail.fields import describe, identity
from robustmail.margin_lab.attack_paths import Path, plans, walk
from robustmail.margin_lab.margin_values import Values, cost, said
from robustmail.margin_lab.results import AREAS, CAUSES, Area, Cost, Findings, Lab
from robustmail.margin_lab.statistics import behind, continuity, critical_among, hidden, quartiles, spread, truth
from robustmail.norms import Norm
from robustmail.records import Attacked, Attacking, Measuring
from robustmail.runtime.files import write_json
from robustmail.runtime.provenance import provenance
from robustmail.runtime.rng import key
from robustmail.step import Attack, Margin
from robustmail.text import so_many

__all__ = ["AGAINST", "Task", "exactly", "lab", "prepare", "same", "save"]

AGAINST = ("pgd100", "cw", "apgd")
FAB_STEPS = 20
FAR = 8  # FAB looks so many eps away
FORMAT = 1
CHANGES = 1e-3  # of all ranks: what changes a rank by less, on average, is not called a change

Found = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass
class Task:
    """What to measure, on what, and with what.

    margins: by name. against: the attacks that decide who is broken, together the strongest at hand. steps: of the
    training attack and of every path. Raises RecipeError for an unknown attack or a budget of nothing, DataError for
    too few images.
    """

    subject: Subject
    data: TestSet
    margins: Mapping[str, Margin]
    eps: float
    norm: Norm = "linf"
    against: tuple[str | Attack, ...] = AGAINST
    steps: int = 10
    seed: int = 0
    batch: int | None = None
    attacks: list[Plan] = field(init=False)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        if len(self.data.part.y) < 2:
            raise DataError(self.data.name, "is one image, and a margin compares", "Pass --n 100 at least.")
        classes = self.subject.classes
        self.attacks = named([plan(attack, self.eps, classes, self.norm) for attack in self.against])

    @property
    def nearest(self) -> Plan:
        """FAB, untargeted, for the smallest distance; it looks far beyond the ball."""
        reach = min(FAR * self.eps, 1.0 if self.norm == "linf" else 16.0)
        fab = torchattack("FAB", norm={"linf": "Linf", "l2": "L2"}[self.norm], eps=reach, steps=FAB_STEPS,
                          n_classes=self.subject.classes, multi_targeted=False)  # fmt: skip
        return Plan("fab", {"fab": fab}, reach, self.norm)

    @property
    def paths(self) -> list[Any]:
        """The attack paths, the reference first."""
        return plans(self.eps, self.norm, self.steps, self.seed)

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the measurement, in plain values."""
        return {
            **self.subject.described, "data": self.data.name, "data_given": self.data.given,
            "margins": list(self.margins), "against": [what.name for what in self.attacks], "steps": self.steps,
            "eps": self.eps, "norm": self.norm, "n": len(self.data.part.y), "seed": self.seed,
        }  # fmt: skip

    @property
    def settings(self) -> dict[str, str]:
        """Every attack and margin spelt out."""
        said = {f"path: {path.name}": f"{describe(path.attack)}, seed {path.seed}" for path in self.paths}
        said |= {stage: text for what in (*self.attacks, self.nearest) for stage, text in what.settings.items()}
        return said | {f"margin: {name}": identity(margin) for name, margin in self.margins.items()}

    @property
    def forecast(self) -> str:
        """What is about to be done, and what it costs at most."""
        paths = sum(1 + 3.0 * self.steps if path.name != "LM-PGD" else 11.0 * self.steps for path in self.paths)
        strong = sum(passes_of(what.name) for what in self.attacks)
        fab = FAB_STEPS * (1 + 2.0 * min(self.subject.classes, 10))
        return (
            f"{so_many(len(self.data.part.y), 'image')}: {len(self.paths)} attack paths, "
            f"{so_many(len(self.margins), 'margin')}, then "
            f"{', '.join(what.name for what in self.attacks)} and FAB; about {paths + strong + fab:,.0f} forward "
            "passes an image at most"
        )


def prepare(task: Task) -> tuple[dict[str, Cost], Cost]:
    """(what each margin costs, what the training attack costs); a margin that breaks its contract fails here, before
    anything expensive (raises PluginError)."""
    c, h, w = task.data.part.x.shape[1:]
    found = {name: cost(margin, task.steps, task.subject.classes, (c, h, w)) for name, margin in task.margins.items()}
    return {name: mine for name, (mine, _) in found.items()}, next(iter(found.values()))[1]


def lab(task: Task) -> Iterator[Attacking | Attacked | Measuring | Lab]:
    """Measure; the last thing yielded is the lab's findings, all else says how far it is.

    Everything is decided in float32, in slices of one size, with noise of each image's own: the same task gives the
    same findings, whatever the batch. Raises PluginError for a margin that breaks its contract, and what attacks raise.
    """
    costs, attack_cost = prepare(task)
    model, part = task.subject.model, task.data.part
    room = room_of(model, task.batch)
    ledger = look(model, part, room)
    paths: list[Path] = []
    for path in task.paths:
        for record in walk(model, part, path, room):
            if isinstance(record, Path):
                paths.append(record)
            else:
                yield record
    answers: dict[str, Values] = {}
    for answer in said(model, part, paths, task.margins, task.seed, room.slice):
        if isinstance(answer, Measuring):
            yield answer
        else:
            answers = answer
    for what in task.attacks:
        yield from attempt(model, part, ledger, what, task.seed, room, keep=False)
        yield verdict(ledger, what, task.seed)
    nearest = look(model, part, room)
    yield from attempt(model, part, nearest, task.nearest, task.seed, room, keep=False)
    yield _summed(task, _Facts.of(ledger, nearest, paths, task), answers, costs, attack_cost)


@dataclass(frozen=True)
class _Facts:
    """What is true of the examples, [N] each."""

    label: npt.NDArray[np.int64]
    right: Bools
    area: npt.NDArray[np.str_]
    broken: Bools
    """by any attack or path, or wrong as it is"""
    critical: Bools
    distance: Found
    missed: Bools
    """broken by an attack inside the ball, where FAB found nothing"""

    @classmethod
    def of(cls, ledger: Ledger, nearest: Ledger, paths: list[Path], task: Task) -> _Facts:
        right, fell = ledger.right.numpy(), paths[0].broken.numpy()
        area = np.where(~right, "wrong", np.where(fell, "boundary", "safe"))
        found = (nearest.outcome("fab") == BROKE).numpy()
        distance = np.where(found, nearest.distance.numpy(), np.float32(task.nearest.eps)).astype(np.float32)
        distance[~right] = 0.0
        broken = ~ledger.stands.numpy() | np.any([path.broken.numpy() for path in paths], axis=0)
        missed = broken & right & (distance > task.eps * (1 + 1e-4))
        critical = critical_among(right, fell, broken)
        return cls(ledger.label.numpy(), right, area, broken, critical, distance, missed)


def _summed(
    task: Task, facts: _Facts, answers: dict[str, Values], costs: dict[str, Cost], attack_cost: Cost
) -> Lab:  # fmt: skip
    seed = key(task.seed, "bootstrap") % 2**32
    found = [_findings(name, values, facts, costs[name], seed) for name, values in answers.items()]
    found.sort(key=_worth, reverse=True)
    found = [_compared(one, found[0], answers, facts, seed) for one in found]
    masks = {name: facts.area == name for name in AREAS}
    areas = tuple(_area(name, facts.broken[mask]) for name, mask in masks.items())
    weights = task.subject.weights
    return Lab(
        name=task.subject.name, n=len(facts.label), spec=task.spec, settings=task.settings, areas=areas,
        critical=int(facts.critical.sum()), fab_missed=int(facts.missed.sum()), findings=tuple(found),
        attack_cost=attack_cost,
        images={
            "label": facts.label.tolist(), "area": facts.area.tolist(), "broken": facts.broken.tolist(),
            "critical": facts.critical.tolist(), "distance": exactly(facts.distance),
        },
        margins={name: exactly(values["draw"][0]) for name, values in answers.items() if _wrong(values) == ""},
        weights=weights,
        data=told_of(task.data, task.subject.classes),
        provenance={k: v for k, v in provenance(task.subject.device).items() if k != "date"},
    )  # fmt: skip


def _wrong(values: Values) -> str:
    """Why a margin cannot be measured, or nothing."""
    everything = np.concatenate(list(values.values()))
    bad = int((~np.isfinite(everything)).any(0).sum())
    return f"NaN or infinite on {bad:,} of {everything.shape[1]:,} images" if bad else ""


def _findings(name: str, values: Values, facts: _Facts, cost: Cost, seed: int) -> Findings:
    """Everything that follows for one margin but the comparison with the others."""
    if wrong := _wrong(values):
        return Findings(name, cost, wrong)
    margin = values["draw"][0]
    spreads = {cause: spread(values[cause].astype(np.float64)) for cause in CAUSES}
    safe = facts.area == "safe"
    right = facts.right
    return Findings(
        name, cost, "", continuity(margin), spreads,
        path_dependent=spreads["path"].rank > CHANGES, random=spreads["draw"].rank > CHANGES,
        everywhere=truth(margin, facts.broken, facts.distance, seed),
        right=truth(margin[right], facts.broken[right], facts.distance[right], seed),
        areas={name: quartiles(margin[facts.area == name]) for name in AREAS if (facts.area == name).any()},
        hidden=hidden(margin, safe, facts.critical, seed),
    )  # fmt: skip


def _worth(found: Findings) -> tuple[float, float]:
    """What margins are ranked by: AUROC over all examples, then the correlation with the distance."""
    if found.everywhere is None:
        return -1.0, -1.0
    first, second = found.everywhere.auroc.value, found.everywhere.distance.value
    return (-1.0 if first is None else first), (-1.0 if second is None else second)


def _compared(one: Findings, best: Findings, answers: dict[str, Values], facts: _Facts, seed: int) -> Findings:
    if one.wrong:
        return one
    mine, others = (answers[which.margin]["draw"][0] for which in (one, best))
    return replace(one, behind=behind(others, mine, facts.broken.astype(float), seed))


def _area(name: str, broken: Bools) -> Area:
    n, fell = len(broken), int(broken.sum())
    low, high = wilson(fell, n) if n else (0.0, 1.0)
    return Area(name, n, fell, low, high)


def exactly(values: Found) -> list[float]:
    """float32 numbers in the shortest decimals that mean them."""
    return [float(f"{value:.9g}") for value in values]


def save(found: Lab, folder: File) -> File:
    """Write margins.json, the same bytes for the same findings."""
    path = folder / "margins.json"
    write_json(path, {"format": FORMAT, **asdict(found)})
    return path


def same(task: Task, there: Lab, folder: File) -> None:
    """Refuse to put one lab into another one's place (raises RunError naming what differs)."""
    here = {"spec": task.spec, "weights": task.subject.weights, "data": {"fingerprint": fingerprint_of(task.data.part)}}
    if said := differences(vars(there), here):
        raise RunError(str(folder), f"holds another lab ({'; '.join(said[:4])})",
                       "Pass another --out, or --fresh to begin anew.")  # fmt: skip
