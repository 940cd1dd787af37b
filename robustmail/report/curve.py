"""The accuracy by eps: a table with bars, a CSV file and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from robustmail.report.style import saved_figure
from robustmail.runtime.files import atomic_write_text
from robustmail.runtime.untrusted import printable
from robustmail.text import format_eps

__all__ = ["curve_table", "draw_curve", "write_curve_csv"]

BAR = 12  # characters of 100 %
EIGHTHS = " ▏▎▍▌▋▊▉█"


def curve_table(curve: Mapping[str, Any]) -> Table:
    """A row for each eps, a column for each attack; the worst case with its 95 % interval and as a bar.

    curve: as `read_curve` returns it.
    """
    title = f"{curve['name']}: accuracy in % by eps on {curve['n']:,} images"
    caption = (
        "± half the width of the 95 % Wilson interval. What broke an image at a smaller eps counts at a larger one."
    )
    table = Table(title=Text(printable(title)), title_justify="left", title_style="", box=SIMPLE_HEAD,
                  caption=caption, caption_justify="left", header_style="")  # fmt: skip
    names = [row["name"] for row in curve["points"][-1]["attacks"]]
    table.add_column("eps", no_wrap=True)
    for name in (*names, "worst case"):
        table.add_column(Text(printable(name)), justify="right", min_width=10)
    table.add_column("", no_wrap=True)
    table.add_column("light", no_wrap=True)
    for point in curve["points"]:
        eps = format_eps(point["eps"], curve["norm"]) if point["eps"] else "0"
        cells = [_cell(row) for row in (*point["attacks"], point["worst_case"])]
        table.add_row(eps, *cells, _bar(point["worst_case"]["accuracy"]), printable(point["light"] or "–"))
    return table


def write_curve_csv(curve: Mapping[str, Any], path: Path) -> None:
    """Write a line for each eps and attack, and for the worst case: accuracy, interval, counts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["eps", "norm", "attack", "accuracy", "low", "high", "correct", "n"])
    for point in curve["points"]:
        for row in (*point["attacks"], point["worst_case"]):
            numbers = (f"{row[key]:.6f}" for key in ("accuracy", "low", "high"))
            writer.writerow([f"{point['eps']:.9g}", curve["norm"], printable(row["name"]), *numbers, row["correct"],
                             row["n"]])  # fmt: skip
    atomic_write_text(path, out.getvalue())


def draw_curve(curve: Mapping[str, Any], stem: Path) -> list[Path]:
    """Draw a line for each attack, and the worst case with its interval, over eps, into stem.png and stem.svg."""
    points = curve["points"]
    scale, unit = (255, "eps · 255") if curve["norm"] == "linf" else (1, "eps")
    eps = [scale * point["eps"] for point in points]
    files: list[Path] = []
    with saved_figure(stem, 4.6, 3.2, files) as page:
        axis = page.subplots()
        for k, row in enumerate(points[-1]["attacks"]):
            values = [100 * point["attacks"][k]["accuracy"] for point in points]
            axis.plot(eps, values, marker=".", linewidth=1, label=printable(row["name"]))
        worst = [point["worst_case"] for point in points]
        axis.plot(eps, [100 * row["accuracy"] for row in worst], "k--", linewidth=1.2, label="worst case")
        low, high = ([100 * row[key] for row in worst] for key in ("low", "high"))
        axis.fill_between(eps, low, high, color="black", alpha=0.12, linewidth=0)
        axis.set_ylim(0, 100)
        axis.set_xlabel(f"{unit}, {curve['norm']}")
        axis.set_ylabel("accuracy in %")
        axis.legend(fontsize=7)
        page.suptitle(f"{printable(curve['name'])}, {curve['n']:,} images", fontsize=8)
    return files


def _cell(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ±{50 * (row['high'] - row['low']):.1f}"


def _bar(share: float) -> str:
    whole, part = divmod(round(8 * BAR * min(max(share, 0.0), 1.0)), 8)
    return ("█" * whole + (EIGHTHS[part] if part else "")).ljust(BAR)
