"""What the shell offers after Tab: recipes, fields and their values, plugins, attacks, runs. Never imports torch.

bash gives a word such as margin=pm_adv in parts, broken at = and :, and takes only the end of it back; zsh and fish
give and take it whole. The functions here do for both; typer calls them with what it has read of the line.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from robustmail import catalog

__all__ = [
    "DEVICES", "complete_attacks", "complete_fields", "complete_overrides", "complete_plugins",
    "complete_recipe", "complete_runs", "complete_words",
]  # fmt: skip

Found = list[tuple[str, str]]
"""words with a text about each"""
BREAKS = ("=", ":")  # where bash breaks words
DEVICES = ("auto", "cpu", "cuda", "mps")
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors", ".tar")
DEEPEST, MOST = 4, 2000  # levels of folders, and folders, that are searched for runs: Tab must be quick


def complete_recipe(ctx: Any, incomplete: str) -> Found:
    """Built-in recipes; where none begins so, the shell's own names of files."""
    return [(n, catalog.summary(p)) for n, p in catalog.recipe_files().items() if n.startswith(incomplete)]


def complete_runs(ctx: Any, incomplete: str) -> Found:
    """Folders of runs and evaluations below here, and files of weights in the folder that is being typed."""
    found: Found = [(f"{path}", "") for path in _run_folders(Path(), incomplete)]
    folder, name = os.path.split(incomplete)
    with_weights = Path(folder) if folder else Path()
    if with_weights.is_dir():
        files = sorted(path for path in with_weights.iterdir() if path.suffix in WEIGHTS)
        found += [(os.path.join(folder, path.name), "") for path in files if path.name.startswith(name)]
    return found


def complete_overrides(ctx: Any, incomplete: str) -> Found:
    """Fields of the recipe, `weighter.slope=`; after the equals sign the values that fit.

    For a verb that takes several recipes, recipes too.
    """
    words = list(ctx.params.get("overrides") or ctx.params.get("words") or [])
    several = "words" in ctx.params
    recipe = next((word for word in words if "=" not in word), "") if several else ctx.params.get("recipe") or ""
    if words[-1:] == ["="] and ctx.params.get("over"):  # bash: --over margin = pm_
        words.insert(-1, ctx.params["over"][-1])
    paths = _paths(recipe)
    before, word = _joined(words, incomplete)
    if "=" not in word and before and before[-1] in paths:  # `margin=` of bash, `--margin` of any shell
        return _values(before[-1], incomplete, paths)
    path, equals, value = word.partition("=")
    if equals:
        cut = len(word) - len(incomplete)
        return [(f"{path}={text}"[cut:], about) for text, about in _values(path, value, paths)]
    fields = [(f"{name}=", about) for name, about in _field_names(paths, word)]
    if len(fields) == 1 and (now := _values(fields[0][0][:-1], "", paths)):
        fields += [(fields[0][0] + text, about) for text, about in now]  # so that the shell adds no space
    return [*(complete_recipe(ctx, incomplete) if several else []), *fields]


def complete_fields(ctx: Any, incomplete: str) -> Found:
    """Fields as options, `--weighter.slope`."""
    recipe = ctx.params.get("recipe") or next(iter(ctx.params.get("words") or []), "")
    return [(f"--{name}", about) for name, about in _field_names(_paths(recipe), incomplete.lstrip("-"))]


def complete_attacks(ctx: Any, incomplete: str) -> Found:
    """Names of attacks, in a list with commas."""
    return _in_list(catalog.ATTACK_NAMES, incomplete)


def complete_plugins(plural: str, *more: str) -> Callable[[Any, str], Found]:
    """Names of plugins of a kind and further words, in a list with commas."""

    def complete(ctx: Any, incomplete: str) -> Found:
        return _in_list([*more, *catalog.catalog_entries(plural)], incomplete)

    return complete


def complete_words(*words: str) -> Callable[[Any, str], Found]:
    """These words."""

    def complete(ctx: Any, incomplete: str) -> Found:
        return [(word, "") for word in words if word.startswith(incomplete)]

    return complete


