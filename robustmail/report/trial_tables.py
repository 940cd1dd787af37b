"""The results of a grid as tables, and the paper's tables with ours beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robustmail.errors import RunError, did_you_mean
from robustmail.report.tables import TextTable, as_latex, as_markdown, as_table
from robustmail.text import duration
from robustmail.trials.paper import METRICS, PaperTable, Scale
from robustmail.trials.summary import Measured, Row

__all__ = ["FORMATS", "paper_table", "saving", "trials_table"]

MARKS = {"best": " *", "tie": " =", "ahead": " +", "behind": "", "unknown": ""}
FORMATS = ("rich", "md", "csv", "latex")
RULES = {
    "best": "* the best mean of a column, among the rows with the most seeds",
    "tie": "= a tie with it: the t-interval of the differences, seed by seed, holds 0 "
    "(95 %, shared out over a column's comparisons)",
    "ahead": "+ better than it on the seeds that both have",
}


def trials_table(rows: Sequence[Row], seeds: Sequence[int], width: int | None = None) -> str:
    """Two lines a row: mean and standard deviation over seeds, and the 95 % t-interval of the mean."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    body, intervals, verdicts = [], False, set()
    for row in rows:
        found = [row.metrics.get(metric) for metric in metrics]
        body.append([row.name, _count(row, seeds), *(_cell(one, 1, MARKS) for one in found)])
        verdicts |= {one.standing.verdict for one in found if one is not None}
        if any(one is not None and one.spread.low is not None for one in found):
            body.append(["", "", *(_interval(one) for one in found)])
            intervals = True
    spread = f"mean ± standard deviation over seeds {_listed(seeds)}; below, the mean's 95 % t-interval"
    notes = [
        f"Accuracy in %, {spread if intervals else f'of seed {_listed(seeds)}'}",
        *(rule for verdict, rule in RULES.items() if verdict in verdicts),
        *(f"{row.name}, seed {seed}: FAILED: {error}" for row in rows for seed, error in row.failed.items()),
    ]
    return as_table(TextTable(["", "seeds", *metrics], body, notes), width)


def paper_table(
    number: int, table: PaperTable, scale: Scale, changed: Sequence[str], rows: Sequence[Row], seeds: Sequence[int],
    n: int | None, command: str, form: str = "rich", width: int | None = None,
) -> str:  # fmt: skip
    """The paper's rows and columns, three lines each: ours, the paper's, and the difference. What is missing is a dash.

    changed: overrides that came on top of the scale. n: test images; None for all. A terminal gets one decimal, for
    want of room. Raises RunError for an unknown format.
    """
    if form not in FORMATS:
        raise RunError(f"--format {form}", "no such format", did_you_mean(form, FORMATS))
    by_name = {row.name: row for row in rows}
    if form == "csv":
        return _csv(table, by_name, seeds, n)
    grid = _grid(number, table, scale, changed, by_name, seeds, n, command, 1 if form == "rich" else 2)
    write: dict[str, Callable[[TextTable], str]] = {
        "rich": lambda grid: as_table(grid, width), "md": as_markdown, "latex": as_latex,
    }  # fmt: skip
    return write[form](grid)


def saving(shared: Mapping[str, Any]) -> str:
    """What the shared epochs have saved, in a sentence; nothing where none were shared."""
    if not shared["steps_saved"]:
        return ""
    return (
        f"Epochs that runs share were trained once: {shared['steps_saved']:,} steps saved, "
        f"about {duration(shared['seconds_saved'])}"
    )


