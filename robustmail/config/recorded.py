"""A recipe from the recipe.json of a run, which may be a stranger's: read as data, never run.

Only robustmail's own plugins are made, from literals. What the file cannot say, because it would name code or a file to
open, the user says as an override: `robustmail run recipe.json 'data=npz("mine.npz")'`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from robustmail.catalog import module_of_name, recipe_fields
from robustmail.config.loader import load_recipe
from robustmail.config.overrides import apply_overrides, parse_field, parse_value
from robustmail.errors import RecipeError, RobustmailError, did_you_mean
from robustmail.fields import flatten
from robustmail.models.timm_model import read_timm_model
from robustmail.recipe import Recipe
from robustmail.runtime.untrusted import check_shape, data_source, quoted, read_json

__all__ = ["recorded_recipe", "resolve_recipe"]

WORD = re.compile(r"[\w.*?+@-]*")  # a text inside a recorded plugin: a name or a word, no path
ATTACKS = ("validate", "evaluate")
FILES = ("init", "teacher")
LONGEST = 2000  # letters of a field


def resolve_recipe(name: str, overrides: Iterable[str] | None = None) -> Recipe:
    """A recipe by name, file, FILE:VARIABLE or recipe.json, with overrides applied. Raises RecipeError, PluginError."""
    texts = list(overrides or [])
    if name.endswith(".json"):
        return recorded_recipe(Path(name), texts)
    return apply_overrides(load_recipe(name), texts)


def recorded_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a run's recipe.json records, with overrides applied.

    A field that an override replaces as a whole is not read from the file.
    Raises RecipeError: no such file, or it is damaged; a field that needs code, or a file to open, with what to do; a
    field that this version reads in another way.
    """
    texts = list(overrides)
    recorded = _read(path)
    replaced = [text.partition("=")[0].strip() for text in texts]
    fields: dict[str, Any] = {}
    for name in recipe_fields():
        own = {key: value for key, value in recorded.items() if key == name or key.startswith(f"{name}.")}
        if name not in replaced and own:
            fields[name] = _field(path, name, _text(own, name))
    fields |= {name: parse_field(text) for name, text in zip(replaced, texts, strict=True) if name in recipe_fields()}
    try:
        recipe = Recipe(**fields)
    except TypeError as error:
        raise RecipeError(str(path), f"is not a whole recipe ({error})") from error
    now = flatten(recipe)
    differ = [k for k in recorded if k.partition(".")[0] not in replaced and now.get(k, recorded[k]) != recorded[k]]
    if differ:
        wrong = f"{differ[0]}: {recorded[differ[0]]} there, read as {now[differ[0]]}: another version wrote it"
        raise RecipeError(str(path), wrong, _todo(path, differ[0].partition(".")[0]))
    return apply_overrides(recipe, [text for text in texts if text.partition("=")[0].strip() not in recipe_fields()])


def _read(path: Path) -> dict[str, str]:
    """The fields of the file, without the hashes of files beside them."""
    try:
        fields: dict[str, str] = read_json(path)
        check_shape(fields, {"*": str})
    except FileNotFoundError as error:
        raise RecipeError(str(path), "no such file") from error
    except (OSError, ValueError) as error:
        raise RecipeError(str(path), f"is no recipe.json of a run ({error})") from error
    fields = {key: value for key, value in fields.items() if not key.endswith(".sha256")}
    if unknown := [key for key in fields if key.partition(".")[0] not in recipe_fields()]:
        raise RecipeError(str(path), f"a recipe has no {unknown[0]!r}", did_you_mean(unknown[0], recipe_fields()))
    return fields


def _text(flat: Mapping[str, str], path: str) -> str:
    """The value at a path as one text: {"w": "Sigmoid", "w.slope": "2.0"} -> Sigmoid(slope=2.0)."""
    start = len(path) + 1
    names = list(dict.fromkeys(key[start:].partition(".")[0] for key in flat if key.startswith(f"{path}.")))
    parts = {name: _text(flat, f"{path}.{name}") for name in names}
    head = flat.get(path, "")
    if not head:
        return f"({', '.join(parts.values())}{',' * (len(parts) == 1)})"
    if not parts:
        return head
    given = f"{head[:-1]}, " if head.endswith(")") else f"{head}("
    return given + ", ".join(f"{name}={text}" for name, text in parts.items()) + ")"


def _field(path: Path, name: str, text: str) -> Any:
    """The value of a field from its text in the file (raises RecipeError)."""
    who, todo = f"{path} ({name})", _todo(path, name)
    if len(text) > LONGEST or "source " in text:
        raise RecipeError(who, f"needs code: {text[:80]}", todo)
    if name == "data":
        if (source := data_source(text)) is None:
            raise RecipeError(who, f"{text[:80]} opens a file or needs code, which a file may not say", todo)
        return source
    if name == "model" and (network := read_timm_model(text)) is not None:
        return network
    try:
        tree = ast.parse(text, mode="eval").body
        _check(tree)
        value = parse_value(text)
        for attack in (value if isinstance(value, tuple) else (value,)) if name in ATTACKS else ():
            _check_attack(attack)
    except (SyntaxError, ValueError, RecursionError, MemoryError, RobustmailError) as error:
        wrong = error.wrong if isinstance(error, RobustmailError) else "cannot be read"
        raise RecipeError(who, f"{text[:80]}: {wrong}", todo) from error
    if name in FILES and value not in (None, "ema"):
        raise RecipeError(who, f"{text[:80]} is a file, and a file may not say what to open", todo)
    return value


def _check(tree: ast.expr) -> None:
    """Raise RecipeError for a name that is not robustmail's own, and for a text that could be a path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in module_of_name() and node.id != "inf":
            raise RecipeError(node.id, f"needs code: {node.id} is not robustmail's own")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not WORD.fullmatch(node.value):
            if "(" in node.value and ".py:" not in node.value:  # an attack, looked at by `_check_attack`
                continue
            raise RecipeError(node.value, "a text that could be a path")


def _check_attack(attack: Any) -> None:
    """Raise RecipeError for the text of an attack that is no built-in one."""
    if isinstance(attack, str) and not WORD.fullmatch(attack):
        name, _, knobs = attack.partition("(")
        call = ast.parse(f"f({knobs}" if re.fullmatch(r"[\w-]+", name) else attack, mode="eval").body
        if not isinstance(call, ast.Call) or not re.fullmatch(r"[\w-]+", name):
            raise RecipeError(attack, "is no built-in attack")
        for part in (*call.args, *(keyword.value for keyword in call.keywords)):
            _check(part)


def _todo(path: Path, name: str) -> str:
    """What to do about a field that cannot be read."""
    source = path.with_name("recipe.py")
    beside = f" Or read {source}, and if you trust it run that." if source.exists() else ""
    return f"Say it yourself: robustmail run {quoted(path)} {name}=...{beside}"
