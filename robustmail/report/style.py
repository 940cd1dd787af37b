"""Style of all figures: colours for colour-blind readers and for black and white; the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustmail.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "HATCH",
    "MARKERS",
    "ORANGE",
    "VERMILLION",
    "box_plot",
    "legend_dot",
    "legend_patch",
    "picture_paths",
    "remove_pictures",
    "save_picture",
    "saved_figure",
    "styled_figure",
]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"  # Okabe and Ito's; distinct in grey too
VERMILLION = "#D55E00"  # for thin lines
HATCH = "////"
MARKERS = (("o", BLUE), ("s", ORANGE), ("^", GREEN), ("D", "black"))
METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "robustmail",
    "text.parse_math": False,
}


def picture_paths(stem: Path) -> list[Path]:
    """List the files of a picture: stem.png and stem.svg."""
    return [stem.with_name(f"{stem.name}.{form}") for form in METADATA]


def remove_pictures(stem: Path) -> None:
    """Delete a picture, so that no old picture stays beside new numbers."""
    for path in picture_paths(stem):
        path.unlink(missing_ok=True)


@contextmanager
def styled_figure(width: float, height: float) -> Iterator[Figure]:
    """Create a matplotlib figure of width x height inches; the style holds inside the `with` block.

    A matplotlibrc is ignored: it may lie in the current folder, and it can start processes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def saved_figure(stem: Path, width: float, height: float, files: list[Path]) -> Iterator[Figure]:
    """Create a figure and write it to stem.png and stem.svg at the end of the `with` block.

    width, height: in inches.
    files: the paths written are appended to it.
    """
    with styled_figure(width, height) as figure:
        yield figure
        for path in picture_paths(stem):
            save_picture(figure, path)
            figure.set_layout_engine("none")  # the first file has laid the figure out, which takes as long as drawing
            files.append(path)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as .png or .svg, without date and version, so that equal figures are equal files."""
    form = path.suffix[1:]
    atomic_write(path, partial(figure.savefig, format=form, metadata=METADATA[form]))


def box_plot(axis: Any, values: Any, position: float, colour: str, vertical: bool = False, width: float = 0.2) -> None:
    """Draw quartiles as a box and the 5 to 95 % range as a line; width: of the box, in units of the axis."""
    axis.boxplot(
        values,
        positions=[position],
        widths=width,
        orientation="vertical" if vertical else "horizontal",
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "linewidth": 0.8},
        medianprops={"color": "black", "linewidth": 1.5},
        manage_ticks=False,
    )


def legend_patch(colour: str, hatch: str, label: str) -> Any:
    """A legend entry for a filled shape."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="black", hatch=hatch, label=label, linewidth=0.6)


def legend_dot(colour: str, label: str) -> Any:
    """A legend entry for a point."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", color=colour, markeredgecolor="black", label=label)
