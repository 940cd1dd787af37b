"""From a docstring in the style of this package to reStructuredText, which is what Sphinx reads.

The style: one sentence; prose, in which formulas and ranges stand as they are; `name: text` for each parameter, at the
start of a line or of a sentence, further lines indented or not; `Raises ...`; indented blocks for code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

__all__ = ["Docstring", "inline", "parse", "to_rst"]

Link = Callable[[str], str | None]
"""From the text between backticks, or the name of an error, to the target that it links to; None for none."""

RAISES = re.compile(r"(?:(?<=^)|(?<=\. )|(?<=\.\n))Raises (?=\w*Error|as )")
ERROR = re.compile(r"\b[A-Z]\w+Error\b")
URL = re.compile(r"https?://[^\s,;)]*[^\s,;).]")


class Docstring(NamedTuple):
    """The parts of a docstring, as text without markup."""

    prose: list[str]
    """paragraphs; a block of code begins with a space"""
    parameters: dict[str, str]
    """what `name: text` lines say; several names may share a text: "low, high" """
    raises: list[str]
    """what follows "Raises", one text for each"""


def parse(text: str, names: Iterable[str] = ()) -> Docstring:
    """The parts of a docstring; names: of the parameters."""
    found = Docstring([], {}, [])
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith(" "):
            found.prose.append(block)
            continue
        rest, *errors = RAISES.split(block)
        found.raises.extend(" ".join(error.split()) for error in errors)
        for name, part in _entries(rest, set(names)):
            if name:
                found.parameters[name] = part
            elif part:
                found.prose.append(part)
    return found


def _entries(block: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """("", prose) and (name, its text) in turn. A "Returns" at the start of a line ends the text of a parameter."""
    if not names:
        yield "", block.strip()
        return
    known = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    start = re.compile(rf"(?:^|(?<=\. ))((?:{known})(?:, (?:{known}))*): |^(?=Returns )", re.MULTILINE)
    position, name = 0, ""
    for match in start.finditer(block):
        yield name, _joined(block[position : match.start()], bool(name))
        position, name = match.end(), match[1] or ""
    yield name, _joined(block[position:], bool(name))


def _joined(text: str, is_parameter: bool) -> str:
    return " ".join(text.split()) if is_parameter else text.strip()


def to_rst(docstring: Docstring, link: Link) -> list[str]:
    """Lines of reStructuredText: prose, then a field for each parameter, then what is raised."""
    lines: list[str] = []
    for part in docstring.prose:
        lines += _paragraph(part, link)
    entries = [f"**{name}**: {inline(text, link)}" for name, text in docstring.parameters.items()]
    raises = [inline(text, link) for text in docstring.raises]
    return [*lines, *_field("Parameters", entries), *_field("Raises", raises), ""]


def _field(name: str, entries: list[str]) -> list[str]:
    """A field of reStructuredText with a list in it. Not `:param x:`, which takes "low, high" for a type and a name."""
    return [f":{name}:", *(f"    - {entry}" for entry in entries)] if entries else []


def _paragraph(text: str, link: Link) -> list[str]:
    if text.startswith(" "):
        return ["::", "", *text.splitlines(), ""]
    lines: list[str] = []
    for line in text.splitlines():
        is_item = line.startswith("- ")
        if is_item and lines and not lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(f"- {inline(line[2:], link)}" if is_item else _indent(line) + inline(line.strip(), link))
    return [*lines, ""]


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def inline(text: str, link: Link) -> str:
    """One line: code between backticks as a link or a literal; all else as it is, with what means markup escaped."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(_code(part, link) if i % 2 else _prose(part, link) for i, part in enumerate(parts))


def _code(text: str, link: Link) -> str:
    target = link(text)
    return f":py:obj:`{text} <{target}>`" if target else f"``{text}``"


def _prose(text: str, link: Link) -> str:
    def shown(word: str) -> str:
        if URL.fullmatch(word):
            return word
        target = link(word) if ERROR.fullmatch(word) else None
        return f":py:exc:`{word} <{target}>`" if target else re.sub(r"([\\*|_`])", r"\\\1", word)

    return "".join(shown(word) for word in re.split(rf"({URL.pattern}|{ERROR.pattern})", text))
