"""The paper's figures, drawn from plain numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.margin_lab.results import Figure
from robustmail.report.style import BLUE, GREY, HATCH, MARKS, ORANGE, VERMILLION, box, dot, patch, remove, sheet, styled
from robustmail.runtime.files import atomic_write
from robustmail.runtime.untrusted import read_text
from robustmail.text import plural

__all__ = ["draw_figure", "draw_curves"]


def draw_figure(found: Figure, folder: Path) -> list[Path]:
    """Draw a figure as PNG and SVG into a folder; returns the files, none where there is nothing to draw.

    What was drawn there before is removed in either case.
    """
    made: list[Path] = []
    stem = folder / f"figure-{found.which}"
    remove(stem)
    if found.drawable:
        DRAW[found.which](found, found.values, stem, made)
    return made


def _stalls(found: Figure, values: dict[str, Any], stem: Path, made: list[Path]) -> None:
    """The image, the perturbation (grey is none), the attacked image, and the loss on the way there."""
    image, change = (np.array(values[name]).transpose(1, 2, 0) for name in ("image", "perturbation"))
    eps, steps = found.spec["eps"], values["steps"]
    scale = f"grey: 0, white: +{eps:.3g}, black: \N{MINUS SIGN}{eps:.3g}"
    with sheet(stem, 7.6, 4.4, made) as figure:
        grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.5))
        for k, (picture, title) in enumerate((
            (image, f"image {values['index']}, class {values['label']}"),
            (0.5 + change / (2 * eps), f"perturbation by LM-PGD\n({scale})"),
            (image + change, "the two together: misclassified"),
        )):  # fmt: skip
            axis = figure.add_subplot(grid[0, k])
            axis.imshow(picture.clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
        axis = figure.add_subplot(grid[1, :])
        for name, label, style, colour in (("pgd", "PGD", "--", BLUE), ("lm", "LM-PGD", "-", ORANGE)):
            loss, wrong = values[f"loss_{name}"], values[f"wrong_{name}"]
            never = f"never wrong in {steps} steps" if wrong > steps else f"wrong from step {wrong}"
            axis.plot(range(len(loss)), loss, style, color=colour, linewidth=1.8, label=f"{label}: {never}")
            if wrong <= steps:
                axis.plot(wrong, loss[wrong], "D", color=colour, markeredgecolor="black", zorder=3)
        axis.set(xlabel="step of the attack", ylabel="cross-entropy (nats)", xlim=(-0.5, steps + 0.5))
        axis.legend()
        figure.suptitle(f"PGD stalls and LM-PGD breaks through: {values['found']:,} of {found.n:,} images", fontsize=9)


def _critical(found: Figure, values: dict[str, Any], stem: Path, made: list[Path]) -> None:
    """Histograms of LPS and of PM, the critical images apart, each share of its own group."""
    critical, steps = np.array(values["critical"]), values["steps"]
    edges = {"lps": np.arange(steps + 2) - 0.5, "pm": np.linspace(-1, 1, 22)}
    with sheet(stem, 7.6, 3, made) as figure:
        for axis, (name, label) in zip(
            figure.subplots(1, 2), (("lps", f"LPS (steps of PGD-{steps})"), ("pm", "PM_adv (probability)")), strict=True
        ):
            middle, wide = (edges[name][1:] + edges[name][:-1]) / 2, np.diff(edges[name])
            for group, colour, hatch, side in ((~critical, BLUE, "", -1), (critical, ORANGE, HATCH, 1)):
                share = 100 * np.histogram(np.array(values[name])[group], edges[name])[0] / max(1, group.sum())
                axis.bar(middle + side * wide * 0.2, share, wide * 0.4, color=colour, edgecolor="black", linewidth=0.4,
                         hatch=hatch)  # fmt: skip
            axis.set(xlabel=label, ylabel="images of each group (%)")
        figure.axes[0].set_xticks(range(steps + 1))
        keys = [patch(BLUE, "", f"other images ({int((~critical).sum()):,})"),
                patch(ORANGE, HATCH, f"critical images ({int(critical.sum()):,})")]  # fmt: skip
        figure.legend(handles=keys, loc="outside lower center", ncols=2)


def _accuracies(found: Figure, values: dict[str, Any], stem: Path, made: list[Path]) -> None:
    """A pair of bars per model with intervals."""
    rows = values["rows"]
    models = list(dict.fromkeys(row["place"] for row in rows))
    with sheet(stem, max(3.6, 1.8 + 1.2 * len(models)), 3.2, made) as figure:
        axis = figure.subplots()
        looks = {"pgd100": ("PGD-100", BLUE, "", -0.2), "cw": ("CW", ORANGE, HATCH, 0.2)}
        for row in rows:
            _, colour, hatch, side = looks[row["attack"]]
            at, height = models.index(row["place"]) + side, 100 * row["accuracy"]
            axis.bar(at, height, 0.38, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            axis.plot([at, at], [100 * row["low"], 100 * row["high"]], color="black", linewidth=1.2)
            axis.text(at, 100 * row["high"] + 1, f"{height:.1f}", ha="center", fontsize=8)
        names = {row["place"]: row["model"] for row in rows}
        axis.set_xticks(range(len(models)), [names[place] for place in models])
        axis.set(ylabel=f"accuracy on {plural(found.n, 'image')} (%)", xlabel="model", ylim=(0, 105))
        keys = [patch(colour, hatch, name) for name, colour, hatch, _ in looks.values()]
        figure.legend(handles=keys, loc="outside lower center", ncols=2)


def _along(found: Figure, values: dict[str, Any], stem: Path, made: list[Path]) -> None:
    """PM of some images along their paths; where each is first wrong is where LPS looks."""
    steps, shown = values["steps"], values["lps"]
    reach = min(1.0, 1.3 * max(abs(value) for pm in values["pm"] for value in pm)) or 1.0
    with sheet(stem, 6.4, 3.4, made) as figure:
        axis = figure.subplots()
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.axvline(shown, color=GREY, linestyle=":", linewidth=1.2)
        axis.text(shown + 0.1, reach, f"LPS {shown} for all", va="top", fontsize=8)
        for k, (index, pm) in enumerate(zip(values["images"], values["pm"], strict=True)):
            mark, colour = MARKS[k % len(MARKS)]
            axis.plot(range(steps + 1), pm, marker=mark, color=colour, linewidth=1, markersize=4,
                      linestyle="-" if k < len(MARKS) else "--", label=f"image {index}: {pm[-1]:+.2f}")  # fmt: skip
        axis.set(
            xlabel=f"iterate of PGD-{steps}",
            ylabel="PM (probability)",
            ylim=(-1.05 * reach, 1.05 * reach),
            xticks=range(steps + 1),
        )
        figure.legend(loc="outside right upper", title="PM_adv at the end")


def _by_lps(found: Figure, values: dict[str, Any], stem: Path, made: list[Path]) -> None:
    """Box plots of PM_nat and PM_adv by LPS."""
    lps, steps = np.array(values["lps"]), values["steps"]
    with sheet(stem, 8.4, 3.3, made) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, label, colour) in zip(
            axes, (("pm_nat", "PM_nat", BLUE), ("pm_adv", "PM_adv", ORANGE)), strict=True
        ):
            axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
            for k in range(steps + 1):
                some = np.array(values[name])[lps == k]
                if len(some) > 4:
                    box(axis, some, k, colour, upright=True, width=0.6)
                else:  # too few for quartiles
                    axis.plot([k] * len(some), some, "o", color=colour, markeredgecolor="black", markersize=4)
            counts = [f"{k}\n({int((lps == k).sum()):,})" for k in range(steps + 1)]
            axis.set_xticks(range(steps + 1), counts, fontsize=7)
            axis.set(xlabel=f"LPS (steps of PGD-{steps}; number of images)", ylabel=f"{label} (probability)",
                     xlim=(-0.6, steps + 0.6))  # fmt: skip
        axes[1].tick_params(labelleft=True)
        keys = [
            patch("white", "", "quartiles, line: 5 to 95 %"),
            dot("white", "single images, where there are 4 or fewer"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=2)


DRAW: dict[str, Callable[[Figure, dict[str, Any], Path, list[Path]], None]] = {
    "1a": _stalls, "1b": _critical, "1c": _accuracies, "2": _along, "4": _by_lps,
}  # fmt: skip


CURVES = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


def draw_curves(folder: Path, title: str = "") -> Path | None:
    """Accuracies, loss and weights by epoch; None where no epoch was finished."""
    rows = list(csv.DictReader(io.StringIO(read_text(folder / "metrics.csv"), newline="")))
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [int(row["epoch"]) + 1 for row in rows]

    def column(name: str, factor: float = 1.0) -> list[float]:
        return [float(row[name]) * factor if row[name] else float("nan") for row in rows]

    with styled(CURVES):
        figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        accuracy, loss, weights = figure.subplots(1, 3)
        for name, label, colour, style in (
            ("val_nat", "natural, validation", BLUE, "-"), ("train_nat", "natural, training", BLUE, ":"),
            ("val_rob", "robust, validation", VERMILLION, "-"), ("train_adv", "robust, training", VERMILLION, ":"),
        ):  # fmt: skip
            accuracy.plot(epochs, column(name, 100), style, color=colour, label=label, marker=".")
        accuracy.set(ylabel="accuracy (%)", ylim=(0, 100))
        loss.plot(epochs, column("train_loss"), "-", color="black", label="total", marker=".")
        loss.plot(epochs, column("train_weighted"), "--", color=VERMILLION, label="weighted part", marker=".")
        loss.plot(epochs, column("train_plain"), ":", color=BLUE, label="plain part", marker=".")
        loss.set(ylabel="training loss", ylim=(0, None))
        weights.plot(epochs, column("train_right"), "-", color=BLUE, label="examples still right", marker=".")
        weights.plot(epochs, column("train_wrong"), "--", color=VERMILLION, label="examples fooled", marker=".")
        weights.axhline(1, color=GREY, linewidth=0.8)
        weights.set(ylabel="mean weight", ylim=(0, None))
        burn_in = [e for e, row in zip(epochs, rows, strict=True) if row["weights"] == "off"]
        for axis in (accuracy, loss, weights):
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlim(0.5, epochs[-1] + 0.5)
            if burn_in and len(burn_in) < len(epochs):
                axis.axvspan(0.5, burn_in[-1] + 0.5, color=GREY, alpha=0.15, linewidth=0, label="burn-in")
        if len(burn_in) == len(epochs):
            weights.text(0.5, 0.5, "no weights:\nevery example counts one", ha="center", transform=weights.transAxes)
        for axis in (accuracy, loss, weights):
            if axis is not weights or len(burn_in) < len(epochs):
                axis.legend(frameon=False, fontsize=7)
        figure.suptitle(title, x=0.01, ha="left")
        path = folder / "curves.png"
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
