"""curves.png: how a run went, from its metrics.csv."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from robustmail.files import write
from robustmail.report.ink import styled
from robustmail.untrusted import read_text

__all__ = ["draw_curves"]

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # apart for the colour-blind, and in print
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


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

    with styled(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        accuracy, loss, weights = figure.subplots(1, 3)
        for name, label, colour, style in (
            ("val_nat", "natural, validation", BLUE, "-"), ("train_nat", "natural, training", BLUE, ":"),
            ("val_rob", "robust, validation", ORANGE, "-"), ("train_adv", "robust, training", ORANGE, ":"),
        ):  # fmt: skip
            accuracy.plot(epochs, column(name, 100), style, color=colour, label=label, marker=".")
        accuracy.set(ylabel="accuracy (%)", ylim=(0, 100))
        loss.plot(epochs, column("train_loss"), "-", color="black", label="total", marker=".")
        loss.plot(epochs, column("train_weighted"), "--", color=ORANGE, label="weighted part", marker=".")
        loss.plot(epochs, column("train_plain"), ":", color=BLUE, label="plain part", marker=".")
        loss.set(ylabel="training loss", ylim=(0, None))
        weights.plot(epochs, column("train_right"), "-", color=BLUE, label="examples still right", marker=".")
        weights.plot(epochs, column("train_wrong"), "--", color=ORANGE, label="examples fooled", marker=".")
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
        write(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
