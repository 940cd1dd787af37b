"""The pages of the documentation: their blocks of code, the commands in them, their links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SHELL = ("sh", "bash", "console", "shell")
SEPARATORS = ("&&", "||", ";", "|")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    page: Path
    line: int
    words: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line} {shlex.join(self.words)}"


def blocks(language: str | None = None) -> list[Block]:
    """All fenced blocks of code, or those of one language."""
    return [
        Block(page, line_of(text, found.start(3)), found[2], found[3])
        for page in PAGES
        for text in [page.read_text(encoding="utf-8")]
        for found in FENCE.finditer(text)
        if language in (None, found[2])
    ]


def commands() -> list[Command]:
    """Every command in a block of shell, one for each part of `a && b`, without comments; and of recipes."""
    return _of_recipes() + [
        Command(block.page, block.line + number, words)
        for block in blocks()
        if block.language in SHELL
        for number, line in _lines(block.text)
        for words in _split(line)
    ]


def _of_recipes() -> list[Command]:
    """The commands in the docstrings of recipes, in which two spaces begin the comment."""
    return [
        Command(path, number, tuple(shlex.split(re.split(r"  +", line.strip())[0])))
        for path in sorted((ROOT / "recipes").glob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.match(r" *robustmail [a-z]+ ", line)
    ]


def inline() -> list[Command]:
    """Every `robustmail VERB ...` in a sentence: placeholders in capitals are allowed in it."""
    return [
        Command(page, line_of(text, found.start()), tuple(shlex.split(found[1].replace("\n", " "))))
        for page in PAGES
        for text in [prose(page)]
        for found in INLINE.finditer(text)
        if re.match(r"robustmail [a-z]+\b", found[1])
    ]


def prose(page: Path) -> str:
    """A page without its blocks of code, of as many lines."""
    return FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _lines(text: str) -> list[tuple[int, str]]:
    """(line number, command), continued lines joined."""
    lines: list[tuple[int, str]] = []
    number = 0
    for line in re.split(r"(?<!\\)\n", text):
        lines.append((number, line.replace("\\\n", " ")))
        number += line.count("\n") + 1
    return lines


def _split(line: str) -> list[tuple[str, ...]]:
    parts: list[list[str]] = [[]]
    for word in shlex.split(line.removeprefix("$ "), comments=True):
        if word in SEPARATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]
