"""From a name to the thing: plugins (ours, installed ones, or in a file) and recipes (built in, or in a file)."""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
import sys
import types
from pathlib import Path
from typing import Any

from robustmail.config.catalog import KINDS, catalog_entries, module_of_name, recipe_files
from robustmail.errors import PluginError, RecipeError, RobustmailError, did_you_mean
from robustmail.fields import field_values
from robustmail.recipe import Recipe

__all__ = ["find_plugin", "load_plugins", "load_recipe", "load_module", "recipe_path"]


def find_plugin(name: str, kind: str | None = None) -> Any:
    """The plugin called `name` (of one kind, or of any), or `file.py:name`.

    Raises PluginError: no such plugin, with the nearest; or one whose package fails to import, with its reason.
    """
    if ".py:" in name:
        path, _, attribute = name.rpartition(":")
        module = load_module(Path(path))
        if not hasattr(module, attribute):
            raise PluginError(path, f"has no {attribute!r}", did_you_mean(attribute, _public(module)))
        return getattr(module, attribute)
    kinds = [kind] if kind else [k for k in KINDS if k != "models"]
    for entry in (found[name] for k in kinds if name in (found := catalog_entries(k))):
        if entry.point is None:
            return getattr(importlib.import_module(entry.module), name)
        try:
            return entry.point.load()
        except Exception as error:  # somebody else's package: any failure is a broken plugin, not our crash
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
    module = load_module(path)
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
    module = load_module(path)
    chosen = {variable: getattr(module, variable, None)} if ":" in name else vars(module)
    if any(isinstance(value, Recipe) for value in chosen.values()):
        return {}
    found = {n: v for n, v in chosen.items() if not n.startswith("_") and _home(v) == module.__name__ and callable(v)}
    made = {n: v() if isinstance(v, type) and _needs_nothing(v) else v for n, v in found.items()}
    return {n: v for n, v in made.items() if not isinstance(v, type)}


def _home(value: Any) -> str:
    return str(value.__module__ if hasattr(value, "__qualname__") else type(value).__module__)


def _needs_nothing(cls: type) -> bool:
    try:
        inspect.signature(cls).bind()
    except (TypeError, ValueError):
        return False
    return "__call__" in vars(cls)  # its values are callable


def load_module(path: Path) -> types.ModuleType:
    """Run a Python file as a module of its own (nothing is cached on disk); its folder is importable from it."""
    try:
        source = path.read_text()
        code = compile(source, str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise RecipeError(str(path), f"cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:  # ValueError: bytes that are no text
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        message = error.msg if isinstance(error, SyntaxError) else "it is not text"
        raise RecipeError(f"{path}{line}", f"not valid Python: {message}") from error
    module = types.ModuleType(f"robustmail_file_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    linecache.checkcache(str(path))
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        exec(code, module.__dict__)
    except RobustmailError as error:
        at = _line_in(path, error)
        raise type(error)(f"{path}{at}: {error.who}", error.wrong, error.todo) from error
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{path}{_line_in(path, error)}", f"{type(error).__name__}: {error}", _hint(error)) from error
    finally:
        sys.path.remove(folder)
    return module


def _hint(error: BaseException) -> str:
    """What a misspelt keyword, name or import was meant to be."""
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
        owner = Recipe if found[1] == "Recipe" else _class(found[1])
        return did_you_mean(found[2], getattr(owner, "__dataclass_fields__", {}))
    found = re.search(r"cannot import name '(\w+)' from 'robustmail'", str(error))
    name = found[1] if found else error.name if isinstance(error, NameError) else None
    return did_you_mean(name, importlib.import_module("robustmail").__all__) if name else ""


def _class(name: str) -> Any:
    return getattr(importlib.import_module(module_of_name()[name]), name) if name in module_of_name() else None


def _line_in(path: Path, error: BaseException) -> str:
    trace, found = error.__traceback__, ""
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _public(module: types.ModuleType) -> list[str]:
    return [n for n in vars(module) if not n.startswith("_")]


def field_kind(path: str) -> str | None:
    """The plugins that a recipe's field takes, by its name."""
    kinds = {"attack": "attacks", "margin": "margins", "weight": "weighters", "objective": "objectives",
             "perturb": "perturbations", "data": "data", "optimizer": "optimizers"}  # fmt: skip
    return kinds.get(path)


def known_paths(recipe: Recipe) -> list[str]:
    """Every path that an override may name."""

    def walk(value: Any, prefix: str) -> list[str]:
        return [
            p
            for name, part in field_values(value).items()
            for p in (f"{prefix}{name}", *walk(part, f"{prefix}{name}."))
        ]

    return walk(recipe, "")
