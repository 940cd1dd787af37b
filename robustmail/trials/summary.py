"""Statistics of a grid: mean, standard deviation and interval over seeds, and which rows are tied with the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from robustmail.errors import RunError, in_brief
from robustmail.evaluation.class_accuracies import CLASS_METRICS
from robustmail.markup import Html, card, table
from robustmail.runtime.untrusted import read_json

__all__ = [
    "LEGEND", "MARKS", "summary_card",
    "Measured", "Row", "SeedSpread", "Standing", "compared", "differences", "images_per_class", "read_accuracies",
    "rows", "seed_spread",
]  # fmt: skip

CONFIDENCE = 0.95
MARKS = {"best": " *", "tie": " =", "ahead": " +", "behind": "", "unknown": ""}
LEGEND = {
    "best": "* the best mean of the column, among the rows with the most seeds",
    "tie": "= not significantly different from it: the t-interval of the paired differences contains 0 "
    "(95 %, Bonferroni-corrected for the comparisons in the column)",
    "ahead": "+ better than it on the seeds that both rows have",
}


@dataclass(frozen=True)
class SeedSpread:
    """Mean, standard deviation (n - 1) and 95 % t-interval of the mean of n values; the last three None for n = 1."""

    n: int
    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Standing:
    """How a row compares with the best row of its column."""

    verdict: str
    """"best"; "tie": the difference is not significant; "behind"; "ahead": better on its seeds, of which it has fewer;
    "unknown": fewer than two seeds in common, or no other row"""
    lead: SeedSpread | None = None
    """best minus this row, seed by seed, with the interval that decides; None for the best itself"""


@dataclass(frozen=True)
class Measured:
    """One metric of one row: accuracy by seed, with its spread and comparison."""

    by_seed: dict[int, float]
    spread: SeedSpread
    standing: Standing
    difference: SeedSpread | None = None
    """this row minus the baseline, seed by seed; None without a baseline, and for the baseline itself"""


@dataclass(frozen=True)
class Row:
    """One row of a grid."""

    name: str
    metrics: dict[str, Measured] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    """seeds without results"""
    failed: dict[int, str] = field(default_factory=dict)
    """seeds that failed, with the error in one line"""


def seed_spread(values: Sequence[float], confidence: float = CONFIDENCE) -> SeedSpread:
    """mean +- t std / sqrt(n), t: the (1 + confidence) / 2 quantile of Student's t, n - 1 degrees of freedom."""
    if len(values) < 2:
        return SeedSpread(len(values), values[0])
    from scipy.stats import t

    mean, std = fmean(values), stdev(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return SeedSpread(len(values), mean, std, mean - half, mean + half)


def compared(column: Mapping[str, Mapping[int, float]]) -> dict[str, Standing]:
    """Compare the rows of one metric, {row: {seed: value}}, with the best row.

    The best is the highest mean among the rows with the most seeds. Another row is a tie if the t-interval of its
    differences to the best, seed by seed, contains 0. Runs of one seed share initial weights, order of the data and
    often the burn-in, so paired differences vary less than the means. Each of the k - 1 intervals has the level
    1 - 0.05 / (k - 1) (Bonferroni). The best is chosen after looking, so 5 to 10 in 100 grids of two to eight equal
    rows still show one behind; with plain 95 % intervals, 45 in 100 grids of eight rows. Few seeds make many ties.
    """
    most = max(map(len, column.values()), default=0)
    full = {row: values for row, values in column.items() if len(values) == most}
    best = max(full, key=lambda row: fmean(full[row].values()), default="")
    level = 1 - (1 - CONFIDENCE) / max(len(column) - 1, 1)
    standings = {}
    for row, values in column.items():
        leads = [column[best][seed] - values[seed] for seed in values if seed in column[best]]
        if len(leads) < 2 or len(column) < 2:
            standings[row] = Standing("unknown")
        elif row == best:
            standings[row] = Standing("best")
        else:
            lead = seed_spread(leads, level)
            assert lead.low is not None
            assert lead.high is not None
            standings[row] = Standing("behind" if lead.low > 0 else "ahead" if lead.high < 0 else "tie", lead)
    return standings


def differences(column: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, SeedSpread]:
    """Each row of one metric, {row: {seed: value}}, minus the row `baseline`, over the seeds that both have.

    Each of the k - 1 t-intervals has the level 1 - 0.05 / (k - 1) (Bonferroni), so that all of them hold together in 95
    of 100 grids.
    """
    level = 1 - (1 - CONFIDENCE) / max(len(column) - 1, 1)
    base = column.get(baseline, {})
    paired = {
        row: [values[seed] - base[seed] for seed in values if seed in base]
        for row, values in column.items()
        if row != baseline
    }
    return {row: seed_spread(values, level) for row, values in paired.items() if values}


def rows(
    names: Iterable[str], seeds: Sequence[int], accuracies: Mapping[tuple[str, int], Mapping[str, float]],
    failed: Mapping[tuple[str, int], str], baseline: str | None = None,
) -> list[Row]:  # fmt: skip
    """The rows of a grid, in order.

    names: of the rows.
    seeds: of the grid.
    accuracies: {(row, seed): {attack: accuracy}} of the finished runs.
    failed: {(row, seed): error in one line}.
    baseline: the row that the others are compared with, besides the best one.
    """
    names = list(names)
    metrics = list(dict.fromkeys(metric for by_attack in accuracies.values() for metric in by_attack))
    columns = {
        metric: {
            name: by_seed
            for name in names
            if (by_seed := {s: accuracies[name, s][metric] for s in seeds if metric in accuracies.get((name, s), {})})
        }
        for metric in metrics
    }
    standings = {metric: compared(column) for metric, column in columns.items()}
    gains = {metric: differences(column, baseline) if baseline else {} for metric, column in columns.items()}

    def measured(metric: str, name: str) -> Measured:
        by_seed = columns[metric][name]
        spread = seed_spread(list(by_seed.values()))
        return Measured(by_seed, spread, standings[metric][name], gains[metric].get(name))

    return [
        Row(
            name,
            {metric: measured(metric, name) for metric, column in columns.items() if name in column},
            tuple(s for s in seeds if (name, s) not in accuracies),
            {s: failed[name, s] for s in seeds if (name, s) in failed},
        )
        for name in names
    ]


def read_accuracies(folder: Path) -> dict[str, float] | None:
    """{metric: accuracy} of a finished run: attacks, then CLASS_METRICS; None for an unfinished one.

    Raises RunError: damaged results.
    """
    path = folder / "results.json"
    try:
        content = read_json(path)
        if not content["complete"]:
            return None
        attacks = {str(row["name"]): float(row["accuracy"]) for row in content["attacks"]}
        return attacks | dict(_worst_classes(content.get("worst_classes") or {}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        wrong = f"is damaged ({in_brief(error)})"
        raise RunError(str(path), wrong, "Delete the run's folder; the same command makes it again.") from error


def _worst_classes(entries: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    for kind, (worst_class, tail) in CLASS_METRICS.items():
        if kind not in entries:
            continue
        yield from ((worst_class, float(entries[kind]["accuracy"])), (tail, float(entries[kind]["tail"])))


def images_per_class(folder: Path) -> tuple[int, int] | None:
    """(fewest, most) test images of a class, from results that `read_accuracies` has read; None where unknown."""
    sizes = [int(row["n"]) for row in read_json(folder / "results.json").get("per_class") or ()]
    return (min(sizes), max(sizes)) if sizes else None


def summary_card(name: str, rows: Sequence[Row], seeds: Sequence[int]) -> Html:
    """The rows of a grid in a notebook: mean ± standard deviation over seeds in %, and what failed."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    cells: list[list[object]] = [
        [row.name, f"{len(seeds) - len(row.missing)} of {len(seeds)}",
         *(_mean_text(row.metrics[metric]) if metric in row.metrics else "–" for metric in metrics)]
        for row in rows
    ]  # fmt: skip
    verdicts = {measured.standing.verdict for row in rows for measured in row.metrics.values()}
    failed = [f"{row.name}, seed {seed}: FAILED: {error}" for row in rows for seed, error in row.failed.items()]
    legend = [text for verdict, text in LEGEND.items() if verdict in verdicts]
    return card(name, table("", ["row", "seeds", *metrics], cells), "Accuracy in %.", *legend, *failed)


def _mean_text(measured: Measured) -> str:
    std = f" ± {100 * measured.spread.std:.1f}" if measured.spread.std is not None else ""
    return f"{100 * measured.spread.mean:.1f}{std}{MARKS[measured.standing.verdict]}"
