"""The plugins and recipes that exist, read from source text and package metadata without an import."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "ATTACK_NAMES",
    "KINDS",
    "NOT_IN_RECIPES",
    "PLURALS",
    "Entry",
    "Kind",
    "Field",
    "catalog_entries",
    "installed_plugins",
    "module_of_name",
    "plugin_fields",
    "plugins_in_file",
    "recipe_fields",
    "recipe_files",
    "summary",
]

HERE = Path(__file__).parent

SENTENCE = re.compile(r"(?<!Eq|al|\.g|\.\.)\. (?=[A-Z])")


@dataclass(frozen=True)
class Kind:
    """A kind of plugin. Its singular is the key in KINDS, the name of its set of laws, and of the recipe's field, which
    is `augment` for augmentations."""

    plural: str
    """the name in `robustmail list` and in the entry point group `robustmail.<plural>`"""
    modules: tuple[str, ...]
    """modules of robustmail that define plugins of this kind"""
    is_method: bool = False
    """whether it is part of the method: then it has laws, and its field may hold a schedule"""
    patterns: Mapping[str, str] = field(default_factory=dict)
    """names that stand for many plugins, as people write them, with a summary each"""


KINDS: dict[str, Kind] = {
    "attack": Kind(
        "attacks",
        (
            "attacks.torchattacks",
            "attacks.art",
            "attacks.pgd",
            "attacks.lm_pgd",
            "attacks.margin_decomposition",
            "attacks.constraint_relaxation",
            "attacks.autoattack",
        ),
        True,
    ),
    "margin": Kind("margins", ("margins",), True),
    "weighter": Kind("weighters", ("weighters",), True),
    "objective": Kind("objectives", ("objectives",), True),
    "perturbation": Kind("perturbations", ("perturbations",), True),
    "data": Kind("data", ("data.sources", "data.file_sources", "data.mixed")),
    "augmentation": Kind("augmentations", ("augmentations.geometry", "augmentations.mixing", "augmentations.policies")),
    "optimizer": Kind("optimizers", ("optimizers",)),
    "schedule": Kind("schedules", ("schedules",)),
    "model": Kind(
        "models",
        ("models.resnet", "models.wide_resnet", "models.small"),
        patterns={
            "cifar_wrnD_W": "WRN-D-W, a Wide ResNet of any depth D = 6n + 4 and any width W: cifar_wrn70_16",
            "cifar_wrnD_W_silu": "The same with SiLU in place of ReLU",
        },
    ),
    "factory": Kind("factories", ("models.timm_model",)),
    "tracker": Kind("trackers", ("trackers.tensorboard", "trackers.wandb", "trackers.mlflow", "trackers.trackio")),
}
"""The kinds of plugins by their singular: the one table of them."""

PLURALS = {kind.plural: kind for kind in KINDS.values()}
"""The same kinds by their plural."""

NOT_IN_RECIPES = ("models", "trackers")
"""Kinds whose names are not written as Python in a recipe: a model is named by a text, a tracker is no part of it."""

ATTACK_NAMES = (
    "nat", "pgd10", "pgd20", "pgd100", "cw", "pma", "md", "cr", "cw-art", "apgd", "apgd-t", "fab-t", "square", "aa",
)  # fmt: skip
"""Names of attacks in validation and evaluation; pgdN stands for any number of steps"""


@dataclass(frozen=True)
class Field:
    """A field of a recipe: its name, the first sentence about it, and the words that it takes, if they are few."""

    name: str
    summary: str
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A plugin: its name, the first sentence of its docstring, and its module or its entry point."""

    name: str
    summary: str
    module: str = ""
    point: EntryPoint | None = None


@functools.cache
def catalog_entries(plural: str) -> dict[str, Entry]:
    """The plugins of a kind by name: ours first, then those of installed packages.

    plural: a key of PLURALS, such as "margins".
    """
    entries: dict[str, Entry] = {}
    for module in PLURALS[plural].modules:
        entries |= {name: Entry(name, text, f"robustmail.{module}") for name, text in _public(module).items()}
    for point in installed_plugins().select(group=f"robustmail.{plural}"):
        package = point.dist.name if point.dist else point.value
        entries.setdefault(point.name, Entry(point.name, f"from {package}", point=point))
    return entries


@functools.cache
def installed_plugins() -> Any:  # EntryPoints; in Python 3.11 another type with the same `select`
    """Those of all installed packages, whose metadata are read once; imported here, as `--help` needs none of them."""
    from importlib.metadata import entry_points

    return entry_points()


def module_of_name() -> dict[str, str]:
    """The module of each of robustmail's own plugins that recipes write as Python, by the plugin's name."""
    entries = [e for plural in PLURALS if plural not in NOT_IN_RECIPES for e in catalog_entries(plural).values()]
    return {e.name: e.module for e in entries if e.module}


def recipe_files() -> dict[str, Path]:
    """Paths of the built-in recipes by name; they lie beside the package in a checkout, inside it in a wheel."""
    folder = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def summary(path: Path) -> str:
    """The first line of a Python file's docstring, or ""."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").split("\n")[0]


@functools.cache
def recipe_fields() -> dict[str, Field]:
    """The fields of a recipe by name."""
    tree = _tree("recipe")
    literals = _literals(tree) | _literals(_tree("models.precision"))
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Recipe")
    about = dict(re.findall(r"^(\w+): (.*(?:\n    .*)*)", ast.get_docstring(body) or "", re.MULTILINE))
    hints = {
        n.target.id: n.annotation for n in body.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    return {
        name: Field(name, _first_sentence(about.get(name, "")), _words(hint) or literals.get(ast.unparse(hint), ()))
        for name, hint in hints.items()
    }


def plugin_fields(name: str) -> list[str]:
    """The fields of one of robustmail's own plugins that is a dataclass; [] of anything else."""
    module = module_of_name().get(name)
    body = _tree(module.removeprefix("robustmail.")).body if module else []
    fields = [n for node in body if isinstance(node, ast.ClassDef) and node.name == name for n in node.body]
    return [n.target.id for n in fields if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def plugins_in_file(path: Path) -> list[str]:
    """The public functions and classes that a Python file defines, and its recipes; the file is not run."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return []
    names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names += [_target(n) for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
    return [name for name in names if name and not name.startswith("_")]


def _literals(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    return {_target(node): _words(node.value) for node in tree.body if isinstance(node, ast.Assign)}


def _words(hint: ast.expr) -> tuple[str, ...]:
    """The words of a Literal["eval", "train"]; () of anything else."""
    if not (isinstance(hint, ast.Subscript) and isinstance(hint.value, ast.Name) and hint.value.id == "Literal"):
        return ()
    return tuple(ast.literal_eval(part) for part in getattr(hint.slice, "elts", [hint.slice]))


def _tree(module: str) -> ast.Module:
    return ast.parse((HERE / Path(*module.split("."))).with_suffix(".py").read_bytes())


def _public(module: str) -> dict[str, str]:
    tree = _tree(module)
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