def _in_list(names: Iterable[str], incomplete: str) -> Found:
    """The names that may follow in a list with commas; those that are in it already are left out."""
    done, comma, last = incomplete.rpartition(",")
    given = done.split(",")
    return [(f"{done}{comma}{name}", "") for name in names if name.startswith(last) and name not in given]


def _joined(words: list[str], incomplete: str) -> tuple[list[str], str]:
    """(words before, word under way), with what bash has broken joined again."""
    before, word = list(words), incomplete
    while before and (before[-1] in BREAKS or word in BREAKS):
        word = before.pop() + word
        if before and word[:1] in BREAKS:
            word = before.pop() + word
    return before, word


def _field_names(paths: dict[str, str], incomplete: str) -> Found:
    """The fields that begin so: those inside a field only once it is being typed."""
    about = catalog.recipe_fields()
    names = [n for n in paths if n.startswith(incomplete) and n.count(".") <= incomplete.count(".")]
    if len(names) == 1 and names[0] in paths:  # nothing else begins so: also what is inside
        names += [name for name in paths if name.startswith(f"{names[0]}.")]
    return [(name, about[name].summary if name in about else f"now {paths[name]}") for name in names]


def _values(path: str, incomplete: str, paths: dict[str, str]) -> Found:
    """Values for a field that begin so: plugins of its kind, its words, or the recipe's own value."""
    field = catalog.recipe_fields().get(path)
    plural = next((kind.plural for name, kind in catalog.KINDS.items() if path in (name, kind.plural)), "")
    if path in ("validate", "evaluate"):
        return complete_attacks(None, incomplete)
    if path == "augment":
        plural = "augmentations"
    file, colon, _ = incomplete.rpartition(":")
    if colon and file.endswith(".py"):
        return [
            (t, "") for t in (f"{file}:{n}" for n in catalog.plugins_in_file(Path(file))) if t.startswith(incomplete)
        ]
    found = [(e.name, e.summary) for e in catalog.catalog_entries(plural).values()] if plural else []
    words = DEVICES if path == "device" else field.words if field else ()
    found += [(word, "") for word in words]
    if not found and paths.get(path):
        found = [(paths[path], "as it is")]
    return [(text, about) for text, about in found if text.startswith(incomplete)]


def _paths(recipe: str) -> dict[str, str]:
    """What overrides of a recipe may name, with the value that its file gives it, if it is plain: {"epochs": "100"}.

    The file is read, not run: pressing Tab runs nobody's code.
    """
    paths = dict.fromkeys(catalog.recipe_fields(), "")
    file = catalog.recipe_files().get(recipe.partition(":")[0], Path(recipe.partition(":")[0]))
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return paths
    for word in (node for node in ast.walk(tree) if isinstance(node, ast.keyword)):
        if word.arg not in catalog.recipe_fields():
            continue
        value = word.value
        if isinstance(value, ast.Constant):
            paths[word.arg] = paths[word.arg] or str(value.value)
        name = value.func if isinstance(value, ast.Call) else value
        fields = catalog.plugin_fields(name.id) if isinstance(name, ast.Name) else []
        given = {str(k.arg): ast.unparse(k.value) for k in value.keywords} if isinstance(value, ast.Call) else {}
        paths |= {f"{word.arg}.{key}": given.get(key, "").replace(" ", "") for key in [*given, *fields] if key}
    return paths


def _run_folders(root: Path, incomplete: str) -> list[Path]:
    """Folders of runs and evaluations at most DEEPEST levels below a folder."""
    found = []
    for looked, (folder, names, files) in enumerate(os.walk(root)):
        path = Path(folder)
        depth = len(path.parts)
        names[:] = sorted(name for name in names if _leads_to(os.path.join(path, name), incomplete))
        if {"results.json", "state.pt", "recipe.json"} & {*files} and depth:
            found.append(path)
        if depth >= DEEPEST or looked >= MOST:
            names.clear()
    return [path for path in found if str(path).startswith(incomplete)]


def _leads_to(path: str, incomplete: str) -> bool:
    """Whether a folder, or one in it, may be what is being typed."""
    path = os.path.normpath(path)
    return not os.path.basename(path).startswith(".") and (path.startswith(incomplete) or incomplete.startswith(path))
