"""The table and the picture of growth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from robustmail.records import GrowthCurve, GrowthFit
from robustmail.report.style import BLUE, GREEN, GREY, ORANGE, save_picture, styled_figure
from robustmail.runtime.files import atomic_write_json, make_folder

__all__ = ["draw_growth", "growth_table", "save_growth"]

COLUMNS = ("work", "by", "up to", "seconds", "exponent", "MB", "exponent")
ACROSS = 4  # panels in a row


def growth_table(curves: Sequence[GrowthCurve]) -> Table:
    """A row for each curve: its largest size, what that costs, and the exponents with their 95 % intervals."""
    caption = "exponent: over the last decade of sizes, 1 is linear; !: surely above 1; empty: memory hardly grows"
    table = Table(title="growth with size", box=SIMPLE, caption=caption)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("work", "by") else "right")
    for curve in curves:
        last = curve.points[-1]
        cost = (f"{last.seconds:.3g}", _interval(curve.seconds_at_last))
        memory = (f"{last.megabytes:.0f}", _interval(curve.megabytes_at_last))
        table.add_row(curve.what, curve.by, f"{last.size:,}", *cost, *memory)
    return table


def draw_growth(curves: Sequence[GrowthCurve], path: Path) -> None:
    """Draw a panel for each curve: processor seconds and, at the right, memory by size, beside a line of exponent 1.

    All axes are logarithmic. Memory is drawn from 1 MB on, where it is measured at all.

    path: of a PNG file.
    """
    down = -(-len(curves) // ACROSS)
    with styled_figure(3.1 * ACROSS, 2.7 * down) as page:
        panels = page.subplots(down, ACROSS, squeeze=False).flatten()
        for axis, curve in zip(panels, curves, strict=False):
            _draw_curve(axis, curve)
        for axis in panels[len(curves) :]:
            axis.set_axis_off()
        lines = panels[0].get_lines() + [line for other in page.axes[len(panels) :][:1] for line in other.get_lines()]
        page.legend(handles=lines, loc="outside lower center", ncols=len(lines))
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
    fit = curve.seconds_at_last
    colour = ORANGE if fit is not None and fit.low > 1 else "black"
    axis.set_title(f"{curve.what}\nexponent of the last decade: {_interval(fit)}", fontsize=8, color=colour)
    axis.set_xlabel(curve.by)
    axis.set_ylabel("seconds")
    axis.set_xscale("log")
    if sizes[-1] < 10 * sizes[0]:  # no power of ten but the first
        axis.set_xticks(sizes)
    _scale(axis.xaxis)
    axis.set_yscale("log")
    _scale(axis.yaxis)
    if len(seen := [p for p in curve.points if p.megabytes >= 1]) > 2:
        right = axis.twinx()
        right.plot([p.size for p in seen], [p.megabytes for p in seen], color=GREEN, marker="s", markersize=3,
                   linestyle="--", label="MB of memory, at the right")  # fmt: skip
        right.set_yscale("log")
        right.set_ylim(0.5, 2000)
        right.spines["right"].set_visible(True)
        _scale(right.yaxis)


def _scale(axis: Any) -> None:
    """Write powers of ten as numbers, and nothing between them."""
    axis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axis.set_minor_formatter(lambda value, _: "")


def _interval(fit: GrowthFit | None) -> str:
    return "" if fit is None else f"{fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}]{' !' * (fit.low > 1)}"
