"""Draw the paper's figures and the training curves with matplotlib, from plain numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.margin_lab.results import Figure
from robustmail.report.style import (
    BLUE,
    GREY,
    HATCH,
    MARKERS,
    ORANGE,
    VERMILLION,
    box_plot,
    legend_dot,
    legend_patch,
    remove_pictures,
    save_picture,
    saved_figure,
    styled_figure,
)
from robustmail.runtime.untrusted import read_text
from robustmail.text import format_eps, plural

__all__ = ["draw_curves", "draw_figure"]


def draw_figure(figure: Figure, folder: Path) -> list[Path]:
    """Draw a figure as PNG and SVG into a folder; returns the files, none where there is nothing to draw.

    An older picture of the figure is removed in either case.
    """
    files: list[Path] = []
    stem = folder / f"figure-{figure.which}"
    remove_pictures(stem)
    if figure.drawable:
        DRAW[figure.which](figure, figure.values, stem, files)
    return files


def _pgd_stalls(figure: Figure, values: dict[str, Any], stem: Path, files: list[Path]) -> None:
    """The image, the perturbation (grey is 0), the attacked image, and the loss of both attacks by step."""
    image, perturbation = (np.array(values[name]).transpose(1, 2, 0) for name in ("image", "perturbation"))
    eps, steps = figure.spec["eps"], values["steps"]
    scale = f"grey: 0, white: +{format_eps(eps)}, black: \N{MINUS SIGN}{format_eps(eps)}"
    true = str(values.get("class_name") or f"class {values['label']}").replace("$", r"\$")  # or it is mathematics
    pictures = (
        (image, f"image {values['index']}, {true}"),
        (0.5 + perturbation / (2 * eps), f"perturbation by LM-PGD\n({scale})"),
        (image + perturbation, "attacked image: misclassified"),
    )
    with saved_figure(stem, 7.6, 4.4, files) as page:
        grid = page.add_gridspec(2, 3, height_ratios=(1, 1.5))
        for k, (picture, title) in enumerate(pictures):
            axis = page.add_subplot(grid[0, k])
            axis.imshow(picture.clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
        axis = page.add_subplot(grid[1, :])
        for name, label, line, colour in (("pgd", "PGD", "--", BLUE), ("lm", "LM-PGD", "-", ORANGE)):
            loss, wrong = values[f"loss_{name}"], values[f"wrong_{name}"]
            outcome = f"never wrong in {steps} steps" if wrong > steps else f"wrong from step {wrong}"
            axis.plot(range(len(loss)), loss, line, color=colour, linewidth=1.8, label=f"{label}: {outcome}")
            if wrong <= steps:
                axis.plot(wrong, loss[wrong], "D", color=colour, markeredgecolor="black", zorder=3)
        axis.set(xlabel="step of the attack", ylabel="cross-entropy (nats)", xlim=(-0.5, steps + 0.5))
        axis.legend()
        page.suptitle(
            f"PGD stalls, LM-PGD breaks the image: {values['broken_by_lm']:,} of {plural(figure.n, 'image')}",
            fontsize=9,
        )


def _critical_images(figure: Figure, values: dict[str, Any], stem: Path, files: list[Path]) -> None:
    """Histograms of LPS and of PM, the critical images and the others as shares of their own group."""
    critical, steps = np.array(values["critical"]), values["steps"]
    edges = {"lps": np.arange(steps + 2) - 0.5, "pm": np.linspace(-1, 1, 22)}
    panels = (("lps", f"LPS (steps of PGD-{steps})"), ("pm", "PM_adv (probability)"))
    with saved_figure(stem, 7.6, 3, files) as page:
        for axis, (name, label) in zip(page.subplots(1, 2), panels, strict=True):
            centres, widths = (edges[name][1:] + edges[name][:-1]) / 2, np.diff(edges[name])
            for group, colour, hatch, side in ((~critical, BLUE, "", -1), (critical, ORANGE, HATCH, 1)):
                share = 100 * np.histogram(np.array(values[name])[group], edges[name])[0] / max(1, group.sum())
                x = centres + side * widths * 0.2
                axis.bar(x, share, widths * 0.4, color=colour, edgecolor="black", linewidth=0.4, hatch=hatch)
            axis.set(xlabel=label, ylabel="images of each group (%)")
        page.axes[0].set_xticks(range(steps + 1))
        keys = [
            legend_patch(BLUE, "", f"other images ({int((~critical).sum()):,})"),
            legend_patch(ORANGE, HATCH, f"critical images ({int(critical.sum()):,})"),
        ]
        page.legend(handles=keys, loc="outside lower center", ncols=2)


def _accuracies(figure: Figure, values: dict[str, Any], stem: Path, files: list[Path]) -> None:
    """A pair of bars for each model, with intervals."""
    rows = values["rows"]
    places = list(dict.fromkeys(row["place"] for row in rows))
    with saved_figure(stem, max(3.6, 1.8 + 1.2 * len(places)), 3.2, files) as page:
        axis = page.subplots()
        bars = {"pgd100": ("PGD-100", BLUE, "", -0.2), "cw": ("CW", ORANGE, HATCH, 0.2)}
        for row in rows:
            _, colour, hatch, side = bars[row["attack"]]
            x, height = places.index(row["place"]) + side, 100 * row["accuracy"]
            axis.bar(x, height, 0.38, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            axis.plot([x, x], [100 * row["low"], 100 * row["high"]], color="black", linewidth=1.2)
            axis.text(x, 100 * row["high"] + 1, f"{height:.1f}", ha="center", fontsize=8)
        names = {row["place"]: row["model"] for row in rows}
        axis.set_xticks(range(len(places)), [names[place] for place in places])
        axis.set(ylabel=f"accuracy on {plural(figure.n, 'image')} (%)", xlabel="model", ylim=(0, 105))
        keys = [legend_patch(colour, hatch, name) for name, colour, hatch, _ in bars.values()]
        page.legend(handles=keys, loc="outside lower center", ncols=2)


def _pm_along_paths(figure: Figure, values: dict[str, Any], stem: Path, files: list[Path]) -> None:
    """PM of several images along their attack paths; the dotted line is their common LPS."""
    steps, lps = values["steps"], values["lps"]
    limit = min(1.0, 1.3 * max(abs(value) for pm in values["pm"] for value in pm)) or 1.0
    with saved_figure(stem, 6.4, 3.4, files) as page:
        axis = page.subplots()
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.axvline(lps, color=GREY, linestyle=":", linewidth=1.2)
        axis.text(lps + 0.1, limit, f"LPS {lps} for all", va="top", fontsize=8)
        for k, (index, pm) in enumerate(zip(values["images"], values["pm"], strict=True)):
            marker, colour = MARKERS[k % len(MARKERS)]
            line = "-" if k < len(MARKERS) else "--"
            label = f"image {index}: {pm[-1]:+.2f}"
            axis.plot(range(steps + 1), pm, line, marker=marker, color=colour, linewidth=1, markersize=4, label=label)
        axis.set(
            xlabel=f"iterate of PGD-{steps}",
            ylabel="PM (probability)",
            ylim=(-1.05 * limit, 1.05 * limit),
            xticks=range(steps + 1),
        )
        page.legend(loc="outside right upper", title="PM_adv at the end")


def _pm_by_lps(figure: Figure, values: dict[str, Any], stem: Path, files: list[Path]) -> None:
    """Box plots of PM_nat and PM_adv by LPS."""
    lps, steps = np.array(values["lps"]), values["steps"]
    panels = (("pm_nat", "PM_nat", BLUE), ("pm_adv", "PM_adv", ORANGE))
    with saved_figure(stem, 8.4, 3.3, files) as page:
        axes = page.subplots(1, 2, sharey=True)
        for axis, (name, label, colour) in zip(axes, panels, strict=True):
            axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
            for k in range(steps + 1):
                group = np.array(values[name])[lps == k]
                if len(group) > 4:
                    box_plot(axis, group, k, colour, vertical=True, width=0.6)
                else:  # too few for quartiles
                    axis.plot([k] * len(group), group, "o", color=colour, markeredgecolor="black", markersize=4)
            counts = [f"{k}\n({int((lps == k).sum()):,})" for k in range(steps + 1)]
            axis.set_xticks(range(steps + 1), counts, fontsize=7)
            axis.set(
                xlabel=f"LPS (steps of PGD-{steps}; number of images)",
                ylabel=f"{label} (probability)",
                xlim=(-0.6, steps + 0.6),
            )
        axes[1].tick_params(labelleft=True)
        keys = [
            legend_patch("white", "", "quartiles, line: 5 to 95 %"),
            legend_dot("white", "single images, where there are 4 or fewer"),
        ]
        page.legend(handles=keys, loc="outside lower center", ncols=2)


DRAW: dict[str, Callable[[Figure, dict[str, Any], Path, list[Path]], None]] = {
    "1a": _pgd_stalls,
    "1b": _critical_images,
    "1c": _accuracies,
    "2": _pm_along_paths,
    "4": _pm_by_lps,
}

ACCURACY_CURVES = (
    ("val_nat", "natural, validation", BLUE, "-"),
    ("train_nat", "natural, training", BLUE, ":"),
    ("val_rob", "robust, validation", VERMILLION, "-"),
    ("train_adv", "robust, training", VERMILLION, ":"),
)
LOSS_CURVES = (
    ("train_loss", "total", "black", "-"),
    ("train_weighted", "weighted part", VERMILLION, "--"),
    ("train_plain", "plain part", BLUE, ":"),
)
WEIGHT_CURVES = (
    ("train_right", "examples still right", BLUE, "-"),
    ("train_wrong", "examples fooled", VERMILLION, "--"),
)


def draw_curves(folder: Path, title: str = "") -> Path | None:
    """Draw accuracies, loss and mean weights by epoch from a run's metrics.csv as curves.png; returns its path.

    Returns None where no epoch is finished.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(folder / "metrics.csv"), newline="")))
    if not rows:
        return None
    with styled_figure(10, 3.4) as page:
        accuracy, loss, weights = page.subplots(1, 3)
        _plot_columns(accuracy, rows, ACCURACY_CURVES, factor=100)
        accuracy.set(ylabel="accuracy (%)", ylim=(0, 100))
        _plot_columns(loss, rows, LOSS_CURVES)
        loss.set(ylabel="training loss", ylim=(0, None))
        _plot_columns(weights, rows, WEIGHT_CURVES)
        weights.axhline(1, color=GREY, linewidth=0.8)
        weights.set(ylabel="mean weight", ylim=(0, None))
        has_weights = _mark_burn_in(page.axes, rows)
        if not has_weights:
            text = "no weights:\nevery example has weight one"
            weights.text(0.5, 0.5, text, ha="center", transform=weights.transAxes)
        for axis in (accuracy, loss, *([weights] if has_weights else [])):
            axis.legend()
        page.suptitle(title, x=0.01, ha="left")
        path = folder / "curves.png"
        save_picture(page, path)
    return path


def _plot_columns(
    axis: Any, rows: Sequence[Mapping[str, str]], curves: Sequence[tuple[str, str, str, str]], factor: float = 1.0
) -> None:
    """Plot columns of metrics.csv against the epoch; curves: (column, label, colour, line style)."""
    from matplotlib.ticker import MaxNLocator

    epochs = [int(row["epoch"]) + 1 for row in rows]
    for column, label, colour, line in curves:
        values = [float(row[column]) * factor if row[column] else float("nan") for row in rows]
        axis.plot(epochs, values, line, color=colour, label=label, marker=".")
    axis.set_xlabel("epoch")
    axis.set_xlim(0.5, epochs[-1] + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_burn_in(axes: Sequence[Any], rows: Sequence[Mapping[str, str]]) -> bool:
    """Shade the epochs without example weights; returns whether any epoch has weights."""
    burn_in = [int(row["epoch"]) + 1 for row in rows if row["weights"] == "off"]
    has_weights = len(burn_in) < len(rows)
    if burn_in and has_weights:
        for axis in axes:
            axis.axvspan(0.5, burn_in[-1] + 0.5, color=GREY, alpha=0.15, linewidth=0, label="burn-in")
    return has_weights
