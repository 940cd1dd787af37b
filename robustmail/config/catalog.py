"""Which plugins and recipes exist, read from source text and package metadata: nothing is imported."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

__all__ = ["KINDS", "Entry", "catalog_entries", "module_of_name", "recipe_files", "summary"]

HERE = Path(__file__).parents[1]

SENTENCE = re.compile(r"(?<!Eq|al|\.\.)\. (?=[A-Z])")

KINDS: dict[str, tuple[str, ...]] = {
    "attacks": ("attacks.torchattacks", "attacks.art", "attacks.pgd", "attacks.lm_pgd", "attacks.autoattack"),
    "margins": ("margins",),
    "weighters": ("weighters",),
    "objectives": ("objectives",),
    "perturbations": ("perturbations",),
    "data": ("data.sources",),
    "optimizers": ("optimizers",),
    "schedules": ("schedules",),
    "models": ("models.resnet", "models.wide_resnet", "models.small"),
}
"""Our modules, by kind; installed packages add to a kind through the entry point group `robustmail.<kind>`."""


@dataclass(frozen=True)
class Entry:
    """One thing that a recipe can name."""

    name: str
    summary: str
    module: str = ""
    point: EntryPoint | None = None


@functools.cache
def catalog_entries(kind: str) -> dict[str, Entry]:
    """Everything of a kind by name: ours, then what installed packages offer."""
    found: dict[str, Entry] = {}
    for module in KINDS[kind]:
        found |= {name: Entry(name, text, f"robustmail.{module}") for name, text in _public(module).items()}
    for point in entry_points(group=f"robustmail.{kind}"):
        package = point.dist.name if point.dist else point.value
        found.setdefault(point.name, Entry(point.name, f"from {package}", point=point))
    return found


def module_of_name() -> dict[str, str]:
    """{public name: module} of all our own plugins."""
    return {e.name: e.module for kind in KINDS if kind != "models" for e in catalog_entries(kind).values() if e.module}


def recipe_files() -> dict[str, Path]:
    """The built-in recipes by name: beside the package in a checkout, inside it in a wheel."""
    folder = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def summary(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").split("\n")[0]


def _public(module: str) -> dict[str, str]:
    tree = ast.parse((HERE / Path(*module.split("."))).with_suffix(".py").read_bytes())
    names: list[str] = next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and _target(n) == "__all__"), []
    )
    return {
        node.name: _first_sentence(ast.get_docstring(node) or "")
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names and not _protocol(node)
    }


def _first_sentence(text: str) -> str:
    return SENTENCE.split(" ".join(text.split("\n\n")[0].split()))[0].rstrip(".")


def _target(node: ast.Assign) -> str:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""


def _protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in node.bases)
