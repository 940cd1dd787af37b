"""The results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.records import Attacked, Finished
from robustmail.report.lines import percent, printable
from robustmail.report.results import LIGHTS, Light, Results

__all__ = ["BELIEVING", "COLOURS", "evaluation_table", "light_lines", "results_table"]

BELIEVING = "docs/believing.md"  # a section per check, under the check's name
COLOURS = {"green": "green", "yellow": "yellow", "red": "red", "grey": "bright_black"}


def results_table(done: Finished) -> Table:
    """Accuracy per attack with its 95 % Wilson interval."""
    return _table(f"test set, {done.weights} of epoch {done.epoch + 1}", done.rows)


def evaluation_table(results: dict[str, Any], folder: Path = Path()) -> RenderableType:
    """A results.json as a table, the sentence to quote, and the light with a line per flag.

    folder: where it lies; its name is that of results which have none. Raises RunError where it is no results.json.
    """
    read = Results.of(results, folder)
    table = _table(f"{read.name}: {read.setting}", read.attacks)
    table.add_section()
    for row in read.rows[len(read.attacks) :]:
        table.add_row(*_cells(row))
    said = [Text(printable(text)) for text in (f"{read.claim}.", *read.caveats)]
    return Group(table, *said, *(light_lines(read.light) if read.light else ()))


def light_lines(light: Light) -> Iterable[RenderableType]:
    """The light in words, and below it what every flag measured and where it is explained."""
    gap = "" if light.gap is None else f"; {light.gap:.1f} points from the best PGD to the strongest attack"
    yield Text.assemble((f"light: {light.colour}", f"bold {COLOURS[light.colour]}"), f", {LIGHTS[light.colour]}{gap}")
    flags = Table.grid(padding=(0, 1))
    for flag in light.flags:
        where = f"-> {BELIEVING}#{flag.name}"
        what = "; ".join(filter(None, (flag.measured, flag.meaning)))
        flags.add_row(
            Text("!", style=f"bold {COLOURS.get(flag.light, '')}".strip()),
            Text(printable(f"{flag.name} ({flag.light}): {what} {where}")),
        )
    if light.flags:
        yield flags


def _table(title: str, rows: Iterable[Attacked]) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left", title_style="", header_style="")
    table.add_column("attack")
    for name in ("accuracy", "95 % interval", "correct / n", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Attacked) -> tuple[RenderableType, ...]:
    interval = f"{percent(row.low)} – {percent(row.high)}"
    name = Text(printable(row.name))  # a Text, because brackets in a str would be markup
    return name, percent(row.accuracy), interval, f"{row.correct} / {row.n}", f"{row.seconds:.1f}"
