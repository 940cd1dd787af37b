"""From a model, images and margins to findings: paths are walked, margins asked, the truth found by strong attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path as File
from typing import Any

import numpy as np
import numpy.typing as npt

from robustmail.attacks.torchattacks import torchattack
from robustmail.data.dataset import data_fingerprint
from robustmail.data.testsets import TestSet
from robustmail.errors import DataError, RunError
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, check_eps
from robustmail.evaluation.attack_specs import passes_per_image as passes_of
from robustmail.evaluation.evaluator import attack_result, batch_sizer, clean_pass, run_attack, unique_names
from robustmail.evaluation.ledger import BROKE, Ledger
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.statistics import wilson
from robustmail.evaluation.task import describe_data, spec_differences
from robustmail.fields import describe, fingerprint
from robustmail.margin_lab.attack_paths import AttackPath, path_specs, run_paths
from robustmail.margin_lab.margin_values import Values, margin_cost, margin_values
from robustmail.margin_lab.results import AREAS, CAUSES, Area, Cost, Findings, Lab
from robustmail.margin_lab.statistics import auroc_behind, continuity, critical_among, hidden, quartiles, spread, truth
from robustmail.norms import Norm
from robustmail.records import AttackProgress, AttackResult, ProgressUpdate
from robustmail.runtime.files import atomic_write_json
from robustmail.runtime.provenance import provenance
from robustmail.runtime.rng import derive_seed
from robustmail.step import Attack, Margin
from robustmail.text import plural

__all__ = ["AGAINST", "MarginTask", "paired_auroc", "measure_margins", "make_task", "same_measurement", "save_lab"]

AGAINST = ("pgd100", "cw", "apgd")
FAB_STEPS = 20
FAR = 8  # FAB looks so many eps away
FORMAT = 1
CHANGES = 1e-3  # of all ranks: what changes a rank by less, on average, is not called a change

Found = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass
class MarginTask:
    """What to measure, on what, and with what.

    margins: by name. against: the attacks that decide who is broken, together the strongest at hand. steps: of the
    training attack and of every path. Raises RecipeError for an unknown attack or a budget of nothing, DataError for
    too few images.
    """

    subject: LoadedModel
    data: TestSet
    margins: Mapping[str, Margin]
    eps: float
    norm: Norm = "linf"
    against: tuple[str | Attack, ...] = AGAINST
    steps: int = 10
    seed: int = 0
    batch: int | None = None
    attacks: list[AttackSpec] = field(init=False)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        if len(self.data.part.y) < 2:
            raise DataError(self.data.name, "is one image, and a margin compares", "Pass --n 100 at least.")
        classes = self.subject.classes
        self.attacks = unique_names([attack_spec(attack, self.eps, classes, self.norm) for attack in self.against])

    @property
    def nearest(self) -> AttackSpec:
        """FAB, untargeted, for the smallest distance; it looks far beyond the ball."""
        reach = min(FAR * self.eps, 1.0 if self.norm == "linf" else 16.0)
        fab = torchattack("FAB", norm={"linf": "Linf", "l2": "L2"}[self.norm], eps=reach, steps=FAB_STEPS,
                          n_classes=self.subject.classes, multi_targeted=False)  # fmt: skip
        return AttackSpec("fab", {"fab": fab}, reach, self.norm)

    @property
    def paths(self) -> list[Any]:
        """The attack paths, the reference first."""
        return path_specs(self.eps, self.norm, self.steps, self.seed)

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the measurement, in plain values."""
        return {
            **self.subject.spec, "data": self.data.name, "data_given": self.data.given,
            "margins": list(self.margins), "against": [what.name for what in self.attacks], "steps": self.steps,
            "eps": self.eps, "norm": self.norm, "n": len(self.data.part.y), "seed": self.seed,
        }  # fmt: skip

    @property
    def settings(self) -> dict[str, str]:
        """Every attack and margin spelt out."""
        said = {f"path: {path.name}": f"{describe(path.attack)}, seed {path.seed}" for path in self.paths}
        said |= {stage: text for what in (*self.attacks, self.nearest) for stage, text in what.settings.items()}
        return said | {f"margin: {name}": fingerprint(margin) for name, margin in self.margins.items()}

    @property
    def forecast(self) -> str:
        """What is about to be done, and what it costs at most."""
        paths = sum(1 + 3.0 * self.steps if path.name != "LM-PGD" else 11.0 * self.steps for path in self.paths)
        strong = sum(passes_of(what.name) for what in self.attacks)
        fab = FAB_STEPS * (1 + 2.0 * min(self.subject.classes, 10))
        return (
            f"{plural(len(self.data.part.y), 'image')}: {len(self.paths)} attack paths, "
            f"{plural(len(self.margins), 'margin')}, then "
            f"{', '.join(what.name for what in self.attacks)} and FAB; about {paths + strong + fab:,.0f} forward "
            "passes an image at most"
        )


