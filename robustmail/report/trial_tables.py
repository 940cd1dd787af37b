"""Tables of trials, and the paper's tables with our numbers beside the paper's."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from robustmail.errors import RunError, did_you_mean
from robustmail.report.classes import CLASS_HEADS
from robustmail.report.tables import TextTable, as_latex, as_markdown, as_table
from robustmail.text import duration
from robustmail.trials.paper import METRICS, Line, PaperTable, Scale
from robustmail.trials.summary import LEGEND, MARKS, Measured, Row

__all__ = ["FORMATS", "paper_table", "saving", "trials_table"]

FORMATS = ("table", "markdown", "csv", "latex")
BASELINE = (
    "difference: the row minus {}, paired by seed, with its t-interval (95 %, Bonferroni-corrected for the "
    "comparisons in the column)"
)
BIASED = (
    "Worst class, and mean over the worst 30 % of the classes, in %; robust: under all attacks. Each run has worst "
    "classes of its own. Such a number is biased low, the more the fewer images a class has:"
)
CSV_COLUMNS = (
    "method", "row", "metric", "attack", "images", "n", "seeds", "mean", "std", "low", "high", "paper_mean",
    "paper_std", "difference", "verdict",
)  # fmt: skip


def trials_table(
    rows: Sequence[Row],
    seeds: Sequence[int],
    width: int | None = None,
    baseline: str | None = None,
    per_class: tuple[int, int] | None = None,
) -> str:
    """Format the rows of a grid as a table for a terminal: mean ± standard deviation over seeds, in %.

    The line below a row has the 95 % t-intervals of the means; the next one the differences to the baseline. A second
    table has the accuracies in the worst classes, where the runs have them.

    rows: from `Study.rows`.
    seeds: all seeds of the grid.
    width: of the table, in characters; by default the terminal's.
    baseline: the row that the others are compared with; None for none.
    per_class: fewest and most test images of a class, if known.
    """
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    attacks = [metric for metric in metrics if metric not in CLASS_HEADS]
    body, verdicts = _trials_body(rows, seeds, attacks)
    has_intervals = any(measured.spread.low is not None for row in rows for measured in row.metrics.values())
    over_seeds = f"mean ± standard deviation over seeds {_seed_list(seeds)}; below, the 95 % t-interval of the mean"
    class_metrics = [metric for metric in metrics if metric in CLASS_HEADS]
    class_body, class_verdicts = _trials_body(rows, seeds, class_metrics)
    notes = [
        f"Accuracy in %, {over_seeds if has_intervals else f'of seed {_seed_list(seeds)}'}",
        *(text for verdict, text in LEGEND.items() if verdict in verdicts | class_verdicts),
        *([BASELINE.format(baseline)] if baseline else []),
        *(f"{row.name}, seed {seed}: FAILED: {error}" for row in rows for seed, error in row.failed.items()),
    ]
    text = as_table(TextTable(["", "seeds", *attacks], body, notes), width)
    if not class_metrics:
        return text
    images = "{:,} to {:,}".format(*per_class) if per_class else "an unknown number of"
    class_notes = [f"{BIASED} here with {images} test images"]
    return text + "\n" + as_table(TextTable(["", "seeds", *class_metrics], class_body, class_notes), width)


def _trials_body(rows: Sequence[Row], seeds: Sequence[int], metrics: list[str]) -> tuple[list[list[str]], set[str]]:
    """(rows of the table, the verdicts in it)"""
    body, verdicts = [], set()
    for row in rows:
        cells = [row.metrics.get(metric) for metric in metrics]
        body.append([row.name, _seed_count(row, seeds), *(_mean(measured, 1, MARKS) for measured in cells)])
        verdicts |= {measured.standing.verdict for measured in cells if measured is not None}
        if any(measured is not None and measured.spread.low is not None for measured in cells):
            body.append(["", "", *(_interval(measured) for measured in cells)])
        if any(measured is not None and measured.difference is not None for measured in cells):
            body.append(["  difference", "", *(_gain(measured) for measured in cells)])
    return body, verdicts


def paper_table(
    number: int,
    table: PaperTable,
    scale: Scale,
    changed: Sequence[str],
    rows: Sequence[Row],
    seeds: Sequence[int],
    n: int | None,
    command: str,
    form: str = "table",
    width: int | None = None,
) -> str:
    """Format a table of the paper with three lines per row: ours, the paper's, the difference. A missing run is a dash.

    number: of the table in the paper, 1 to 3.
    table: its rows and columns, and the paper's numbers.
    scale: of our runs.
    changed: overrides on top of the scale.
    rows: our results, from `Study.rows`.
    seeds: all seeds of our runs.
    n: number of test images; None for all.
    command: what makes the table, to print below it.
    form: one of `FORMATS`; "table", for a terminal, has one decimal, the others have two or more.
    width: of a table for a terminal, in characters; by default the terminal's.

    Raises RunError: unknown format.
    """
    if form not in FORMATS:
        raise RunError(f"--format {form}", "no such format", did_you_mean(form, FORMATS))
    by_name = {row.name: row for row in rows}
    if form == "csv":
        return _csv(table, scale, by_name, seeds, n)
    digits = 1 if form == "table" else 2
    body = _paper_body(table, scale, by_name, seeds, digits)
    notes = _paper_notes(number, table, scale, changed, by_name, seeds, n, command)
    text_table = TextTable(["", "", *table.columns], body, notes)
    if form == "table":
        return as_table(text_table, width)
    return as_markdown(text_table) if form == "markdown" else as_latex(text_table)


def saving(shared: Mapping[str, Any]) -> str:
    """Format the work that shared epochs saved as a sentence; empty where none were shared.

    shared: {steps_saved, seconds_saved}, from `Study.saved`.
    """
    if not shared["steps_saved"]:
        return ""
    return (
        f"Epochs that runs share were trained once: {shared['steps_saved']:,} steps saved, "
        f"about {duration(shared['seconds_saved'])}"
    )


def _paper_body(
    table: PaperTable, scale: Scale, rows: Mapping[str, Row], seeds: Sequence[int], digits: int
) -> list[list[str]]:
    body = []
    for line in table.lines:
        row = rows[line.row]
        ours = [row.metrics.get(scale.metrics[column]) for column in table.columns]
        body.append([line.name, "ours", *(_mean(cell, digits, {}) for cell in ours)])
        reported = _reported(table, line)
        body.append([_seed_count(row, seeds), "paper", *(_paper_number(pair, digits) for pair in reported)])
        body.append(["", "difference", *(_difference(*pair, digits) for pair in zip(ours, reported, strict=True))])
    return body


def _paper_notes(
    number: int, table: PaperTable, scale: Scale, changed: Sequence[str], rows: Mapping[str, Row],
    seeds: Sequence[int], n: int | None, command: str,
) -> list[str]:  # fmt: skip
    images = "all test images" if n is None else f"the first {n:,} test images"
    changes = f", but with {' '.join(changed)}" if changed else ""
    notes = [
        f"Table {number}: {table.title}, CIFAR-10. Scale {scale.title}{changes}; accuracy in % on {images}, mean ± "
        f"standard deviation over seeds {_seed_list(seeds)}; the paper's over five; difference: ours minus the paper's"
    ]
    if scale.narrow:
        notes.append(
            "This scale is not the paper's: the differences show how far small runs are from full ones, not whether "
            "the paper can be reproduced"
        )
    if others := {c: scale.metrics[c] for c in table.columns if scale.metrics[c] != METRICS[c]}:
        notes += [f"Column {column}: {metric} here" for column, metric in others.items()]
    methods = {line.row for line in table.lines}
    if n_missing := sum(len(rows[method].missing) for method in methods):
        notes.append(f"MISSING: {n_missing} of {len(seeds) * len(methods)} runs")
    notes += _remarks(table)
    notes += [
        f"{row.name}, seed {seed}: FAILED: {error}" for row in rows.values() for seed, error in row.failed.items()
    ]
    return [*notes, f"Made by: {command}"]


def _remarks(table: PaperTable) -> list[str]:
    """Every remark of the table once, with the names of its rows."""
    names_by_note: dict[str, list[str]] = {}
    for line in table.lines:
        if line.note:
            names_by_note.setdefault(line.note, []).append(line.name)
    return [f"{' and '.join(names)}: {note}" for note, names in names_by_note.items()]


def _csv(table: PaperTable, scale: Scale, rows: Mapping[str, Row], seeds: Sequence[int], n: int | None) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for line in table.lines:
        for column, reported in zip(table.columns, _reported(table, line), strict=True):
            measured = rows[line.row].metrics.get(scale.metrics[column])
            ours: list[Any] = [0, "", "", "", "", ""]
            difference, verdict = "", "missing"
            if measured:
                spread = measured.spread
                numbers = [_percent(v) for v in (spread.mean, spread.std, spread.low, spread.high)]
                ours = [spread.n, " ".join(map(str, measured.by_seed)), *numbers]
                verdict = measured.standing.verdict
                difference = f"{100 * spread.mean - reported[0]:.4f}" if reported else ""
            names = (line.name, line.row, column, scale.metrics[column], "" if n is None else n)
            writer.writerow([*names, *ours, *(reported or ("", "")), difference, verdict])
    return out.getvalue()


def _reported(table: PaperTable, line: Line) -> Sequence[tuple[float, float] | None]:
    """(mean, std) of the paper for each column; None where it has no such row."""
    return line.paper or [None for _ in table.columns]


def _mean(measured: Measured | None, digits: int, marks: Mapping[str, str]) -> str:
    if measured is None:
        return "–"
    std = "" if measured.spread.std is None else f" ±{100 * measured.spread.std:.{digits}f}"
    return f"{100 * measured.spread.mean:.{digits}f}{std}{marks.get(measured.standing.verdict, '')}"


def _interval(measured: Measured | None) -> str:
    if measured is None or measured.spread.low is None or measured.spread.high is None:
        return ""
    return f"[{100 * measured.spread.low:.1f}, {100 * measured.spread.high:.1f}]"


def _gain(measured: Measured | None) -> str:
    """The difference to the baseline, with its interval where there are at least two seeds."""
    if measured is None or measured.difference is None:
        return ""
    gain = measured.difference
    ends = "" if gain.low is None or gain.high is None else f" [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    return f"{100 * gain.mean:+.1f}{ends}".replace("-", "−")


def _paper_number(reported: tuple[float, float] | None, digits: int) -> str:
    return "–" if reported is None else f"{reported[0]:.{digits}f} ±{reported[1]:.{digits}f}"


def _difference(measured: Measured | None, reported: tuple[float, float] | None, digits: int) -> str:
    if measured is None or reported is None:
        return "–"
    return f"{100 * measured.spread.mean - reported[0]:+.{digits}f}".replace("-", "−")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.4f}"


def _seed_count(row: Row, seeds: Sequence[int]) -> str:
    """`3 of 5`, and the number of failed runs."""
    failed = f", {len(row.failed)} failed" if row.failed else ""
    return f"{len(seeds) - len(row.missing)} of {len(seeds)}{failed}"


def _seed_list(seeds: Sequence[int]) -> str:
    """(0, 1, 2) -> 0 ... 2"""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} ... {seeds[-1]}"
    return ", ".join(map(str, seeds))
