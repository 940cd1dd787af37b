"""Tables of results for a terminal, Markdown or LaTeX."""

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
from robustmail.report.classes import class_notes, class_rows
from robustmail.runtime.untrusted import printable
from robustmail.text import percent

__all__ = [
    "BELIEVING",
    "TextTable",
    "as_latex",
    "as_markdown",
    "as_table",
    "comparison_table",
    "evaluation_table",
    "light_lines",
    "run_table",
]

BELIEVING = "docs/believing.md"  # explains every check in a section with its name
COLOURS = {"green": "green", "yellow": "yellow", "red": "red", "grey": "bright_black"}
NUMBER = re.compile(r"[+−]?[\d,.]+( ±[\d.]+)?( [*=])?|\[[-\d., ]+\]|–|")


@dataclass(frozen=True)
class TextTable:
    """A table of texts with notes below it; the first column names the rows. Control characters are replaced."""

    head: list[str]
    body: list[list[str]]
    notes: list[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", list(map(printable, self.head)))
        object.__setattr__(self, "body", [list(map(printable, row)) for row in self.body])
        object.__setattr__(self, "notes", list(map(printable, self.notes)))


def as_markdown(table: TextTable) -> str:
    """Format as a table of GitHub's Markdown, with the notes as a list."""
    safe = [[re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", cell) for cell in row] for row in (table.head, *table.body)]
    rule = [":--", *["--:"] * (len(table.head) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (safe[0], rule, *safe[1:])]
    notes = [re.sub(r"([\\`*_<>\[\]~])", r"\\\1", note) for note in table.notes]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def as_latex(table: TextTable) -> str:
    """Format as a LaTeX table with booktabs; the first note is its caption."""
    names = [
        f"\\shortstack[r]{{{_tex(name)}}}".replace(" ", r"\\") if " " in name else _tex(name) for name in table.head
    ]
    cells = [[re.sub(r" \$\\pm\$([\d.]+)", r"$_{\\pm\1}$", _tex(cell)) for cell in row] for row in table.body]
    rows = [" & ".join(row) + r" \\" for row in (names, *cells)]
    about, *more = (note.rstrip(".") + "." for note in map(_tex, table.notes))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{about}}}",
            r"\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{@{{}}l{'r' * (len(table.head) - 1)}@{{}}}}",
            r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule",
            r"\end{tabular}",
            rf"\par\smallskip\raggedright\footnotesize {' '.join(more)}",
            r"\end{table}",
        ]
    ) + "\n"  # fmt: skip


