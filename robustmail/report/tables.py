"""A head, rows of texts and notes below them, for a terminal, Markdown or LaTeX."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustmail.evaluation.results import LIGHTS, Light, Results
from robustmail.records import AttackResult, RunFinished
from robustmail.report.log_lines import printable
from robustmail.text import percent

__all__ = [
    "TextTable",
    "as_latex",
    "as_markdown",
    "as_table",
    "BELIEVING",
    "COLOURS",
    "results_table",
    "evaluation_table",
    "comparison_table",
    "light_lines",
]

NUMBER = re.compile(r"[+−]?[\d,.]+( ±[\d.]+)?( [*=])?|\[[-\d., ]+\]|–|")


@dataclass(frozen=True)
class TextTable:
    """Cells as texts; the first column names the rows. Control characters are taken out."""

    head: list[str]
    body: list[list[str]]
    notes: list[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", list(map(printable, self.head)))
        object.__setattr__(self, "body", [list(map(printable, row)) for row in self.body])
        object.__setattr__(self, "notes", list(map(printable, self.notes)))


def as_markdown(grid: TextTable) -> str:
    """A table of GitHub's Markdown, and the notes as a list."""
    safe = [[re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", cell) for cell in row] for row in (grid.head, *grid.body)]
    rule = [":--", *["--:"] * (len(grid.head) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (safe[0], rule, *safe[1:])]
    notes = [re.sub(r"([\\`*_<>\[\]~])", r"\\\1", note) for note in grid.notes]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def as_latex(grid: TextTable) -> str:
    """A table of booktabs; the first note is its caption."""
    names = [
        f"\\shortstack[r]{{{_tex(name)}}}".replace(" ", r"\\") if " " in name else _tex(name) for name in grid.head
    ]
    cells = [[re.sub(r" \$\\pm\$([\d.]+)", r"$_{\\pm\1}$", _tex(cell)) for cell in row] for row in grid.body]
    rows = [" & ".join(row) + r" \\" for row in (names, *cells)]
    about, *more = (note.rstrip(".") + "." for note in map(_tex, grid.notes))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{about}}}",
            r"\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{@{{}}l{'r' * (len(grid.head) - 1)}@{{}}}}",
            r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule",
            r"\end{tabular}",
            rf"\par\smallskip\raggedright\footnotesize {' '.join(more)}",
            r"\end{table}",
        ]
    ) + "\n"  # fmt: skip


def as_table(grid: TextTable, width: int | None = None) -> str:
    """A table for a terminal, of its width if no other is given."""
    table = Table(header_style="", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(grid.head):
        number = all(NUMBER.fullmatch(row[i]) for row in grid.body)
        room = min(16, max((len(row[i]) for row in grid.body), default=0)) if i == 0 else None
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold", min_width=room)
    for row in grid.body:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table, *map(Text, grid.notes), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _tex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "–": "--", "−": "$-$", '"': r"\textquotedbl{}",
    }  # fmt: skip
    special |= {c: f"{{{c}}}" for c in "[]*"}  # after a line's end these would be its options
    return "".join(special.get(c, c) for c in text)


BELIEVING = "docs/believing.md"  # a section per check, under the check's name


COLOURS = {"green": "green", "yellow": "yellow", "red": "red", "grey": "bright_black"}


def results_table(done: RunFinished) -> Table:
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


def _table(title: str, rows: Iterable[AttackResult]) -> Table:
    table = Table(title=Text(printable(title)), title_justify="left", title_style="", header_style="")
    table.add_column("attack")
    for name in ("accuracy", "95 % interval", "correct / n", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: AttackResult) -> tuple[RenderableType, ...]:
    interval = f"{percent(row.low)} – {percent(row.high)}"
    name = Text(printable(row.name))  # a Text, because brackets in a str would be markup
    return name, percent(row.accuracy), interval, f"{row.correct} / {row.n}", f"{row.seconds:.1f}"
