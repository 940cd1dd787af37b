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

__all__ = ["BELIEVING", "COLOURS", "comparison_table", "evaluation_table", "light_lines", "results_table"]

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


def comparison_table(rows: Iterable[Any], first: str, second: str, notes: Iterable[str]) -> RenderableType:
    """Paired differences (`evaluation.compare.Compared`), each with its interval and a verdict in words."""
    rows = list(rows)
    title = f"A: {printable(first)}\nB: {printable(second)}"
    table = Table(title=Text(title), title_justify="left", title_style="", header_style="")
    table.add_column("stands under")
    for name in ("A", "B", "A - B, 95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        found = row.paired
        same = found.only_first + found.only_second == 0
        verdict = "the same" if same else "tie" if found.tie else f"{'A' if found.difference > 0 else 'B'} is better"
        difference, low, high = (f"{100 * v:+.1f}" for v in (found.difference, found.low, found.high))
        cells = [percent(row.first), percent(row.second), f"{difference} [{low}, {high}]", f"{found.p:.2g}"]
        table.add_row(Text(printable(row.name)), *cells, verdict)
    ties = [row for row in rows if row.paired.tie]
    said = [f"p is McNemar's, exact, on {rows[0].paired.n:,} images"] if rows else []
    said += (
        ["a tie at this n is what chance alone would do as well"] if any(row.paired.difference for row in ties) else []
    )
    said += [
        f"{row.name}: about {row.needed:,} images would tell so small a difference, four times in five"
        for row in ties if row.needed
    ]  # fmt: skip
    notes = [*said, *notes]
    return Group(table, *(Text(printable(f"{note}.")) for note in notes))


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
