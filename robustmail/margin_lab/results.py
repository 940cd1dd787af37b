"""What the lab finds: plain numbers, as they are written to JSON and read back; no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from robustmail.runtime.untrusted import check_shape

__all__ = [
    "AREAS", "CAUSES", "Area", "Continuity", "Cost", "Estimate", "Figure", "Findings", "Hidden", "Lab", "Per", "Spread",
    "Truth",
]  # fmt: skip

SHAPE = {
    "name": str, "n": int, "spec": {"own?": {"*": str}}, "weights": {"fingerprint": str}, "data": {"fingerprint": str},
}  # fmt: skip
"""What is compared of a margins.json, which anybody may have written"""
AREAS = ("wrong", "boundary", "safe")
CAUSES = ("draw", "path", "end", "both")


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval; None where it is not defined, as where no example is broken."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Continuity:
    """How finely a margin tells examples apart."""

    distinct: int
    """different values"""
    ties: float
    """share of the examples whose value another example has too"""
    largest: float
    """share of the examples that have the most frequent value"""
    verdict: str
    """continuous, tied, discrete or constant"""


@dataclass(frozen=True)
class Spread:
    """How much a margin of the same example changes when one thing is changed; 0 = not at all."""

    value: float | None
    """RMS over the examples of the standard deviation over paths, in standard deviations of the margin over examples;
    None where the margin is constant over examples and not over paths"""
    rank: float
    """mean over the examples of (highest - lowest) rank over the paths, as a share of all examples"""


@dataclass(frozen=True)
class Truth:
    """Does a low margin mean that help is needed? Each number over some examples."""

    n: int
    auroc: Estimate
    """P(margin of a broken example < margin of one that stands), ties half; 1/2 is guessing"""
    broken: Estimate
    """Spearman's rank correlation with standing (1) or being broken (0)"""
    distance: Estimate
    """Spearman's rank correlation with the smallest distance at which the example is broken"""


@dataclass(frozen=True)
class Per:
    """A margin within an area: its quartiles."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Hidden:
    """Critical examples, which stand under the training attack and not under the strongest, and whether they show."""

    at_maximum: int
    """examples that have the margin's largest value"""
    critical_at_maximum: int
    above_median: int
    """critical examples in the upper half of the ranks"""
    auroc: Estimate
    """P(margin of a critical example < margin of a safe one that stands under everything)"""


@dataclass(frozen=True)
class Cost:
    """Passes of the batch through the model that the margin adds to a training step of AT."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Findings:
    """Everything about one margin. `wrong` says why there is nothing more."""

    margin: str
    cost: Cost
    wrong: str = ""
    continuity: Continuity | None = None
    spread: dict[str, Spread] = field(default_factory=dict)
    """by what was changed: another draw of its own noise, another path to the same end, another end, or both"""
    path_dependent: bool | None = None
    random: bool | None = None
    everywhere: Truth | None = None
    right: Truth | None = None
    """over the examples that are right as they are"""
    behind: Estimate | None = None
    """AUROC of the best margin minus this one's, on the same resamples"""
    areas: dict[str, Per] = field(default_factory=dict)
    hidden: Hidden | None = None

    @property
    def tied_with_best(self) -> bool:
        """Can it not be told apart from the best margin at this n?"""
        return self.behind is not None and self.behind.low is not None and self.behind.low <= 0


@dataclass(frozen=True)
class Area:
    """One of the three areas of the paper, and what becomes of its examples under the strongest attack."""

    name: str
    n: int
    broken: int
    low: float
    """lower end of the 95 % Wilson interval of the share that is broken; 0 ... 1 where the area is empty"""
    high: float


@dataclass(frozen=True)
class Lab:
    """A measurement of some margins on one model and one set of images.

    findings: best margin first. images: {name: a value per image}: label, area, broken, distance, critical, and every
    margin under `margins`. settings: attacks, each spelt out. spec, weights, data, provenance: as in an evaluation.
    """

    name: str
    n: int
    spec: dict[str, Any]
    settings: dict[str, str]
    areas: tuple[Area, ...]
    critical: int
    fab_missed: int
    """examples that an attack breaks inside the ball and FAB only outside of it: how far FAB's distance is too large"""
    findings: tuple[Findings, ...]
    attack_cost: Cost
    images: dict[str, list[Any]]
    margins: dict[str, list[float]]
    weights: dict[str, Any]
    data: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Lab:
        """Read back what `dataclasses.asdict` and JSON made of one; raises what a missing or odd entry raises."""
        check_shape(raw, SHAPE)
        known = {name: value for name, value in raw.items() if name != "format"}
        known["areas"] = tuple(Area(**area) for area in raw["areas"])
        known["findings"] = tuple(map(_findings, raw["findings"]))
        return cls(**{**known, "attack_cost": Cost(**raw["attack_cost"])})


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures, redrawn from a model and images of one's own: everything that is drawn.

    which: 1a, 1b, 1c, 2 or 4. settings: the attacks that ran, each spelt out. values: what
    `robustmail.margin_lab.paper_figures` says of each. said: the caption, in sentences.
    drawable: False where there is no example of what the figure shows.
    """

    which: str
    name: str
    n: int
    spec: dict[str, Any]
    settings: dict[str, str]
    values: dict[str, Any]
    said: str
    drawable: bool
    provenance: dict[str, Any]


def _findings(raw: dict[str, Any]) -> Findings:
    found = {**raw, "cost": Cost(**raw["cost"])}
    if raw["wrong"]:
        return Findings(**found)
    hidden = {**raw["hidden"], "auroc": Estimate(**raw["hidden"]["auroc"])}
    found |= {
        "continuity": Continuity(**raw["continuity"]), "hidden": Hidden(**hidden), "behind": Estimate(**raw["behind"]),
        "spread": {cause: Spread(**spread) for cause, spread in raw["spread"].items()},
        "everywhere": _truth(raw["everywhere"]), "right": _truth(raw["right"]),
        "areas": {area: Per(**per) for area, per in raw["areas"].items()},
    }  # fmt: skip
    return Findings(**found)


def _truth(raw: dict[str, Any]) -> Truth:
    return Truth(raw["n"], *(Estimate(**raw[name]) for name in ("auroc", "broken", "distance")))
