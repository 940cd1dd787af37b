"""The verb that writes a beginning: a plugin, a recipe or a package, with comments and a test."""

from __future__ import annotations

import keyword
import re
import shutil
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from robustmail.catalog import KINDS, catalog_entries
from robustmail.cli.completion import complete_words
from robustmail.cli.options import OWN
from robustmail.cli.recipe_verbs import Verb
from robustmail.errors import RecipeError, RunError, did_you_mean

__all__ = ["add_to"]

TEMPLATES = Path(__file__).parent / "templates"
FUNCTIONS, CLASSES = ("margin",), ("weighter", "objective", "attack")
BEGINNINGS = (*FUNCTIONS, *CLASSES, "recipe", "package")


def add_to(app: typer.Typer) -> None:
    """Add this verb to the command line."""
    app.command(cls=Verb, rich_help_panel=OWN)(new)


def new(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help=f"One of {', '.join(BEGINNINGS)}.", autocompletion=complete_words(*BEGINNINGS)
        ),
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the file and of what is in it: my_margin.")],
) -> None:
    """Write a plugin, a recipe or a package to begin with.

    NAME.py works as it is, and says in comments what may be changed; test_NAME.py holds it to the laws of its kind, as
    robustmail check NAME.py does. A package is a folder that pip installs; its plugins are then found by name.
    """
    if kind not in BEGINNINGS:
        raise RecipeError(f"new {kind}", "no such beginning", did_you_mean(kind, BEGINNINGS))
    name = name.removesuffix(".py")
    _check_name(kind, name)
    files = _package(name) if kind == "package" else _files(kind, name)
    _write(files, Path(name) if kind == "package" else None)
    if kind == "package":
        print(f"{name}/: then pip install -e {name}, and robustmail list margins has {name}_margin")
    else:
        print(f"{name}.py, test_{name}.py: edit, then robustmail check {name}.py")


def _files(kind: str, name: str) -> dict[Path, str]:
    """The two files of a plugin or of a recipe."""
    plugin = _camel(name) if kind in CLASSES else name
    words = {"name": name, "Name": plugin, "plugin": plugin, "kind": kind}
    words["value"] = f"{plugin}()" if kind in CLASSES else plugin
    test = "test_recipe" if kind == "recipe" else "test_plugin"
    return {Path(f"{name}.py"): _filled(f"{kind}.py", words), Path(f"test_{name}.py"): _filled(f"{test}.py", words)}


def _package(name: str) -> dict[Path, str]:
    """The files of a package."""
    margin = f"{name}_margin"
    words = {"name": name, "distribution": name.replace("_", "-"), "plugin": margin, "value": margin, "kind": "margin"}
    root = Path(name)
    return {
        root / "pyproject.toml": _filled("package_pyproject.toml", words),
        root / "README.md": _filled("package_readme.md", words),
        root / "src" / name / "__init__.py": _filled("package_init.py", words),
        root / "tests" / f"test_{name}.py": _filled("test_plugin.py", words),
    }


def _filled(template: str, words: dict[str, str]) -> str:
    text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(words)


def _write(files: dict[Path, str], root: Path | None) -> None:
    """Write all files, or none where one of them, or the folder of a package, is there or cannot be written.

    Raises RunError.
    """
    from robustmail.runtime.files import atomic_write_text, make_folder

    taken = [path for path in ([root] if root else files) if path.exists() or path.is_symlink()]
    if taken:
        raise RunError(str(taken[0]), "exists already", "Choose another name.")
    try:
        for path, text in files.items():
            make_folder(path.parent)
            atomic_write_text(path, text)
    except BaseException:
        if root:
            shutil.rmtree(root, ignore_errors=True)
        for path in files:
            path.unlink(missing_ok=True)
        raise


def _check_name(kind: str, name: str) -> None:
    """Raise RecipeError for what cannot be the name of a module, or is that of a built-in plugin."""
    who = f"new {kind} {name}"
    if not name.isidentifier() or keyword.iskeyword(name) or not name.isascii() or name.startswith("_"):
        todo = re.sub(r"\W+", "_", name).strip("_").lower()
        is_usable = todo.isidentifier() and not keyword.iskeyword(todo) and todo.isascii()
        raise RecipeError(who, "cannot be the name of a Python module", f"Write {todo}." if is_usable else "")
    own = [known for plural in (k.plural for k in KINDS.values()) for known in catalog_entries(plural)]
    if name in own or _camel(name) in own or name in ("robustmail", "torch"):
        raise RecipeError(who, "that name is taken by robustmail", "Choose another one.")


def _camel(name: str) -> str:
    """power_law -> PowerLaw; Power stays."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
