"""Overrides such as `weighter.slope=5` change a recipe. Their values are parsed, never evaluated as Python.

A value is a literal, arithmetic on numbers (8/255), a tuple, list or mapping of values, the name of a plugin (pm_nat,
my.py:doubt), or a call of one with literal arguments (Sigmoid(slope=5, bias=0)). A field of type str needs no quotes.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from robustmail.config.loader import field_kind, find_plugin, known_paths
from robustmail.errors import PluginError, RecipeError, did_you_mean
from robustmail.fields import field_values, matches_type, replace_fields, type_hints, type_name
from robustmail.recipe import Recipe

__all__ = ["apply_overrides", "parse_field", "parse_value"]

ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def apply_overrides(recipe: Recipe, texts: Iterable[str]) -> Recipe:
    """Return the recipe with every `path=value` in `texts` applied, in order.

    Raises RecipeError: not of this form; no such field, with the nearest name; or a value of the wrong type. Raises
    PluginError for the name of a plugin that does not exist.
    """
    changes: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        path, value = path.strip(), value.strip()
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", path):
            raise RecipeError(repr(text), "an override is path=value", "Write e.g. weighter.slope=5 or epochs=3.")
        top, *rest = path.split(".")
        if top not in field_values(recipe):
            raise _no_field(text, path, recipe)
        current = changes.get(top, getattr(recipe, top))
        changes[top] = _set(current, rest, value, text, recipe) if rest else _value(value, type(recipe), top, text)
    return recipe.but(**changes)


def parse_field(text: str) -> Any:
    """The value of an override of a whole field, such as margin=pm_nat. Raises RecipeError or PluginError."""
    name, _, value = text.partition("=")
    return _value(value.strip(), Recipe, name.strip(), text)


def _set(current: Any, path: list[str], value: str, text: str, recipe: Recipe) -> Any:
    """Return `current` with the field at `path` changed; text: the whole override, for errors."""
    name, *rest = path
    fields = field_values(current)
    if name not in fields:
        if fields:
            raise RecipeError(text, f"no field {name!r} in {type(current).__name__}", did_you_mean(name, fields))
        raise _no_field(text, text.partition("=")[0], recipe)
    new = _set(fields[name], rest, value, text, recipe) if rest else _value(value, type(current), name, text)
    return replace_fields(current, {name: new})


def _value(value: str, owner: type, field: str, text: str) -> Any:
    """Parse `value` for a field of `owner`; the field's type decides whether words without quotes are strings."""
    hint = type_hints(owner).get(field, Any)
    if hint is not Any:
        accepts_any_str = matches_type("some text", hint)
        if value == "None" and matches_type(None, hint):
            return None
        if accepts_any_str and ".py:" not in value and re.fullmatch(r"[\w.:/@+=-]+", value):
            return value
        if not accepts_any_str and matches_type(value, hint):  # a word of a Literal: precision=fp32
            return value
        if matches_type(("some text",), hint) and re.fullmatch(r"[\w.*?-]+(\s*,\s*[\w.*?-]+)*,?", value):
            return tuple(word.strip() for word in value.split(",") if word.strip())
    try:
        parsed = parse_value(value, field_kind(field) if owner is Recipe else None)
    except PluginError as error:
        if owner is Recipe and field_kind(field):
            raise PluginError(text, f"{error.who}: {error.wrong}", error.todo) from error
        todo = "" if hint is Any else f"{field} must be {type_name(hint)}."
        raise RecipeError(text, f"{value!r} is neither a literal nor a known name", todo) from error
    except RecipeError as error:
        raise RecipeError(text, f"{error.who}: {error.wrong}", error.todo) from error
    if hint is not Any and callable(parsed) and matches_type((parsed,), hint):
        return (parsed,)  # one plugin for a field that takes several
    if hint is not Any and not matches_type(parsed, hint):
        raise RecipeError(text, f"{field} must be {type_name(hint)}")
    return parsed


def parse_value(text: str, kind: str | None = None) -> Any:
    """Parse a value, by the grammar in the module's docstring.

    kind: the plural of a kind; names that no plugin has are looked up there too, which is how models are found.
    Raises RecipeError for anything outside the grammar; PluginError for a name that no plugin has.
    """
    if re.fullmatch(r"[^()'\"]+\.py:\w+", text):
        return _instance(find_plugin(text))
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise RecipeError(
            repr(text), "cannot be read", "Put texts in quotes inside a call: npz('file.npz')."
        ) from error
    return _read(node, kind)


def _read(node: ast.expr, kind: str | None) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Tuple(elts=items):
            return tuple(_read(item, kind) for item in items)
        case ast.List(elts=items):
            return [_read(item, kind) for item in items]
        case ast.Dict(keys=keys, values=values) if all(keys):
            read_keys = [_read(k, kind) for k in keys if k]
            if any(isinstance(k, (list, dict)) for k in read_keys):
                raise RecipeError(repr(ast.unparse(node)), "a list or a mapping cannot be a key")
            return dict(zip(read_keys, (_read(v, kind) for v in values), strict=True))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in ARITHMETIC:
            return _compute(ARITHMETIC[type(op)], node, _read(operand, kind))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in ARITHMETIC:
            return _compute(ARITHMETIC[type(op)], node, _read(left, kind), _read(right, kind))
        case ast.Name(id="inf"):
            return math.inf
        case ast.Name(id=name):
            return _instance(_find(name, kind))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if all(k.arg for k in keywords):
            return _call(name, _find(name, kind), [_read(a, None) for a in args],
                         {str(k.arg): _read(k.value, None) for k in keywords})  # fmt: skip
    raise RecipeError(
        repr(ast.unparse(node)), "is not a literal, a name or a call of one",
        "Overrides are read, not run: put anything cleverer into the recipe file.",
    )  # fmt: skip


def _find(name: str, kind: str | None) -> Any:
    try:
        return find_plugin(name)
    except PluginError as error:
        if kind is None or error.__cause__ is not None:  # a broken plugin is not a missing one
            raise
        return find_plugin(name, kind)


def _instance(plugin: Any) -> Any:
    """`objective=AT` means AT(): a class without parentheses is called without arguments."""
    return _call(plugin.__name__, plugin, [], {}) if isinstance(plugin, type) else plugin


def _call(name: str, target: Any, args: list[Any], knobs: dict[str, Any]) -> Any:
    try:
        return target(*args, **knobs)
    except TypeError as error:
        known = getattr(target, "__dataclass_fields__", {})
        unknown = next((k for k in knobs if known and k not in known), None)
        if unknown:
            raise RecipeError(name, f"no field {unknown!r}", did_you_mean(unknown, known)) from error
        raise RecipeError(name, str(error).replace(f"{name}.__init__() ", "")) from error


def _compute(how: Callable[..., Any], node: ast.expr, *numbers: Any) -> Any:
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise RecipeError(repr(ast.unparse(node)), "arithmetic is for numbers")
    try:
        return how(*numbers)
    except (ZeroDivisionError, OverflowError) as error:
        raise RecipeError(repr(ast.unparse(node)), str(error)) from error


def _no_field(text: str, path: str, recipe: Recipe) -> RecipeError:
    return RecipeError(text, f"the recipe has no {path!r}", did_you_mean(path, known_paths(recipe)))