def as_table(table: TextTable, width: int | None = None) -> str:
    """Format as a table for a terminal; width: in characters, by default the terminal's."""
    rich_table = Table(header_style="", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(table.head):
        number = all(NUMBER.fullmatch(row[i]) for row in table.body)
        min_width = min(16, max((len(row[i]) for row in table.body), default=0)) if i == 0 else None
        rich_table.add_column(Text(name), justify="right" if number else "left", overflow="fold", min_width=min_width)
    for row in table.body:
        rich_table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(rich_table, *map(Text, table.notes), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run_table(record: RunFinished) -> RenderableType:
    """A run's accuracies under each attack with their 95 % Wilson intervals, and as of an evaluation all else."""
    title = f"test set, {record.weights} of epoch {record.epoch + 1}"
    if not record.results:
        return _table(title, record.rows)
    return _evaluation(title, Results.of(dict(record.results), Path(record.folder)))


def evaluation_table(results: dict[str, Any], folder: Path = Path()) -> RenderableType:
    """An evaluation as a table, the sentence to quote, caveats, and the light with a line per flag.

    results: content of a results.json.
    folder: of the file; its name is used where the results have no name.

    Raises RunError: not the content of a results.json.
    """
    evaluation = Results.of(results, folder)
    return _evaluation(f"{evaluation.name}: {evaluation.setting}", evaluation)


def _evaluation(title: str, evaluation: Results) -> RenderableType:
    table = _table(title, evaluation.attacks)
    table.add_section()
    for row in evaluation.rows[len(evaluation.attacks) :]:
        table.add_row(*_cells(row))
    table.add_section()
    for cells in class_rows(evaluation):
        table.add_row(*(Text(printable(cell)) for cell in cells), "")
    sentences = [f"{text}." for text in (evaluation.claim, *class_notes(evaluation))]
    notes = [Text(printable(text)) for text in (*sentences, *evaluation.caveats)]
    return Group(table, *notes, *(light_lines(evaluation.light) if evaluation.light else ()))


def comparison_table(rows: Iterable[Any], classes: Iterable[Any], notes: Iterable[str]) -> RenderableType:
    """Paired differences of two evaluations, A and B, as a table, each with its interval and a verdict.

    rows: `evaluation.compare.ComparedAttack`, one for each attack that both evaluations ran.
    classes: `evaluation.compare.ComparedClasses`.
    notes: sentences to print below the table.
    """
    rows = list(rows)
    table = _narrow()
    table.add_column("stands under", min_width=11)
    for name in ("A", "B", "A - B, 95 % interval", "p"):
        is_interval = name.startswith("A -")  # may be two lines where 60 columns are all there are
        table.add_column(name, justify="right", no_wrap=not is_interval, min_width=13 if is_interval else None)
    table.add_column("verdict", min_width=7)
    for row in rows:
        found = row.paired
        is_same = found.only_first + found.only_second == 0
        table.add_row(*_compared(row, found), f"{found.p:.2g}", _verdict(found, is_same))
    table.add_section()
    for row in classes:
        is_same = row.low == row.high == 0
        table.add_row(*_compared(row, row), "–", _verdict(row, is_same))
    ties = [row for row in rows if row.paired.tie]
    own_notes = [f"p is McNemar's, exact, on {rows[0].paired.n:,} images"] if rows else []
    if any(row.paired.difference for row in ties):
        own_notes.append("tie: the difference is not significant at this n")
    own_notes += [
        f"{row.name}: about {row.needed:,} images would detect this difference with 80 % power"
        for row in ties
        if row.needed
    ]
    return Group(table, *(Text(printable(f"{note}.")) for note in (*own_notes, *notes)))


def _compared(row: Any, found: Any) -> tuple[RenderableType, ...]:
    """Name, both accuracies, and their difference with its interval."""
    difference, low, high = (f"{100 * v:+.1f}" for v in (found.difference, found.low, found.high))
    return Text(printable(row.name)), percent(row.first), percent(row.second), f"{difference} [{low}, {high}]"


def _verdict(found: Any, is_same: bool) -> str:
    better = "A" if found.difference > 0 else "B"
    return "the same" if is_same else "tie" if found.tie else f"{better} is better"


def light_lines(light: Light) -> Iterable[RenderableType]:
    """The light in words, and a line for every flag: what it measured and where it is explained."""
    gap = "" if light.gap is None else f"; {light.gap:.1f} points from the best PGD to the strongest attack"
    yield Text.assemble((f"light: {light.colour}", f"bold {COLOURS[light.colour]}"), f", {LIGHTS[light.colour]}{gap}")
    flags = Table.grid(padding=(0, 1))
    for flag in light.flags:
        link = f"-> {BELIEVING}#{flag.name}"
        text = "; ".join(filter(None, (flag.measured, flag.meaning)))
        flags.add_row(
            Text("!", style=f"bold {COLOURS.get(flag.light, '')}".strip()),
            Text(printable(f"{flag.name} ({flag.light}): {text} {link}")),
        )
    if light.flags:
        yield flags


def _narrow(title: str | None = None) -> Table:
    """An empty table; narrow, so that 60 columns are enough."""
    return Table(title=title and Text(title), title_justify="left", title_style="", header_style="", box=SIMPLE_HEAD,
                 pad_edge=False, collapse_padding=True)  # fmt: skip


def _table(title: str, rows: Iterable[AttackResult]) -> Table:
    table = _narrow(printable(title))
    table.add_column("attack", min_width=11)
    for name in ("accuracy", "95 % interval", "correct / n", "seconds"):
        may_wrap = name == "correct / n"  # "3 of 10 classes"
        table.add_column(name, justify="right", no_wrap=not may_wrap, min_width=9 if may_wrap else None)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: AttackResult) -> tuple[RenderableType, ...]:
    interval = f"{percent(row.low)} – {percent(row.high)}"
    name = Text(printable(row.name))  # a Text, because brackets in a str would be markup
    return name, percent(row.accuracy), interval, f"{row.correct} / {row.n}", f"{row.seconds:.1f}"


def _tex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "–": "--", "−": "$-$", '"': r"\textquotedbl{}",
    }  # fmt: skip
    special |= {c: f"{{{c}}}" for c in "[]*"}  # LaTeX would read these as options of the line end before
    return "".join(special.get(c, c) for c in text)
