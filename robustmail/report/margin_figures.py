"""A picture for each question that the lab asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.margin_lab.results import AREAS, CAUSES, Findings, Lab, Truth
from robustmail.report.style import BLUE, GREY, HATCH, MARKS, ORANGE, box, dot, patch, remove, sheet
from robustmail.text import plural

__all__ = ["PICTURES", "draw_lab"]

SAID = {"draw": "asked again", "path": "other path, same end", "end": "other end", "both": "other path and end"}
BINS = 40


def draw_lab(lab: Lab, folder: Path) -> list[Path]:
    """Draw every picture as PNG and SVG into a folder, of the margins that could be measured; returns the files.

    What was drawn there before is removed, even where no margin could be measured.
    """
    found = [one for one in lab.findings if not one.wrong]
    made: list[Path] = []
    for name, draw in PICTURES.items():
        remove(folder / name)
        if found:
            draw(lab, found, folder / name, made)
    return made


def _continuity(lab: Lab, found: Sequence[Findings], stem: Path, made: list[Path]) -> None:
    """Histograms of every margin, broken examples apart."""
    across = min(3, len(found))
    down = math.ceil(len(found) / across)
    broken = np.array(lab.images["broken"])
    with sheet(stem, 3.1 * across, 2.3 * down, made) as figure:
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, one in zip(axes, found, strict=False):
            values = np.array(lab.margins[one.margin])
            edges = np.histogram_bin_edges(values, BINS)
            axis.hist([values[~broken], values[broken]], edges, stacked=True, color=[BLUE, ORANGE], linewidth=0)
            for bar in axis.containers[1] if len(axis.containers) > 1 else []:
                bar.set_hatch(HATCH)
            some = one.continuity
            axis.set_title(
                f"{one.margin}: {plural(some.distinct, 'value')}, {100 * some.ties:.0f} % tied" if some else ""
            )
            axis.set(xlabel="value of the margin", ylabel="images")
        for axis in axes[len(found) :]:
            axis.set_axis_off()
        keys = [patch(BLUE, "", "stands under every attack"), patch(ORANGE, HATCH, "broken")]
        figure.legend(handles=keys, loc="outside lower center", ncols=2)


def _paths(lab: Lab, found: Sequence[Findings], stem: Path, made: list[Path]) -> None:
    """How far ranks move, by what was changed."""
    with sheet(stem, 6.4, 1.3 + 0.34 * len(found), made) as figure:
        axis = figure.subplots()
        for k, (cause, (mark, colour)) in enumerate(zip(CAUSES, MARKS, strict=True)):
            across = [100 * one.spread[cause].rank for one in found]
            down = np.arange(len(found)) + (k - 1.5) * 0.15
            axis.plot(across, down, mark, color=colour, label=SAID[cause], markersize=5, markeredgecolor="black",
                      markeredgewidth=0.5)  # fmt: skip
        _rows(axis, found)
        axis.set(xlabel="how far an example's rank moves (% of all ranks)", xlim=(-0.5, None))
        figure.legend(loc="outside lower center", ncols=4)


def _truth(lab: Lab, found: Sequence[Findings], stem: Path, made: list[Path]) -> None:
    """AUROC and rank correlation with their intervals, over all examples and over those that are right."""
    with sheet(stem, 7.6, 1.4 + 0.36 * len(found), made) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axis, number, chance, name in (
            (left, "auroc", 0.5, "AUROC: broken below standing"),
            (right, "distance", 0.0, "rank correlation with FAB's distance"),
        ):
            axis.axvline(chance, color=GREY, linewidth=0.8, linestyle=":")
            _whiskers(axis, [one.everywhere for one in found], number, -0.13, "o", BLUE, "all images")
            _whiskers(axis, [one.right for one in found], number, 0.13, "s", ORANGE, "right as they are")
            axis.set_xlabel(f"{name}\n(dotted: guessing)")
        _rows(left, found)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _whiskers(axis: Any, truths: Sequence[Truth | None], number: str, shift: float, mark: str, colour: str,
              label: str) -> None:  # fmt: skip
    for k, truth in enumerate(truths):
        some = getattr(truth, number)
        if some.value is None:
            continue
        if some.low is not None:
            axis.plot([some.low, some.high], [k + shift] * 2, color="black", linewidth=1, zorder=1)
        axis.plot(some.value, k + shift, mark, color=colour, markeredgecolor="black", markeredgewidth=0.5,
                  label=label if not k else None)  # fmt: skip


def _areas(lab: Lab, found: Sequence[Findings], stem: Path, made: list[Path]) -> None:
    """Shares and fates of the areas; the ranks that each margin gives to them."""
    from scipy.stats import rankdata

    where, colours = np.array(lab.images["area"]), dict(zip(AREAS, ("white", ORANGE, BLUE), strict=True))
    with sheet(stem, 9, max(2.8, 1.4 + 0.45 * len(found)), made) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
        for k, area in enumerate(lab.areas):
            broken, stands = (100 * n / lab.n for n in (area.broken, area.n - area.broken))
            left.bar(k, broken, color=colours[area.name], edgecolor="black", hatch=HATCH, linewidth=0.8)
            left.bar(k, stands, bottom=broken, color=colours[area.name], edgecolor="black", linewidth=0.8)
            left.text(k, broken + stands + 1, f"{area.broken:,} of {area.n:,}\nbroken", ha="center", fontsize=8)
        left.set(xticks=range(len(AREAS)), xticklabels=AREAS, ylim=(0, 119))
        left.set(xlabel="area, by the training attack", ylabel="images (%)")
        left.set_yticks(range(0, 101, 20))
        for k, one in enumerate(found):
            ranks = 100 * rankdata(lab.margins[one.margin]) / lab.n
            for j, area_name in enumerate(AREAS):
                if (where == area_name).any():
                    box(right, ranks[where == area_name], k + (j - 1) * 0.25, colours[area_name])
        _rows(right, found)
        right.set(xlabel="rank by the margin (%; box: quartiles, line: 5 to 95 %)", xlim=(-2, 102))
        keys = [*(patch(colours[name], "", name) for name in AREAS), patch("white", HATCH, "broken by some attack")]
        figure.legend(handles=keys, loc="outside lower center", ncols=4)


def _hidden(lab: Lab, found: Sequence[Findings], stem: Path, made: list[Path]) -> None:
    """Where the critical examples lie among the ranks of each margin."""
    from scipy.stats import rankdata

    critical = np.array(lab.images["critical"])
    shift = np.linspace(-0.28, 0.28, max(1, int(critical.sum())))
    with sheet(stem, 6.8, 1.3 + 0.42 * len(found), made) as figure:
        axis = figure.subplots()
        for k, one in enumerate(found):
            values = np.array(lab.margins[one.margin])
            top = 100 * float((values == values.max()).mean())
            axis.barh(k, top, left=100 - top, height=0.74, color="white", edgecolor=GREY, hatch="....", linewidth=0.8)
            ranks = 100 * rankdata(values) / lab.n
            axis.plot(ranks[critical], k + shift[: int(critical.sum())], "o", color=ORANGE, markersize=4,
                      markeredgecolor="black", markeredgewidth=0.5)  # fmt: skip
        _rows(axis, found)
        axis.set(xlabel="rank by the margin (%; 100 = said to be safest)", xlim=(0, 101))
        some = f"{plural(lab.critical, 'critical image')} of {lab.n:,}: standing under the training attack alone"
        none = f"No critical image among {lab.n:,}: what stands under the training attack stands under all"
        axis.set_title(some if lab.critical else none)
        keys = [dot(ORANGE, "a critical image")] if lab.critical else []
        keys.append(patch("white", "....", "images that share the maximum"))
        figure.legend(handles=keys, loc="outside lower center", ncols=2)


def _cost(lab: Lab, found: Sequence[Findings], stem: Path, made: list[Path]) -> None:
    """Passes beside those of the attack."""
    with sheet(stem, 6.4, 1.5 + 0.34 * (len(found) + 1), made) as figure:
        axis = figure.subplots()
        costs = [*(one.cost for one in found), lab.attack_cost]
        axis.barh(range(len(costs)), [c.forward for c in costs], color=BLUE, edgecolor="black", linewidth=0.6)
        axis.barh(range(len(costs)), [c.backward for c in costs], left=[c.forward for c in costs], color=ORANGE,
                  edgecolor="black", linewidth=0.6, hatch=HATCH)  # fmt: skip
        for k, c in enumerate(costs):
            axis.text(c.forward + c.backward, k, f" {c.forward} + {c.backward}", va="center", fontsize=8)
        _rows(axis, found, "(the training attack)")
        axis.set_xlim(0, 1.15 * max(1, *(c.forward + c.backward for c in costs)))
        axis.set_xlabel("passes of the batch added to a training step of AT")
        keys = [patch(BLUE, "", "forward"), patch(ORANGE, HATCH, "backward")]
        figure.legend(handles=keys, loc="outside lower center", ncols=2)


PICTURES: dict[str, Callable[[Lab, Sequence[Findings], Path, list[Path]], None]] = {
    "continuity": _continuity, "paths": _paths, "truth": _truth, "areas": _areas, "hidden": _hidden, "cost": _cost,
}  # fmt: skip


def _rows(axis: Any, found: Sequence[Findings], *more: str) -> None:
    """A row per margin, the best on top, and then rows of something else."""
    names = [*(one.margin for one in found), *more]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel("margin")
    axis.set_ylim(len(names) - 0.4, -0.6)  # the best on top, and room for markers beside each name
    axis.tick_params(axis="y", length=0)
