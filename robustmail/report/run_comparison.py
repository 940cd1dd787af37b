"""Two runs side by side: the fields that differ, and the curves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.errors import RunError
from robustmail.report.runs import RECIPE, best_validation, read_curves, read_recipe
from robustmail.runtime.untrusted import printable
from robustmail.text import percent, plural

__all__ = ["compare_fields", "curves_table", "fields_table", "is_run"]

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTHS = (14, 8)  # letters of a curve, on a wide and on a narrow terminal
NARROW = 76
CURVES = {"train_loss": "training loss", "val_nat": "val natural", "val_rob": "val robust"}


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, finished or not."""
    return (folder / RECIPE).is_file()


def compare_fields(first: Path, second: Path) -> dict[str, tuple[str, str]]:
    """The fields of two runs' recipes that differ, with both values; "–" for one that is not there.

    Raises RunError: a recipe.json that is damaged.
    """
    a, b = (_recipe(folder) for folder in (first, second))
    return {k: (a.get(k, "–"), b.get(k, "–")) for k in {**a, **b} if a.get(k) != b.get(k)}


def fields_table(differ: dict[str, tuple[str, str]]) -> RenderableType:
    """The fields that differ as a table."""
    if not differ:
        return Text("Both have the same recipe.")
    table = Table(header_style="", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("field", "A", "B"):
        table.add_column(name, overflow="fold")
    for field, values in differ.items():
        table.add_row(*(Text(printable(text)) for text in (field, *values)))
    return table


def curves_table(first: Path, second: Path, width: int) -> RenderableType:
    """Loss and accuracies of both runs by epoch, on one scale for both, with the last value.

    width: of the terminal, in letters.
    Raises RunError: a metrics.csv that is damaged.
    """
    rows = [_curves(folder) for folder in (first, second)]
    table = Table(header_style="", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("by epoch")
    for name in ("A", "last", "B", "last"):
        table.add_column(name, justify="right" if name == "last" else "left", no_wrap=True)
    for column, title in CURVES.items():
        both = [[float(row[column]) for row in run if row.get(column)] for run in rows]
        span = [value for values in both for value in values]
        cells = [
            cell for values in both for cell in (_spark(values, span, WIDTHS[width < NARROW]), _last(values, column))
        ]
        table.add_row(title, *cells)
    return Group(table, *(Text(f"{name}: {_best(run)}.") for name, run in zip("AB", rows, strict=True)))


def _recipe(folder: Path) -> dict[str, str]:
    try:
        return read_recipe(folder)
    except (OSError, ValueError) as error:
        raise RunError(str(folder / RECIPE), f"damaged ({error})") from error


def _curves(folder: Path) -> list[dict[str, str]]:
    path = folder / "metrics.csv"
    try:
        rows = read_curves(folder)
        _ = [float(row[column]) for row in rows for column in CURVES if row.get(column)]
        return rows
    except (OSError, ValueError, csv.Error) as error:
        raise RunError(str(path), f"damaged ({error})") from error


def _spark(values: Sequence[float], span: Sequence[float], width: int) -> str:
    """A curve of `width` letters at most, each the value at its place."""
    low, high = min(span, default=0.0), max(span, default=1.0)
    n = min(width, len(values))
    places = [values[round(i * (len(values) - 1) / max(n - 1, 1))] for i in range(n)]
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in places)


def _last(values: Sequence[float], column: str) -> str:
    if not values:
        return "–"
    return f"{values[-1]:.4f}" if column == "train_loss" else percent(values[-1])


def _best(run: list[dict[str, str]]) -> str:
    if (best := best_validation(run)) is None:
        return "no epoch is finished"
    return f"{plural(len(run), 'epoch')}, the best robust validation is {percent(best[0])} after epoch {best[1]}"