def _grid(
    number: int, table: PaperTable, scale: Scale, changed: Sequence[str], rows: Mapping[str, Row],
    seeds: Sequence[int], n: int | None, command: str, digits: int,
) -> TextTable:  # fmt: skip
    body = []
    for line in table.lines:
        row = rows[line.row]
        ours = [row.metrics.get(METRICS[column]) for column in table.columns]
        differences = [_difference(one, there, digits) for one, (there, _) in zip(ours, line.paper, strict=True)]
        body.append([line.name, "ours", *(_cell(one, digits, {}) for one in ours)])
        body.append([_count(row, seeds), "paper", *(f"{m:.{digits}f} ±{s:.{digits}f}" for m, s in line.paper)])
        body.append(["", "apart", *differences])
    images = "all test images" if n is None else f"the first {n:,} test images"
    how = f", but with {' '.join(changed)}" if changed else ""
    asked = {line.row: row for line in table.lines if (row := rows[line.row]).missing}
    holes = sum(len(row.missing) for row in asked.values())
    notes = [
        f"Table {number}: {table.title}, CIFAR-10. Scale {scale.title}{how}; accuracy in % on {images}, mean ± "
        f"standard deviation over seeds {_listed(seeds)}; the paper's over five; how far ours is apart from it",
        *([
            "A scale of its own: differences from the paper say how far small runs are from the real thing, not "
            "whether it can be reproduced"
        ] if scale.narrow else []),
        *([f"MISSING: {holes} of {len(seeds) * len({line.row for line in table.lines})} runs"] if holes else []),
        *_remarks(table),
        *(f"{row.name}, seed {seed}: FAILED: {error}" for row in rows.values() for seed, error in row.failed.items()),
        f"Made by: {command}",
    ]  # fmt: skip
    return TextTable(["", "", *table.columns], body, notes)


def _remarks(table: PaperTable) -> list[str]:
    """Each remark once, with the rows that it is about."""
    about: dict[str, list[str]] = {}
    for line in table.lines:
        if line.note:
            about.setdefault(line.note, []).append(line.name)
    return [f"{' and '.join(names)}: {note}" for note, names in about.items()]


def _csv(table: PaperTable, rows: Mapping[str, Row], seeds: Sequence[int], n: int | None) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "row", "metric", "attack", "images", "n", "seeds", "mean", "std", "low", "high", "paper_mean",
         "paper_std", "difference", "verdict"]
    )  # fmt: skip
    for line in table.lines:
        for column, (there, std) in zip(table.columns, line.paper, strict=True):
            found = rows[line.row].metrics.get(METRICS[column])
            ours: list[Any] = [0, "", "", "", "", ""]
            if found:
                spread = found.spread
                numbers = [_percent(v) for v in (spread.mean, spread.std, spread.low, spread.high)]
                ours = [spread.n, " ".join(map(str, found.by_seed)), *numbers]
            difference = "" if found is None else f"{100 * found.spread.mean - there:.4f}"
            verdict = found.standing.verdict if found else "missing"
            writer.writerow(
                [line.name, line.row, column, METRICS[column], "" if n is None else n, *ours, there, std, difference,
                 verdict]
            )  # fmt: skip
    return out.getvalue()


def _cell(found: Measured | None, digits: int, marks: Mapping[str, str]) -> str:
    if found is None:
        return "–"
    std = "" if found.spread.std is None else f" ±{100 * found.spread.std:.{digits}f}"
    return f"{100 * found.spread.mean:.{digits}f}{std}{marks.get(found.standing.verdict, '')}"


def _interval(found: Measured | None) -> str:
    if found is None or found.spread.low is None or found.spread.high is None:
        return ""
    return f"[{100 * found.spread.low:.1f}, {100 * found.spread.high:.1f}]"


def _difference(found: Measured | None, paper: float, digits: int) -> str:
    return "–" if found is None else f"{100 * found.spread.mean - paper:+.{digits}f}".replace("-", "−")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.4f}"


def _count(row: Row, seeds: Sequence[int]) -> str:
    """`3 of 5`, and how many of the others failed."""
    failed = f", {len(row.failed)} failed" if row.failed else ""
    return f"{len(seeds) - len(row.missing)} of {len(seeds)}{failed}"


def _listed(seeds: Sequence[int]) -> str:
    """(0, 1, 2) -> 0 ... 2"""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} ... {seeds[-1]}"
    return ", ".join(map(str, seeds))
