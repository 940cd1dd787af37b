"""Measure margins on a model: run the attack paths, evaluate the margins, compare with strong attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustmail.attacks.torchattacks import torchattack
from robustmail.data.image_files import data_fingerprint
from robustmail.data.testsets import TestSet
from robustmail.errors import DataError, PluginError, RunError
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, check_eps, passes_per_image, unique_names
from robustmail.evaluation.evaluator import attack_result, batch_sizer, clean_pass, run_attack
from robustmail.evaluation.ledger import BROKE, Ledger
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.statistics import wilson
from robustmail.evaluation.task import describe_data, spec_differences
from robustmail.fields import describe, fingerprint
from robustmail.margin_lab.attack_paths import AttackPath, PathSpec, path_specs, run_path
from robustmail.margin_lab.margin_values import MarginValues, margin_cost, margin_values
from robustmail.margin_lab.results import AREAS, CAUSES, Area, Cost, Findings, LabResults, RankCorrelation
from robustmail.margin_lab.statistics import (
    auroc_behind,
    continuity,
    critical_among,
    hidden,
    quartiles,
    rank_correlations,
    spread,
    truth,
)
from robustmail.memory import memory_of
from robustmail.norms import Norm
from robustmail.records import AttackProgress, AttackResult, ProgressUpdate
from robustmail.runtime.files import atomic_write_json
from robustmail.runtime.provenance import provenance
from robustmail.runtime.rng import derive_seed
from robustmail.step import Attack, Margin
from robustmail.text import plural

__all__ = [
    "DEFAULT_ATTACKS",
    "MarginTask",
    "check_same_measurement",
    "measure_costs",
    "measure_margins",
    "save_lab",
    "json_floats",
]

DEFAULT_ATTACKS = ("pgd100", "cw", "apgd")
FAB_STEPS = 20
FAB_REACH = 8  # FAB searches up to so many eps away
FORMAT = 1
RANK_TOLERANCE = 1e-3  # a mean change of rank below this share of all ranks counts as none

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass
class MarginTask:
    """What to measure, and how.

    subject: the model.
    data: the images, at least two.
    margins: by name.
    eps: radius of the ball, above 0, in pixels of [0, 1].
    norm: "linf" or "l2".
    against: names of attacks, or attacks; an example is broken if any of them breaks it.
    steps: of the training attack, PGD, and of every path.
    seed: of the attacks' noise and of the bootstrap.
    batch: images under attack at once; changes no number.

    Raises RecipeError: unknown attack, or eps not positive. Raises DataError: fewer than two images.
    Raises PluginError: a margin with memory.
    """

    subject: LoadedModel
    data: TestSet
    margins: Mapping[str, Margin]
    eps: float
    norm: Norm = "linf"
    against: tuple[str | Attack, ...] = DEFAULT_ATTACKS
    steps: int = 10
    seed: int = 0
    batch: int | None = None
    attacks: list[AttackSpec] = field(init=False)

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        if len(self.data.part.y) < 2:
            raise DataError(self.data.name, "one image is not enough to rank margins", "Pass --n 100 or more.")
        for name in (name for name, margin in self.margins.items() if memory_of(margin)):
            wrong = "remembers what it saw in training, which a checkpoint does not hold"
            raise PluginError(f"margin {name}", wrong, "Leave it out.")
        classes = self.subject.classes
        self.attacks = unique_names([attack_spec(attack, self.eps, classes, self.norm) for attack in self.against])

    @property
    def fab(self) -> AttackSpec:
        """Untargeted FAB, which measures the distance to the boundary; it searches far outside the eps-ball."""
        reach = min(FAB_REACH * self.eps, 1.0 if self.norm == "linf" else 16.0)
        fab = torchattack(
            "FAB",
            norm={"linf": "Linf", "l2": "L2"}[self.norm],
            eps=reach,
            steps=FAB_STEPS,
            n_classes=self.subject.classes,
            multi_targeted=False,
        )
        return AttackSpec("fab", {"fab": fab}, reach, self.norm)

    @property
    def paths(self) -> list[PathSpec]:
        """The attack paths, the reference first."""
        return path_specs(self.eps, self.norm, self.steps, self.seed)

    @property
    def spec(self) -> dict[str, Any]:
        """What identifies the measurement, as plain values."""
        return {
            **self.subject.spec,
            "data": self.data.name,
            "data_given": self.data.given,
            "margins": list(self.margins),
            "against": [attack.name for attack in self.attacks],
            "steps": self.steps,
            "eps": self.eps,
            "norm": self.norm,
            "n": len(self.data.part.y),
            "seed": self.seed,
        }

    @property
    def settings(self) -> dict[str, str]:
        """Every attack and margin with all its parameters, as text."""
        texts = {f"path: {path.name}": f"{describe(path.attack)}, seed {path.seed}" for path in self.paths}
        texts |= {stage: text for attack in (*self.attacks, self.fab) for stage, text in attack.settings.items()}
        return texts | {f"margin: {name}": fingerprint(margin) for name, margin in self.margins.items()}

    @property
    def forecast(self) -> str:
        """One line: the amount of work, and its cost at most."""
        paths = sum(1 + 3.0 * self.steps if path.name != "LM-PGD" else 11.0 * self.steps for path in self.paths)
        attacks = sum(passes_per_image(attack.name) for attack in self.attacks)
        fab = FAB_STEPS * (1 + 2.0 * min(self.subject.classes, 10))
        return (
            f"{plural(len(self.data.part.y), 'image')}: {len(self.paths)} attack paths, "
            f"{plural(len(self.margins), 'margin')}, then "
            f"{', '.join(attack.name for attack in self.attacks)} and FAB; at most about "
            f"{paths + attacks + fab:,.0f} forward passes per image"
        )


def measure_costs(task: MarginTask) -> tuple[dict[str, Cost], Cost]:
    """Count (the passes of each margin, the passes of the training attack), in a dry run on random images.

    Raises PluginError: a margin breaks its contract; so this is called before anything expensive.
    """
    c, h, w = task.data.part.x.shape[1:]
    costs = {
        name: margin_cost(margin, task.steps, task.subject.classes, (c, h, w)) for name, margin in task.margins.items()
    }
    return {name: cost for name, (cost, _) in costs.items()}, next(iter(costs.values()))[1]


def measure_margins(task: MarginTask) -> Iterator[AttackProgress | AttackResult | ProgressUpdate | LabResults]:
    """Measure; yields progress and the results of attacks, then the results of the measurement.

    Computed in float32, in slices of one size, with random numbers that depend on image and seed alone: the same task
    gives the same numbers for every batch size.

    Raises PluginError: a margin breaks its contract. Raises also what an attack raises.
    """
    costs, attack_cost = measure_costs(task)
    model, part = task.subject.model, task.data.part.loaded()
    sizer = batch_sizer(model, part, task.batch)
    ledger = clean_pass(model, part, sizer)
    paths: list[AttackPath] = []
    for spec in task.paths:
        for record in run_path(model, part, spec, sizer):
            if isinstance(record, AttackPath):
                paths.append(record)
            else:
                yield record
    values: dict[str, MarginValues] = {}
    for update in margin_values(model, part, paths, task.margins, task.seed, sizer.pass_size):
        if isinstance(update, ProgressUpdate):
            yield update
        else:
            values = update
    for attack in task.attacks:
        yield from run_attack(model, part, ledger, attack, task.seed, sizer, keep_examples=False)
        yield attack_result(ledger, attack, task.seed)
    fab_ledger = clean_pass(model, part, sizer)
    yield from run_attack(model, part, fab_ledger, task.fab, task.seed, sizer, keep_examples=False)
    outcomes = _Outcomes.of(ledger, fab_ledger, paths, task)
    yield _lab_results(task, outcomes, values, costs, attack_cost)


@dataclass(frozen=True)
class _Outcomes:
    """What the attacks did to the examples, [N] each."""

    label: npt.NDArray[np.int64]
    correct: Bools
    """without an attack"""
    area: npt.NDArray[np.str_]
    broken: Bools
    """by any attack or path, or misclassified without an attack"""
    critical: Bools
    distance: Floats
    fab_missed: Bools
    """broken by an attack inside the ball, where FAB found nothing"""

    @classmethod
    def of(cls, ledger: Ledger, fab_ledger: Ledger, paths: list[AttackPath], task: MarginTask) -> _Outcomes:
        correct, broken_in_training = ledger.right.numpy(), paths[0].broken.numpy()
        area = np.where(~correct, "wrong", np.where(broken_in_training, "boundary", "safe"))
        broken_by_fab = (fab_ledger.outcome("fab") == BROKE).numpy()
        distance = np.where(broken_by_fab, fab_ledger.distance.numpy(), np.float32(task.fab.eps)).astype(np.float32)
        distance[~correct] = 0.0
        broken = ~ledger.stands.numpy() | np.any([path.broken.numpy() for path in paths], axis=0)
        fab_missed = broken & correct & (distance > task.eps * (1 + 1e-4))
        critical = critical_among(correct, broken_in_training, broken)
        return cls(ledger.label.numpy(), correct, area, broken, critical, distance, fab_missed)


def _lab_results(
    task: MarginTask, outcomes: _Outcomes, values: dict[str, MarginValues], costs: dict[str, Cost], attack_cost: Cost
) -> LabResults:
    seed = derive_seed(task.seed, "bootstrap") % 2**32
    findings = [_findings(name, by_cause, outcomes, costs[name], seed) for name, by_cause in values.items()]
    findings.sort(key=_rank_key, reverse=True)
    findings = [_compare_with_best(row, findings[0], values, outcomes, seed) for row in findings]
    margins = {row.margin: values[row.margin]["draw"][0] for row in findings if not row.wrong}
    return LabResults(
        name=task.subject.name,
        n=len(outcomes.label),
        spec=task.spec,
        settings=task.settings,
        areas=tuple(_area(name, outcomes.broken[outcomes.area == name]) for name in AREAS),
        critical=int(outcomes.critical.sum()),
        fab_missed=int(outcomes.fab_missed.sum()),
        findings=tuple(findings),
        attack_cost=attack_cost,
        images={
            "label": outcomes.label.tolist(),
            "area": outcomes.area.tolist(),
            "broken": outcomes.broken.tolist(),
            "critical": outcomes.critical.tolist(),
            "distance": json_floats(outcomes.distance),
        },
        margins={name: json_floats(margin) for name, margin in margins.items()},
        weights=task.subject.weights,
        data=describe_data(task.data, task.subject.classes, data_fingerprint(task.data.part)),
        provenance={k: v for k, v in provenance(task.subject.device).items() if k != "date"},
        rank_correlation=_rank_correlation(margins, outcomes.correct, seed),
    )


def _nonfinite_message(values: MarginValues) -> str:
    """Why a margin cannot be measured; empty if it can."""
    all_values = np.concatenate(list(values.values()))
    bad = int((~np.isfinite(all_values)).any(0).sum())
    return f"NaN or infinite on {bad:,} of {all_values.shape[1]:,} images" if bad else ""


def _findings(name: str, values: MarginValues, outcomes: _Outcomes, cost: Cost, seed: int) -> Findings:
    """The results for one margin, without the comparison with the best margin."""
    if message := _nonfinite_message(values):
        return Findings(name, cost, message)
    margin = values["draw"][0]
    spreads = {cause: spread(values[cause].astype(np.float64)) for cause in CAUSES}
    correct, broken, distance = outcomes.correct, outcomes.broken, outcomes.distance
    return Findings(
        name,
        cost,
        continuity=continuity(margin),
        spread=spreads,
        path_dependent=spreads["path"].rank > RANK_TOLERANCE,
        random=spreads["draw"].rank > RANK_TOLERANCE,
        everywhere=truth(margin, broken, distance, seed),
        right=truth(margin[correct], broken[correct], distance[correct], seed),
        areas={area: quartiles(margin[outcomes.area == area]) for area in AREAS if (outcomes.area == area).any()},
        hidden=hidden(margin, outcomes.area == "safe", outcomes.critical, seed),
    )


def _rank_correlation(margins: Mapping[str, Floats], correct: Bools, seed: int) -> RankCorrelation:
    """Of every two margins, over all examples and over the correct ones."""
    names = list(margins)
    if not names:
        return {}
    columns = np.stack([margins[name] for name in names])
    matrices = {
        "everywhere": rank_correlations(columns, seed),
        "right": rank_correlations(columns[:, correct], seed),
    }
    return {
        images: {name: dict(zip(names, row, strict=True)) for name, row in zip(names, matrix, strict=True)}
        for images, matrix in matrices.items()
    }


def _rank_key(findings: Findings) -> tuple[float, float]:
    """Margins are ranked by AUROC over all examples, then by the correlation with the distance."""
    if findings.everywhere is None:
        return -1.0, -1.0
    auroc, correlation = findings.everywhere.auroc.value, findings.everywhere.distance.value
    return (-1.0 if auroc is None else auroc), (-1.0 if correlation is None else correlation)


def _compare_with_best(
    findings: Findings, best: Findings, values: dict[str, MarginValues], outcomes: _Outcomes, seed: int
) -> Findings:
    if findings.wrong:
        return findings
    margin, best_margin = (values[row.margin]["draw"][0] for row in (findings, best))
    return replace(findings, behind=auroc_behind(best_margin, margin, outcomes.broken.astype(float), seed))


def _area(name: str, broken: Bools) -> Area:
    n, n_broken = len(broken), int(broken.sum())
    low, high = wilson(n_broken, n) if n else (0.0, 1.0)
    return Area(name, n, n_broken, low, high)


def json_floats(values: Floats) -> list[float]:
    """Convert float32 values, [N], for JSON: nine significant digits, which restore the same float32 values."""
    return [float(f"{value:.9g}") for value in values]


def save_lab(lab: LabResults, folder: Path) -> Path:
    """Write margins.json, the same bytes for the same results; returns its path."""
    path = folder / "margins.json"
    atomic_write_json(path, {"format": FORMAT, **asdict(lab)})
    return path


def check_same_measurement(task: MarginTask, lab: LabResults, folder: Path) -> None:
    """Raise RunError if a folder holds the results, `lab`, of another task; the message names what differs."""
    expected = {
        "spec": task.spec,
        "weights": task.subject.weights,
        "data": {"fingerprint": data_fingerprint(task.data.part)},
    }
    if differences := spec_differences(vars(lab), expected):
        raise RunError(
            str(folder), f"holds another lab ({'; '.join(differences[:4])})", "Pass another --out, or --fresh."
        )
