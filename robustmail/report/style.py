"""How figures look on paper: apart for the colour-blind and in black and white; PNG and SVG, the same bytes always."""

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
    "BLUE", "GREEN", "GREY", "HATCH", "MARKS", "ORANGE", "box", "dot", "patch", "pictures", "remove", "sheet",
    "styled",
]  # fmt: skip

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"  # of Okabe and Ito; unlike in grey too
VERMILLION = "#D55E00"  # for thin lines
HATCH = "////"
MARKS = (("o", BLUE), ("s", ORANGE), ("^", GREEN), ("D", "black"))
FORMS: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
    "svg.hashsalt": "robustmail", "text.parse_math": False, "hatch.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 8, "axes.titlesize": 9,
}  # fmt: skip


def pictures(stem: Path) -> list[Path]:
    """The files of one picture."""
    return [stem.with_name(f"{stem.name}.{form}") for form in FORMS]


def remove(stem: Path) -> None:
    """Remove a picture, lest an old one stay beside new numbers."""
    for path in pictures(stem):
        path.unlink(missing_ok=True)


@contextmanager
def styled(style: dict[Any, Any]) -> Iterator[None]:
    """Figures look so, whatever a matplotlibrc says: it may lie in the current folder, and it can start processes."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


@contextmanager
def sheet(stem: Path, width: float, height: float, made: list[Path]) -> Iterator[Figure]:
    """A figure of some inches, written to stem.png and stem.svg at the end; the paths are added to `made`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with styled(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        yield figure
        for path, (form, metadata) in zip(pictures(stem), FORMS.items(), strict=True):
            atomic_write(path, partial(figure.savefig, format=form, metadata=metadata))
            made.append(path)


def box(axis: Any, values: Any, at: float, colour: str, upright: bool = False, width: float = 0.2) -> None:
    """Quartiles as a box, 5 to 95 % as a line."""
    axis.boxplot(values, positions=[at], widths=width, orientation="vertical" if upright else "horizontal",
                 whis=(5, 95), showfliers=False, patch_artist=True, boxprops={"facecolor": colour, "linewidth": 0.8},
                 medianprops={"color": "black", "linewidth": 1.5}, manage_ticks=False)  # fmt: skip


def patch(colour: str, hatch: str, label: str) -> Any:
    """A key for a filled shape."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, edgecolor="black", hatch=hatch, label=label, linewidth=0.6)


def dot(colour: str, label: str) -> Any:
    """A key for a point."""
    from matplotlib.lines import Line2D

    return Line2D([], [], marker="o", linestyle="", color=colour, markeredgecolor="black", label=label)
