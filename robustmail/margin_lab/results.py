"""Results of the margin lab as plain numbers without tensors. Field names are the keys of the JSON files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from robustmail.markup import card, table
from robustmail.runtime.untrusted import check_shape
from robustmail.text import format_eps, percent, plural

__all__ = [
    "AREAS",
    "CAUSES",
    "Area",
    "Continuity",
    "Cost",
    "Estimate",
    "Figure",
    "Findings",
    "Hidden",
    "LabResults",
    "Quartiles",
    "RankCorrelation",
    "Spread",
    "Truth",
]

SHAPE = {
    "name": str, "n": int, "spec": {"own?": {"*": str}}, "weights": {"fingerprint": str}, "data": {"fingerprint": str},
}  # fmt: skip
"""What is compared of a margins.json, which anybody may have written"""
AREAS = ("wrong", "boundary", "safe")
"""Examples that are misclassified without an attack, under the training attack, or not by it."""
CAUSES = ("draw", "path", "end", "both")
"""What changes between two values of a margin; see `margin_values`."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval; None where undefined, such as an AUROC without broken examples."""

    value: float | None
    low: float | None = None
    high: float | None = None


RankCorrelation = dict[str, dict[str, dict[str, Estimate]]]


@dataclass(frozen=True)
class Continuity:
    """How finely a margin distinguishes examples."""

    distinct: int
    """number of distinct values"""
    ties: float
    """share of the examples that have the same value as another example"""
    largest: float
    """share of the examples that have the most frequent value"""
    verdict: str
    """continuous, tied, discrete or constant"""


@dataclass(frozen=True)
class Spread:
    """How much the margin of an example changes when one thing is changed; 0 = not at all."""

    value: float | None
    """RMS over examples of the standard deviation over paths, divided by the standard deviation over examples; None
    where the margin is constant over examples and varies over paths"""
    rank: float
    """mean over examples of (highest - lowest rank over the paths) / N"""


@dataclass(frozen=True)
class Truth:
    """How well a low margin predicts that an example is broken, over n examples."""

    n: int
    auroc: Estimate
    """P(margin of a broken example < margin of an unbroken one), ties count 1/2; 0.5 is guessing"""
    broken: Estimate
    """Spearman's rank correlation with 1 for unbroken and 0 for broken"""
    distance: Estimate
    """Spearman's rank correlation with the smallest distance at which FAB breaks the example"""


@dataclass(frozen=True)
class Quartiles:
    """The quartiles of a margin within an area."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Hidden:
    """Where a margin ranks the critical examples: correct under the training attack, broken by a stronger one."""

    at_maximum: int
    """examples that have the margin's largest value"""
    critical_at_maximum: int
    above_median: int
    """critical examples in the upper half of the ranks"""
    auroc: Estimate
    """P(margin of a critical example < margin of a safe one that no attack breaks)"""


@dataclass(frozen=True)
class Cost:
    """Passes of a batch through the model: those that a margin adds to a training step of AT, or those of an attack."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Findings:
    """The results for one margin. `wrong`: why it could not be measured, empty if it could; the rest is then None."""

    margin: str
    cost: Cost
    wrong: str = ""
    continuity: Continuity | None = None
    spread: dict[str, Spread] = field(default_factory=dict)
    """by what was changed, see `CAUSES`"""
    path_dependent: bool | None = None
    random: bool | None = None
    everywhere: Truth | None = None
    """over all examples"""
    right: Truth | None = None
    """over the examples that are classified correctly without an attack"""
    behind: Estimate | None = None
    """AUROC of the best margin minus that of this one, on the same resamples"""
    areas: dict[str, Quartiles] = field(default_factory=dict)
    hidden: Hidden | None = None

    @property
    def tied_with_best(self) -> bool:
        """Is the difference to the best margin not significant at this n?"""
        return self.behind is not None and self.behind.low is not None and self.behind.low <= 0


@dataclass(frozen=True)
class Area:
    """One of the paper's three areas (see `AREAS`) and how many of its examples are broken by any attack."""

    name: str
    n: int
    broken: int
    low: float
    """lower end of the 95 % Wilson interval of the broken share; the interval is 0 to 1 where the area is empty"""
    high: float


