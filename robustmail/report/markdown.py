"""Texts of others in Markdown: nothing that a file says becomes markup, a link, a mention or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from robustmail.runtime.untrusted import printable

__all__ = ["block", "code", "escaped", "table"]


def escaped(text: str) -> str:
    """A line of prose: every character that Markdown or HTML reads is taken literally."""
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", printable(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"@(?=\w)", "@<!-- -->", text).replace("://", ":<!-- -->//")


def code(text: str) -> str:
    """A span of code on one line, also in a cell of a table."""
    text = printable(text).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text or not text.strip() else f"{ticks}{text}{ticks}"


def block(text: str, language: str = "") -> str:
    """A block of code of several lines; its fence is longer than any in the text."""
    lines = [printable(line) for line in text.splitlines()]
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of GitHub's Markdown; cells are Markdown already."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
