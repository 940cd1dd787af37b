"""The accuracy under corruptions: a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from robustmail.records import CorruptionRow
from robustmail.report.style import saved_figure
from robustmail.runtime.files import atomic_write_text
from robustmail.runtime.untrusted import printable

__all__ = ["corruption_table", "draw_corruptions", "write_corruption_csv"]

LINE = 0.24  # height of a row of the picture in inches
TITLE = 70  # characters in a line of its title


def corruption_table(rows: Sequence[CorruptionRow], means: Mapping[str, float], title: str) -> Table:
    """Accuracies in percent: a row for each corruption, a column for each severity; then the mean over the severities
    and its share of the clean accuracy. means: as `corruption_means` returns them."""
    severities = _severities(rows)
    clean = _clean(rows)
    table = Table(title=printable(title), box=SIMPLE_HEAD, caption=_caption(clean), caption_justify="left")
    table.add_column("corruption", no_wrap=True)
    for head in (*map(str, severities), "mean", "of clean"):
        table.add_column(head, justify="right", no_wrap=True)
    by_place = {(row.corruption, row.severity): row for row in rows}
    for name, mean in means.items():
        if name.startswith("mean, "):
            table.add_section()
        cells = [_percent(by_place[name, s].accuracy) if (name, s) in by_place else "" for s in severities]
        share = _percent(mean / clean.accuracy) if clean.accuracy else "–"
        table.add_row(printable(name), *cells, _percent(mean), share)
    return table


def write_corruption_csv(rows: Sequence[CorruptionRow], path: Path) -> None:
    """Write a line for each corruption and severity, the clean images first: accuracy, interval, share of clean."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["corruption", "severity", "accuracy", "low", "high", "correct", "n", "relative_to_clean"])
    clean = _clean(rows)
    for row in rows:
        share = f"{row.accuracy / clean.accuracy:.6f}" if clean.accuracy else ""
        writer.writerow([printable(row.corruption), row.severity, f"{row.accuracy:.6f}", f"{row.low:.6f}",
                         f"{row.high:.6f}", row.correct, row.n, share])  # fmt: skip
    atomic_write_text(path, out.getvalue())


def draw_corruptions(rows: Sequence[CorruptionRow], title: str, stem: Path) -> list[Path]:
    """Draw accuracies as a heat map, a row for each corruption, a column for each severity, into stem.png and .svg."""
    names = list(dict.fromkeys(row.corruption for row in rows if row.severity))
    severities = _severities(rows)
    by_place = {(row.corruption, row.severity): 100 * row.accuracy for row in rows}
    files: list[Path] = []
    with saved_figure(stem, 1.9 + 0.55 * len(severities) + 1.1, 1.2 + LINE * len(names), files) as page:
        axis = page.subplots()
        values = [[by_place.get((name, s), float("nan")) for s in severities] for name in names]
        top = max(100 * _clean(rows).accuracy, max(by_place.values()))
        picture = axis.imshow(values, cmap="cividis", vmin=0, vmax=top or 1, aspect="auto")
        for i, line in enumerate(values):
            for k, value in enumerate(line):
                colour = "black" if value > 0.6 * top else "white"
                axis.text(k, i, "" if value != value else f"{value:.1f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(severities)), map(str, severities))
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.set_xlabel(f"severity\n(red line: {_percent(_clean(rows).accuracy)} % on clean images)")
        page.suptitle("\n".join(textwrap.wrap(printable(title), TITLE)), fontsize=8)
        bar = page.colorbar(picture, ax=axis, label="accuracy in %")
        bar.ax.axhline(100 * _clean(rows).accuracy, color="red", linewidth=1.5)
    return files


def _severities(rows: Sequence[CorruptionRow]) -> list[int]:
    return sorted({row.severity for row in rows if row.severity})


def _clean(rows: Sequence[CorruptionRow]) -> CorruptionRow:
    return next(row for row in rows if row.severity == 0)


def _caption(clean: CorruptionRow) -> str:
    return (f"Accuracy in % by severity; clean: {_percent(clean.accuracy)} of {clean.n:,} images.\n"
            "of clean: mean over the severities as a share of the clean accuracy, in %.\n"
            "mean, k of 15: over those of the 15 common corruptions that are there.")  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