@dataclass(frozen=True)
class LabResults:
    """The measurement of several margins on one model and one set of n images; content of margins.json.

    settings: every attack and margin with all its parameters.
    critical: number of critical examples, see `Hidden`.
    findings: one entry for each margin, the best first.
    attack_cost: passes of the training attack.
    images: {column: a value per image} with the columns label, area, broken, critical and distance.
    margins: {margin: a value per image}.
    rank_correlation: {set of images: {margin: {margin: Spearman's rank correlation}}} over the sets `everywhere` and
        `right` of `Findings`, for the margins that could be measured; empty in files of earlier versions.
    spec, weights, data, provenance: as in the results of an evaluation.
    """

    name: str
    n: int
    spec: dict[str, Any]
    settings: dict[str, str]
    areas: tuple[Area, ...]
    critical: int
    fab_missed: int
    """examples that an attack breaks inside the eps-ball and FAB only outside: there FAB overestimates the distance"""
    findings: tuple[Findings, ...]
    attack_cost: Cost
    images: dict[str, list[Any]]
    margins: dict[str, list[float]]
    weights: dict[str, Any]
    data: dict[str, Any]
    provenance: dict[str, Any]
    rank_correlation: RankCorrelation = field(default_factory=dict)

    def _repr_html_(self) -> str:
        rows: list[list[object]] = [
            [found.margin, *(_cells(found, self) if not found.wrong else [found.wrong, *["–"] * 4]),
             f"{found.cost.forward} + {found.cost.backward}"]
            for found in self.findings
        ]  # fmt: skip
        heads = ["margin", "values", "other path", "broken, AUROC", "distance", "critical at maximum", "extra passes"]
        return card(
            f"{self.name}: {plural(self.n, 'image')}, eps {format_eps(self.spec['eps'], self.spec['norm'])}",
            table("", heads, rows),
            "How well a low margin foretells which images are broken (AUROC: 0.5 is guessing; = is not distinguishable "
            "from the best) and how far they lie from the boundary (rank correlation). Other path: how far ranks move.",
        )

    @classmethod
    def of(cls, raw: dict[str, Any]) -> LabResults:
        """Rebuild from the content of margins.json. Raises LookupError or TypeError: an entry is missing or unknown."""
        check_shape(raw, SHAPE)
        fields = {name: value for name, value in raw.items() if name != "format"}
        fields["areas"] = tuple(Area(**area) for area in raw["areas"])
        fields["findings"] = tuple(map(_findings, raw["findings"]))
        fields["attack_cost"] = Cost(**raw["attack_cost"])
        fields["rank_correlation"] = {
            images: {one: {other: Estimate(**rho) for other, rho in row.items()} for one, row in rows.items()}
            for images, rows in raw.get("rank_correlation", {}).items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class Figure:
    """The data of one of the paper's figures for another model and other images; content of figure-WHICH.json.

    which: 1a, 1b, 1c, 2 or 4.
    name: of the model or models.
    n: number of images.
    settings: every attack that ran with all its parameters.
    values: what is drawn; each function of `robustmail.margin_lab.paper_figures.FIGURES` documents its keys.
    caption: in sentences.
    drawable: False where no image shows what the figure is about.
    """

    which: str
    name: str
    n: int
    spec: dict[str, Any]
    settings: dict[str, str]
    values: dict[str, Any]
    caption: str
    drawable: bool
    provenance: dict[str, Any]


def _cells(found: Findings, lab: LabResults) -> list[object]:
    """The cells of a margin that could be measured."""
    assert found.continuity is not None
    assert found.everywhere is not None
    assert found.hidden is not None
    distance = found.right.distance if found.right is not None else Estimate(None)
    tie = " =" if found.tied_with_best and found is not lab.findings[0] else ""  # the best comes first
    moved = percent(found.spread["path"].rank)
    maximum = f"{found.hidden.critical_at_maximum} of {lab.critical}"
    return [found.continuity.verdict, moved, _estimate(found.everywhere.auroc) + tie, _estimate(distance), maximum]


def _estimate(estimate: Estimate) -> str:
    if estimate.value is None:
        return "–"
    return f"{estimate.value:.3f}" + (
        f" ({estimate.low:.3f} – {estimate.high:.3f})" if estimate.low is not None else ""
    )


def _findings(raw: dict[str, Any]) -> Findings:
    fields = {**raw, "cost": Cost(**raw["cost"])}
    if raw["wrong"]:
        return Findings(**fields)
    hidden = {**raw["hidden"], "auroc": Estimate(**raw["hidden"]["auroc"])}
    fields |= {
        "continuity": Continuity(**raw["continuity"]),
        "spread": {cause: Spread(**spread) for cause, spread in raw["spread"].items()},
        "everywhere": _truth(raw["everywhere"]),
        "right": _truth(raw["right"]),
        "behind": Estimate(**raw["behind"]),
        "areas": {area: Quartiles(**quartiles) for area, quartiles in raw["areas"].items()},
        "hidden": Hidden(**hidden),
    }
    return Findings(**fields)


def _truth(raw: dict[str, Any]) -> Truth:
    return Truth(raw["n"], *(Estimate(**raw[name]) for name in ("auroc", "broken", "distance")))
