"""From a name to the thing: plugins (ours, installed ones, or in a file) and recipes (built in, or in a file)."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Any

from robustmail.catalog import KINDS, PLURALS, catalog_entries, recipe_files
from robustmail.config.modules import load_source
from robustmail.errors import PluginError, RecipeError, asked_to_stop, did_you_mean
from robustmail.fields import field_values
from robustmail.plugin_calls import call_plugin
from robustmail.recipe import Recipe

__all__ = ["find_plugin", "load_plugins", "load_recipe", "load_source", "recipe_path"]


def find_plugin(name: str, kind: str | None = None) -> Any:
    """The plugin called `name` (of one kind, or of any), or `file.py:name`.

    Raises PluginError: no such plugin, with the nearest; or one whose package fails to import, with its reason.
    """
    if ".py:" in name:
        path, _, attribute = name.rpartition(":")
        module = load_source(Path(path))
        if not hasattr(module, attribute):
            raise PluginError(path, f"has no {attribute!r}", did_you_mean(attribute, _public(module)))
        return getattr(module, attribute)
    kinds = [kind] if kind else [k for k in PLURALS if k != "models"]
    for entry in (found[name] for k in kinds if name in (found := catalog_entries(k))):
        if entry.point is None:
            return getattr(importlib.import_module(entry.module), name)
        try:
            return entry.point.load()
        except BaseException as error:  # somebody else's package: any failure is a broken plugin, not our crash
            if asked_to_stop(error):
                raise
            raise PluginError(
                f"plugin {name!r} ({entry.summary})", f"cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    known = [n for k in kinds for n in catalog_entries(k)]
    raise PluginError(repr(name), f"no such plugin{' among the ' + kind if kind else ''}", did_you_mean(name, known))


def recipe_path(name: str) -> tuple[Path, str]:
    """(file, variable) of `mail_trades`, `path/to/file.py` or either with `:variable`. Raises RecipeError."""
    file, _, variable = name.partition(":") if not re.match(r"^[A-Za-z]:[\\/]", name) else (name, "", "")
    built_in = recipe_files()
    path = built_in.get(file, Path(file))
    if not path.is_file():
        near = did_you_mean(path.stem, built_in)
        raise RecipeError(f"recipe {name!r}", "no such file, nor a built-in recipe", near)
    return path, variable or "recipe"


def load_recipe(name: str) -> Recipe:
    """The recipe that a file defines: `mail_trades` (built in), `my/recipe.py`, or `my/recipe.py:another`.

    Raises RecipeError: no such file, a file that fails (with the line), or one that defines no such recipe.
    """
    path, variable = recipe_path(name)
    module = load_source(path)
    found = getattr(module, variable, None)
    if isinstance(found, Recipe):
        return found
    others = [n for n, value in vars(module).items() if isinstance(value, Recipe)]
    wrong = f"defines no {variable!r}" if found is None else f"{variable!r} is no Recipe but {type(found).__name__}"
    todo = f"It has {', '.join(others)}: write {name.partition(':')[0]}:{others[0]}." if others else ""
    raise RecipeError(str(path), wrong, todo or f"Write {variable} = Recipe(...).")


def load_plugins(name: str) -> dict[str, Any]:
    """The plugins that a file itself defines, or the one of `file.py:name`: functions, and values of its classes.

    Nothing for a file that defines recipes; classes that need no knobs stand for their defaults.
    """
    path, variable = recipe_path(name)
    module = load_source(path)
    chosen = {variable: getattr(module, variable, None)} if ":" in name else vars(module)
    if any(isinstance(value, Recipe) for value in chosen.values()):
        return {}
    found = {n: v for n, v in chosen.items() if not n.startswith("_") and _home(v) == module.__name__ and callable(v)}
    made = {n: call_plugin("plugin", v) if isinstance(v, type) and _needs_nothing(v) else v for n, v in found.items()}
    return {n: v for n, v in made.items() if not isinstance(v, type)}


def _home(value: Any) -> str:
    return str(value.__module__ if hasattr(value, "__qualname__") else type(value).__module__)


def _needs_nothing(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except (TypeError, ValueError):
        return False
    return "__call__" in vars(cls)  # its values are callable


def _public(module: types.ModuleType) -> list[str]:
    return [n for n in vars(module) if not n.startswith("_")]


def field_kind(path: str) -> str | None:
    """The plugins that a recipe's field takes, by its name."""
    return KINDS[path].plural if path in KINDS and path not in ("model", "schedule") else None


def known_paths(recipe: Recipe) -> list[str]:
    """Every path that an override may name."""

    def walk(value: Any, prefix: str) -> list[str]:
        return [
            p
            for name, part in field_values(value).items()
            for p in (f"{prefix}{name}", *walk(part, f"{prefix}{name}."))
        ]

    return walk(recipe, "")
