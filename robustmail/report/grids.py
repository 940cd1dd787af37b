"""A head, rows of texts and notes below them, for a terminal, Markdown or LaTeX."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustmail.report.lines import printable

__all__ = ["Grid", "as_latex", "as_markdown", "as_table"]

NUMBER = re.compile(r"[+−]?[\d,.]+( ±[\d.]+)?( [*=])?|\[[-\d., ]+\]|–|")


@dataclass(frozen=True)
class Grid:
    """Cells as texts; the first column names the rows. Control characters are taken out."""

    head: list[str]
    body: list[list[str]]
    notes: list[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", list(map(printable, self.head)))
        object.__setattr__(self, "body", [list(map(printable, row)) for row in self.body])
        object.__setattr__(self, "notes", list(map(printable, self.notes)))


def as_markdown(grid: Grid) -> str:
    """A table of GitHub's Markdown, and the notes as a list."""
    safe = [[re.sub(r"([\\`*_|<>\[\]~])", r"\\\1", cell) for cell in row] for row in (grid.head, *grid.body)]
    rule = [":--", *["--:"] * (len(grid.head) - 1)]
    lines = [f"| {' | '.join(row)} |" for row in (safe[0], rule, *safe[1:])]
    notes = [re.sub(r"([\\`*_<>\[\]~])", r"\\\1", note) for note in grid.notes]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def as_latex(grid: Grid) -> str:
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


def as_table(grid: Grid, width: int | None = None) -> str:
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