def make_task(task: MarginTask) -> tuple[dict[str, Cost], Cost]:
    """(what each margin costs, what the training attack costs); a margin that breaks its contract fails here, before
    anything expensive (raises PluginError)."""
    c, h, w = task.data.part.x.shape[1:]
    found = {
        name: margin_cost(margin, task.steps, task.subject.classes, (c, h, w)) for name, margin in task.margins.items()
    }
    return {name: mine for name, (mine, _) in found.items()}, next(iter(found.values()))[1]


def measure_margins(task: MarginTask) -> Iterator[AttackProgress | AttackResult | ProgressUpdate | Lab]:
    """Measure; the last thing yielded is the lab's findings, all else says how far it is.

    Everything is decided in float32, in slices of one size, with noise of each image's own: the same task gives the
    same findings, whatever the batch. Raises PluginError for a margin that breaks its contract, and what attacks raise.
    """
    costs, attack_cost = make_task(task)
    model, part = task.subject.model, task.data.part
    room = batch_sizer(model, task.batch)
    ledger = clean_pass(model, part, room)
    paths: list[AttackPath] = []
    for path in task.paths:
        for record in run_paths(model, part, path, room):
            if isinstance(record, AttackPath):
                paths.append(record)
            else:
                yield record
    answers: dict[str, Values] = {}
    for answer in margin_values(model, part, paths, task.margins, task.seed, room.pass_size):
        if isinstance(answer, ProgressUpdate):
            yield answer
        else:
            answers = answer
    for what in task.attacks:
        yield from run_attack(model, part, ledger, what, task.seed, room, keep_examples=False)
        yield attack_result(ledger, what, task.seed)
    nearest = clean_pass(model, part, room)
    yield from run_attack(model, part, nearest, task.nearest, task.seed, room, keep_examples=False)
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
    def of(cls, ledger: Ledger, nearest: Ledger, paths: list[AttackPath], task: MarginTask) -> _Facts:
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
    task: MarginTask, facts: _Facts, answers: dict[str, Values], costs: dict[str, Cost], attack_cost: Cost
) -> Lab:  # fmt: skip
    seed = derive_seed(task.seed, "bootstrap") % 2**32
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
            "critical": facts.critical.tolist(), "distance": paired_auroc(facts.distance),
        },
        margins={name: paired_auroc(values["draw"][0]) for name, values in answers.items() if _wrong(values) == ""},
        weights=weights,
        data=describe_data(task.data, task.subject.classes),
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
    return replace(one, behind=auroc_behind(others, mine, facts.broken.astype(float), seed))


def _area(name: str, broken: Bools) -> Area:
    n, fell = len(broken), int(broken.sum())
    low, high = wilson(fell, n) if n else (0.0, 1.0)
    return Area(name, n, fell, low, high)


def paired_auroc(values: Found) -> list[float]:
    """float32 numbers in the shortest decimals that mean them."""
    return [float(f"{value:.9g}") for value in values]


def save_lab(found: Lab, folder: File) -> File:
    """Write margins.json, the same bytes for the same findings."""
    path = folder / "margins.json"
    atomic_write_json(path, {"format": FORMAT, **asdict(found)})
    return path


def same_measurement(task: MarginTask, there: Lab, folder: File) -> None:
    """Refuse to put one lab into another one's place (raises RunError naming what differs)."""
    here = {
        "spec": task.spec,
        "weights": task.subject.weights,
        "data": {"fingerprint": data_fingerprint(task.data.part)},
    }
    if said := spec_differences(vars(there), here):
        raise RunError(str(folder), f"holds another lab ({'; '.join(said[:4])})",
                       "Pass another --out, or --fresh to begin anew.")  # fmt: skip
