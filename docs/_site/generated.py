"""The parts of the reference that are written from the code, as MyST Markdown.

A page marks the place of a part by a comment, `<!-- built: verbs -->`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from docs._site.docstrings import inline, parse
from docs._site.names import GROUPS, Group, documented, full_names
from robustmail.cli.main import app
from robustmail.fields import describe
from robustmail.recipe import Recipe

__all__ = ["default_text", "expand", "navigation"]

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- built: (\w+) -->$", re.MULTILINE)
ENTRY = re.compile(r"^- \[([^\]]+)\]\(([^)]+)\)", re.MULTILINE)


def expand(text: str, folder: Path) -> str:
    """A page of the folder with its marks replaced. Raises KeyError for a mark of another name."""
    return MARK.sub(lambda mark: PARTS[mark[1]](folder), text)


def navigation(index: str) -> str:
    """The index with a hidden table of contents after each of its lists, whose caption is the heading above."""
    before, *sections = re.split(r"^## ", index, flags=re.MULTILINE)
    return before + "".join(f"## {section.rstrip()}\n\n{_toctree(section)}\n" for section in sections)


def _toctree(section: str) -> str:
    entries = [(title, _document(target)) for title, target in ENTRY.findall(section)]
    lines = [f"{title} </{document}>" for title, document in entries if document]
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {section.splitlines()[0]}", "", *lines, "```", ""])


def _document(target: str) -> str:
    """The name that Sphinx gives to the page of a link of docs/index.md; empty where it is none of our pages."""
    path = (ROOT / "docs" / target).resolve()
    path = path / "README.md" if path.is_dir() else path
    is_page = path.suffix in (".md", ".ipynb") and path.is_file()
    return path.relative_to(ROOT).with_suffix("").as_posix() if is_page else ""


def _pages_here(folder: Path) -> str:
    pages = sorted(path for path in folder.glob("*.md") if path.name != "README.md")
    return "\n".join(["```{toctree}", *(path.stem for path in pages), "```"])


# The command line


def _verbs(_: Path) -> str:
    """Every verb, under the headings of `--help` where it has some."""
    root = typer.main.get_command(app)
    panels: dict[str, list[Any]] = {}
    for verb in (verb for verb in root.commands.values() if not verb.hidden):
        panel = getattr(verb, "rich_help_panel", None)
        panels.setdefault(panel if isinstance(panel, str) else "", []).append(verb)
    parts = ["```{program} robustmail\n```\n", *_options(root)]
    for title, verbs in panels.items():
        parts += [f"## {title}\n"] if title else []
        parts += [_verb(verb, "###" if title else "##") for verb in verbs]
    return "\n".join(parts)


def _verb(verb: Any, heading: str) -> str:
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    words = [p.metavar or p.name.upper() for p in arguments]
    return "\n".join(
        [
            f"{heading} {verb.name}\n",
            _escaped(inspect.cleandoc(verb.help)),
            f"\n```text\n{' '.join(['robustmail', verb.name, *words, '[OPTIONS]'])}\n```\n",
            *(f"`{word}`\n: {_escaped(p.help)}\n" for word, p in zip(words, arguments, strict=True) if p.help),
            f"```{{program}} robustmail {verb.name}\n```\n",
            *_options(verb),
        ]
    )


def _options(verb: Any) -> Iterator[str]:
    options = [p for p in verb.params if p.param_type_name == "option"]
    for names, text in filter(None, (option.get_help_record(typer.Context(verb)) for option in options)):
        yield f"```{{option}} {names}\n{_escaped(' '.join(text.split()))}\n```\n"


def _escaped(text: str) -> str:
    """Plain text as Markdown; what stands between backticks stays code."""
    return re.sub(r"(`[^`]*`)|([*_<\[\]])", lambda found: found[1] or f"\\{found[2]}", text)


# Names of Python


def _recipe(_: Path) -> str:
    """The class with its methods, and each field as an attribute."""
    texts = parse(inspect.getdoc(Recipe) or "", Recipe.__dataclass_fields__).parameters
    fields = [_field(field, texts[field.name]) for field in dataclasses.fields(Recipe)]
    return _rst([".. autoclass:: robustmail.Recipe", "   :members:", "   :member-order: bysource", "", *fields])


def _field(field: dataclasses.Field[Any], text: str) -> str:
    lines = [f"   .. attribute:: {field.name}", f"      :type: {field.type}"]
    lines += [f"      :value: {default}"] if (default := default_text(field)) else []
    return "\n".join([*lines, "", f"      {inline(text, _link)}", ""])


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of a field as its source has it, `8/255`; "..." for one that is made anew, "" without one."""
    if field.default_factory is not dataclasses.MISSING:
        return "..."
    return "" if field.default is dataclasses.MISSING else describe(field.default)


def _link(text: str) -> str | None:
    return None if text in Recipe.__dataclass_fields__ else documented().get(text)


def _names(_: Path) -> str:
    return "\n".join(f"## {group.title}\n\n{_rst(list(_directives(group)))}" for group in GROUPS)


def _directives(group: Group) -> Iterator[str]:
    for full in full_names(group):
        module, _, name = full.rpartition(".")
        value = getattr(import_module(module), name)
        directive = "autofunction" if inspect.isfunction(value) else "autoclass"
        if value is Recipe:
            continue
        yield f".. {directive}:: {full}"
        if inspect.isclass(value) and not group.is_plugins:
            yield from ("   :members:", "   :member-order: bysource")
        yield ""


def _rst(lines: list[str]) -> str:
    return "\n".join(["````{eval-rst}", *lines, "````", ""])


PARTS: dict[str, Callable[[Path], str]] = {
    "verbs": _verbs,
    "recipe": _recipe,
    "names": _names,
    "pages": _pages_here,
}
