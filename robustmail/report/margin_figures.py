"""Draw the results of the margin lab: one picture for each question."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.margin_lab.results import AREAS, CAUSES, Findings, LabResults, Truth
from robustmail.report.style import (
    BLUE,
    GREY,
    HATCH,
    MARKERS,
    ORANGE,
    box_plot,
    legend_dot,
    legend_patch,
    remove_pictures,
    saved_figure,
)
from robustmail.text import plural

__all__ = ["PICTURES", "draw_lab"]

CAUSE_LABELS = {
    "draw": "new random numbers",
    "path": "other path, same end",
    "end": "other end",
    "both": "other path and end",
}
BINS = 40
MAXIMUM_HATCH = "...."
GAP = 0.3  # between the margins and the outcomes, in cells
DARK = 0.6  # from here on a cell is so dark that its text is white


def draw_lab(lab: LabResults, folder: Path) -> list[Path]:
    """Draw every picture as PNG and SVG into a folder, for the margins that could be measured; returns the files.

    Older pictures are removed, even where no margin could be measured.
    """
    measured = [findings for findings in lab.findings if not findings.wrong]
    files: list[Path] = []
    for name, draw in PICTURES.items():
        remove_pictures(folder / name)
        if measured:
            draw(lab, measured, folder / name, files)
    return files


def _continuity(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """Histograms of every margin, the broken examples in another colour."""
    n_columns = min(3, len(measured))
    n_rows = math.ceil(len(measured) / n_columns)
    broken = np.array(lab.images["broken"])
    with saved_figure(stem, 3.1 * n_columns, 2.3 * n_rows, files) as page:
        axes = page.subplots(n_rows, n_columns, squeeze=False).ravel()
        for axis, findings in zip(axes, measured, strict=False):
            values = np.array(lab.margins[findings.margin])
            edges = np.histogram_bin_edges(values, BINS)
            # One outline for each colour: as many bars as bins would take seconds to draw.
            _, _, (_, outlines) = axis.hist(
                [values[~broken], values[broken]], edges, stacked=True, color=[BLUE, ORANGE], histtype="stepfilled"
            )
            for outline in outlines:
                outline.set_hatch(HATCH)
            if continuity := findings.continuity:
                n_values = plural(continuity.distinct, "value")
                axis.set_title(f"{findings.margin}: {n_values}, {100 * continuity.ties:.0f} % tied")
            axis.set(xlabel="value of the margin", ylabel="images")
        for axis in axes[len(measured) :]:
            axis.set_axis_off()
        keys = [legend_patch(BLUE, "", "stands under every attack"), legend_patch(ORANGE, HATCH, "broken")]
        page.legend(handles=keys, loc="outside lower center", ncols=2)


def _paths(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """Mean change of an example's rank, by what was changed."""
    with saved_figure(stem, 6.4, 1.3 + 0.34 * len(measured), files) as page:
        axis = page.subplots()
        for k, (cause, (marker, colour)) in enumerate(zip(CAUSES, MARKERS, strict=True)):
            x = [100 * findings.spread[cause].rank for findings in measured]
            y = np.arange(len(measured)) + (k - 1.5) * 0.15
            axis.plot(
                x,
                y,
                marker,
                color=colour,
                label=CAUSE_LABELS[cause],
                markersize=5,
                markeredgecolor="black",
                markeredgewidth=0.5,
            )
        _margin_rows(axis, measured)
        axis.set(xlabel="mean change of an example's rank (% of all ranks)", xlim=(-0.5, None))
        page.legend(loc="outside lower center", ncols=4)


