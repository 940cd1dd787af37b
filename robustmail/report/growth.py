"""The table and the picture of growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from robustmail.records import GrowthCurve, GrowthFit
from robustmail.report.style import BLUE, GREY, ORANGE, save_picture, styled_figure
from robustmail.runtime.files import atomic_write_json, make_folder

__all__ = ["draw_growth", "growth_table", "save_growth"]

COLUMNS = ("work", "by", "sizes", "seconds", "exponent", "in the last decade", "MB", "in the last decade")
ACROSS = 4  # panels in a row


def growth_table(curves: Sequence[GrowthCurve]) -> Table:
    """A row for each curve: its sizes, the cost of the largest, and the exponents with their 95 % intervals."""
    caption = (
        "exponent: 1 is linear; over all sizes, and over the last decade, which tells what comes beyond. "
        "Empty: too few sizes, or memory hardly grows. !: surely above 1"
    )
    table = Table(title="growth with size", box=SIMPLE, caption=caption)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("work", "by") else "right")
    for curve in curves:
        first, last = curve.points[0], curve.points[-1]
        overall = "" if curve.seconds is None else f"{curve.seconds.exponent:.2f}"
        table.add_row(
            curve.what, curve.by, f"{first.size:,} – {last.size:,}", f"{last.seconds:.3g}", overall,
            _interval(curve.seconds_at_last), f"{last.megabytes:.0f}", _interval(curve.megabytes_at_last),
        )  # fmt: skip
    return table


def draw_growth(curves: Sequence[GrowthCurve], path: Path) -> None:
    """Draw a panel for each curve: processor seconds by size on two logarithmic axes, beside a line of exponent 1.

    path: of a PNG file.
    """
    down = -(-len(curves) // ACROSS)
    with styled_figure(3.1 * ACROSS, 2.7 * down) as page:
        panels = page.subplots(down, ACROSS, squeeze=False).flatten()
        for axis, curve in zip(panels, curves, strict=False):
            _draw_curve(axis, curve)
        for axis in panels[len(curves) :]:
            axis.set_axis_off()
        handles, labels = panels[0].get_legend_handles_labels()
        page.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save_picture(page, path)


def save_growth(curves: Sequence[GrowthCurve], provenance: dict[str, Any], folder: Path) -> list[Path]:
    """Write growth.json and growth.png; returns their paths. Raises RunError: the folder cannot be written."""
    make_folder(folder)
    numbers, picture = folder / "growth.json", folder / "growth.png"
    atomic_write_json(numbers, {"curves": [asdict(curve) for curve in curves], "provenance": provenance})
    draw_growth(curves, picture)
    return [numbers, picture]


def _draw_curve(axis: Any, curve: GrowthCurve) -> None:
    sizes, seconds = [p.size for p in curve.points], [p.seconds for p in curve.points]
    linear = [seconds[-1] * size / sizes[-1] for size in sizes]
    axis.plot(sizes, linear, color=GREY, linestyle=":", label="linear, through the last size")
    axis.plot(sizes, seconds, color=BLUE, marker="o", markersize=3, label="processor seconds")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title(curve.what)
    axis.set_xlabel(curve.by)
    axis.set_ylabel("seconds")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda value, _: f"{value:,.12g}")
        scale.set_minor_formatter(lambda value, _: "")
    if fit := curve.seconds_at_last:
        text, colour = f"last decade: {_interval(fit)}", ORANGE if fit.low > 1 else BLUE
        axis.text(0.98, 0.04, text, transform=axis.transAxes, ha="right", fontsize=8, color=colour)


def _interval(fit: GrowthFit | None) -> str:
    return "" if fit is None else f"{fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}]{' !' * (fit.low > 1)}"
