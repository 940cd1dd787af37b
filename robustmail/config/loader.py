"""Load plugins by name (ours, those of installed packages, or from a file) and recipes (built in, or from a file)."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Any

from robustmail.catalog import KINDS, NOT_IN_RECIPES, PLURALS, catalog_entries, recipe_files
from robustmail.config.modules import load_source
from robustmail.errors import PluginError, RecipeError, asked_to_stop, did_you_mean
from robustmail.fields import field_values
from robustmail.plugin_calls import call_plugin
from robustmail.recipe import Recipe

__all__ = ["find_plugin", "load_plugins", "load_recipe", "load_source", "recipe_path", "recipe_source"]


def find_plugin(name: str, kind: str | None = None) -> Any:
    """Return the plugin called `name`, or the attribute that `file.py:name` names.

    kind: the plural of its kind, as in `catalog.PLURALS`; None for any that recipes write as Python.
    Raises PluginError: no such plugin, with the nearest name; or its package fails to import. Raises RecipeError for a
    file that cannot be run.
    """
    if ".py:" in name:
        path, _, attribute = name.rpartition(":")
        module = load_source(Path(path))
        if not hasattr(module, attribute):
            raise PluginError(path, f"has no {attribute!r}", did_you_mean(attribute, _public(module)))
        return getattr(module, attribute)
    plurals = [kind] if kind else [plural for plural in PLURALS if plural not in NOT_IN_RECIPES]
    for plural in plurals:
        if (entry := catalog_entries(plural).get(name)) is None:
            continue
        if entry.point is None:
            return getattr(importlib.import_module(entry.module), name)
        try:
            return entry.point.load()
        except BaseException as error:  # a package may fail in any way when it is imported
            if asked_to_stop(error):
                raise
            raise PluginError(
                f"plugin {name!r} ({entry.summary})", f"cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    known = [name for plural in plurals for name in catalog_entries(plural)]
    raise PluginError(repr(name), f"no such plugin{' among the ' + kind if kind else ''}", did_you_mean(name, known))


def recipe_path(name: str) -> tuple[Path, str]:
    """(file, variable) that `mail_trades`, `path/to/file.py`, or either with `:variable`, stands for.

    Raises RecipeError if there is no such file.
    """
    file, _, variable = name.partition(":") if not re.match(r"^[A-Za-z]:[\\/]", name) else (name, "", "")
    built_in = recipe_files()
    path = built_in.get(file, Path(file))
    if not path.is_file():
        near = did_you_mean(path.stem, built_in)
        if (path / "recipe.json").is_file():
            raise RecipeError(f"recipe {name!r}", "is a folder", f"Write {path / 'recipe.json'}.")
        raise RecipeError(f"recipe {name!r}", "no such file, nor a built-in recipe", near)
    return path, variable or "recipe"


def recipe_source(name: str) -> Path | None:
    """The Python file of a recipe; None where the recipe is read from a recipe.json. Raises as `recipe_path`."""
    return None if name.endswith(".json") else recipe_path(name)[0]


def load_recipe(name: str) -> Recipe:
    """Return the recipe called `mail_trades` (built in), `my/recipe.py`, or `my/recipe.py:variable`.

    Raises RecipeError: no such file; a file that fails, with the line; or no recipe of that name in it.
    """
    path, variable = recipe_path(name)
    module = load_source(path)
    value = getattr(module, variable, None)
    if isinstance(value, Recipe):
        return value
    recipes = [key for key, value in vars(module).items() if isinstance(value, Recipe)]
    wrong = f"defines no {variable!r}" if value is None else f"{variable!r} is no Recipe but {type(value).__name__}"
    todo = f"It has {', '.join(recipes)}: write {name.partition(':')[0]}:{recipes[0]}." if recipes else ""
    raise RecipeError(str(path), wrong, todo or f"Write {variable} = Recipe(...).")


def load_plugins(name: str) -> dict[str, Any]:
    """Return the plugins that a file defines itself, by name; or only the one that `file.py:name` names.

    They are functions, values of the file's classes, and, of each class without required parameters, a new instance.
    A file that defines a recipe has none. Raises RecipeError as `load_recipe`; PluginError for a class that fails.
    """
    path, variable = recipe_path(name)
    module = load_source(path)
    chosen = {variable: getattr(module, variable, None)} if ":" in name else vars(module)
    if any(isinstance(value, Recipe) for value in chosen.values()):
        return {}
    plugins = {}
    for key, value in chosen.items():
        if key.startswith("_") or _module_of(value) != module.__name__ or not callable(value):
            continue
        if isinstance(value, type) and _has_no_required_parameter(value):
            value = call_plugin("plugin", value)
        if not isinstance(value, type):
            plugins[key] = value
    return plugins


def _module_of(value: Any) -> str:
    return str(value.__module__ if hasattr(value, "__qualname__") else type(value).__module__)


def _has_no_required_parameter(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except (TypeError, ValueError):
        return False
    return "__call__" in vars(cls)  # only then are its instances plugins


def _public(module: types.ModuleType) -> list[str]:
    return [n for n in vars(module) if not n.startswith("_")]


def field_kind(path: str) -> str | None:
    """The plural of the kind of plugins that a recipe's field holds; None for a field that holds none."""
    kind = "augmentation" if path == "augment" else path
    no_field = ("augmentation", "model", "schedule", "tracker")
    return KINDS[kind].plural if kind in KINDS and path not in no_field else None


def known_paths(recipe: Recipe) -> list[str]:
    """Every path that an override may name, such as "attack.eps"."""

    def walk(value: Any, prefix: str) -> list[str]:
        paths = []
        for name, part in field_values(value).items():
            paths += [f"{prefix}{name}", *walk(part, f"{prefix}{name}.")]
        return paths

    return walk(recipe, "")