def _truth(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """AUROC and rank correlation with their intervals, over all examples and over the correct ones."""
    panels = (
        ("auroc", 0.5, "AUROC: broken below standing"),
        ("distance", 0.0, "rank correlation with FAB's distance"),
    )
    with saved_figure(stem, 7.6, 1.4 + 0.36 * len(measured), files) as page:
        axes = page.subplots(1, 2, sharey=True)
        for axis, (statistic, guessing, name) in zip(axes, panels, strict=True):
            axis.axvline(guessing, color=GREY, linewidth=0.8, linestyle=":")
            everywhere = [findings.everywhere for findings in measured]
            correct = [findings.right for findings in measured]
            _intervals(axis, everywhere, statistic, -0.13, "o", BLUE, "all images")
            _intervals(axis, correct, statistic, 0.13, "s", ORANGE, "images correct without an attack")
            axis.set_xlabel(f"{name}\n(dotted: guessing)")
        _margin_rows(axes[0], measured)
        handles, labels = axes[0].get_legend_handles_labels()
        page.legend(handles, labels, loc="outside lower center", ncols=2)


def _intervals(
    axis: Any, truths: Sequence[Truth | None], statistic: str, shift: float, marker: str, colour: str, label: str
) -> None:
    """Draw one estimate of every margin with its interval, in rows shifted by `shift`."""
    for k, truth in enumerate(truths):
        estimate = getattr(truth, statistic)
        if estimate.value is None:
            continue
        if estimate.low is not None:
            axis.plot([estimate.low, estimate.high], [k + shift] * 2, color="black", linewidth=1, zorder=1)
        axis.plot(
            estimate.value,
            k + shift,
            marker,
            color=colour,
            markeredgecolor="black",
            markeredgewidth=0.5,
            label=None if k else label,
        )


def _rank_correlation(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """Heat maps: the rank correlation of every two margins, and of each margin with the outcome of the attacks."""
    names = [findings.margin for findings in measured]
    panels = {
        "everywhere": ("all images", [findings.everywhere for findings in measured]),
        "right": ("images correct\nwithout an attack", [findings.right for findings in measured]),
    }
    side = 0.42 * len(names)
    with saved_figure(stem, 3.4 + 2 * side, 1.7 + side, files) as page:
        axes = page.subplots(1, 2, sharey=True)
        for axis, (images, (title, truths)) in zip(axes, panels.items(), strict=True):
            rows = lab.rank_correlation[images]
            _heat_map(axis, [[rows[one][other].value for other in names] for one in names], 0)
            outcomes = [
                [None, None] if truth is None else [truth.broken.value, truth.distance.value] for truth in truths
            ]
            _heat_map(axis, outcomes, len(names) + GAP)
            columns = [*range(len(names)), len(names) + GAP, len(names) + GAP + 1]
            axis.set_xticks(columns, [*names, "(stands)", "(distance)"], rotation=90)
            axis.set(xlabel="margin, and\n(outcome of attacks)", title=title)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        _margin_rows(axes[0], measured)
        page.suptitle("rank correlation", fontsize="medium")


def _heat_map(axis: Any, rows: Sequence[Sequence[float | None]], left: float) -> None:
    """Draw numbers from -1 to 1 as coloured cells with the number in each, from the column `left` to the right."""
    from matplotlib.colors import LinearSegmentedColormap

    values = np.array([[np.nan if value is None else value for value in row] for row in rows])
    colours = LinearSegmentedColormap.from_list("correlation", [ORANGE, "white", BLUE])
    edges = [np.arange(size + 1) - 0.5 for size in values.shape]
    axis.pcolormesh(edges[1] + left, edges[0], np.ma.masked_invalid(values), cmap=colours, vmin=-1, vmax=1)
    for (i, j), value in np.ndenumerate(values):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        colour = "white" if value > DARK else "black"
        axis.text(j + left, i, text, ha="center", va="center", fontsize=7, color=colour)


def _areas(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """Left: size and broken share of each area. Right: the ranks that each margin gives to its images."""
    from scipy.stats import rankdata

    area_of_image = np.array(lab.images["area"])
    colours = dict(zip(AREAS, ("white", ORANGE, BLUE), strict=True))
    with saved_figure(stem, 9, max(2.8, 1.4 + 0.45 * len(measured)), files) as page:
        left, right = page.subplots(1, 2, width_ratios=(1, 1.7))
        for k, area in enumerate(lab.areas):
            broken, standing = (100 * n / lab.n for n in (area.broken, area.n - area.broken))
            left.bar(k, broken, color=colours[area.name], edgecolor="black", hatch=HATCH, linewidth=0.8)
            left.bar(k, standing, bottom=broken, color=colours[area.name], edgecolor="black", linewidth=0.8)
            left.text(
                k, broken + standing + 1, f"{area.broken:,} of {area.n:,}\nbroken", ha="center", va="bottom", fontsize=8
            )
        left.set(xticks=range(len(AREAS)), xticklabels=AREAS, ylim=(0, 119))
        left.set(xlabel="area, by the training attack", ylabel="images (%)")
        left.set_yticks(range(0, 101, 20))
        for k, findings in enumerate(measured):
            ranks = 100 * rankdata(lab.margins[findings.margin]) / lab.n
            for j, name in enumerate(AREAS):
                if (area_of_image == name).any():
                    box_plot(right, ranks[area_of_image == name], k + (j - 1) * 0.25, colours[name])
        _margin_rows(right, measured)
        right.set(xlabel="rank by the margin (%; box: quartiles, line: 5 to 95 %)", xlim=(-2, 102))
        keys = [legend_patch(colours[name], "", name) for name in AREAS]
        keys.append(legend_patch("white", HATCH, "broken by some attack"))
        page.legend(handles=keys, loc="outside lower center", ncols=4)


def _hidden(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """The ranks that each margin gives to the critical examples."""
    from scipy.stats import rankdata

    critical = np.array(lab.images["critical"])
    shifts = np.linspace(-0.28, 0.28, max(1, int(critical.sum())))[: int(critical.sum())]
    with saved_figure(stem, 6.8, 1.3 + 0.42 * len(measured), files) as page:
        axis = page.subplots()
        for k, findings in enumerate(measured):
            values = np.array(lab.margins[findings.margin])
            top = 100 * float((values == values.max()).mean())
            axis.barh(
                k, top, left=100 - top, height=0.74, color="white", edgecolor=GREY, hatch=MAXIMUM_HATCH, linewidth=0.8
            )
            ranks = 100 * rankdata(values) / lab.n
            axis.plot(
                ranks[critical],
                k + shifts,
                "o",
                color=ORANGE,
                markersize=4,
                markeredgecolor="black",
                markeredgewidth=0.5,
            )
        _margin_rows(axis, measured)
        axis.set(xlabel="rank by the margin (%; 100 = ranked safest)", xlim=(0, 101))
        n_critical = plural(lab.critical, "critical image")
        if lab.critical:
            axis.set_title(f"{n_critical} of {lab.n:,}: broken, but not by the training attack")
        else:
            axis.set_title(f"No critical image among {lab.n:,}: no attack breaks more than the training attack")
        keys = [legend_dot(ORANGE, "a critical image")] if lab.critical else []
        keys.append(legend_patch("white", MAXIMUM_HATCH, "images that share the maximum"))
        page.legend(handles=keys, loc="outside lower center", ncols=2)


def _cost(lab: LabResults, measured: Sequence[Findings], stem: Path, files: list[Path]) -> None:
    """The passes of every margin, and those of the training attack for comparison."""
    with saved_figure(stem, 6.4, 1.5 + 0.34 * (len(measured) + 1), files) as page:
        axis = page.subplots()
        costs = [*(findings.cost for findings in measured), lab.attack_cost]
        rows, forward, backward = range(len(costs)), [c.forward for c in costs], [c.backward for c in costs]
        axis.barh(rows, forward, color=BLUE, edgecolor="black", linewidth=0.6)
        axis.barh(rows, backward, left=forward, color=ORANGE, edgecolor="black", linewidth=0.6, hatch=HATCH)
        for k, cost in enumerate(costs):
            axis.text(cost.forward + cost.backward, k, f" {cost.forward} + {cost.backward}", va="center", fontsize=8)
        _margin_rows(axis, measured, "(the training attack)")
        axis.set_xlim(0, 1.15 * max(1, *(cost.forward + cost.backward for cost in costs)))
        axis.set_xlabel("passes of the batch added to a training step of AT")
        keys = [legend_patch(BLUE, "", "forward"), legend_patch(ORANGE, HATCH, "backward")]
        page.legend(handles=keys, loc="outside lower center", ncols=2)


PICTURES: dict[str, Callable[[LabResults, Sequence[Findings], Path, list[Path]], None]] = {
    "continuity": _continuity,
    "paths": _paths,
    "truth": _truth,
    "rank_correlation": _rank_correlation,
    "areas": _areas,
    "hidden": _hidden,
    "cost": _cost,
}


def _margin_rows(axis: Any, measured: Sequence[Findings], *more_rows: str) -> None:
    """Label a row for each margin, the best on top, and more rows below."""
    names = [*(findings.margin for findings in measured), *more_rows]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel("margin")
    axis.set_ylim(len(names) - 0.4, -0.6)  # the best on top, and space for markers beside each name
    axis.tick_params(axis="y", length=0)
