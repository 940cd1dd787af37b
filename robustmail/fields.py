"""A recipe is a tree of frozen dataclasses; this module reads, checks, changes and prints such trees.

Everything that needs to know how a value is made of parts (overrides, schedules, `show`, the comparison of two
recipes) goes through here, so that a plugin needs to be nothing but a callable or a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from robustmail.errors import RecipeError
from robustmail.plugin_calls import _maker, is_third_party, plugin_name
from robustmail.schedules import Schedule, Stairs

T = TypeVar("T")
_SEEN: dict[Any, dict[str, Any]] = {}


def field_values(value: Any) -> dict[str, Any]:
    """The named fields that a dataclass instance was made from; nothing for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return {}


def map_schedules(value: T, change: Callable[[Any], Any]) -> T:
    """Rebuild a tree with `change` applied to every schedule in it, and to those that it finds in their stead; the
    very same object where none changed."""
    if isinstance(value, Schedule):
        changed = typing.cast(T, change(value))
        return changed if changed is value else map_schedules(changed, change)
    old = field_values(value)
    new = {name: map_schedules(part, change) for name, part in old.items()}
    if all(new[name] is old[name] for name in old):
        return value
    return dataclasses.replace(value, **new)  # type: ignore[type-var]


def iter_schedules(value: Any) -> Iterator[Schedule]:
    """Every schedule in the tree, and in the steps of stairs."""
    if isinstance(value, Schedule):
        yield value
    inside = value.steps if isinstance(value, Stairs) else {} if isinstance(value, Schedule) else field_values(value)
    for part in inside.values():
        yield from iter_schedules(part)


def check_types(value: Any) -> None:
    """Compare every field of a dataclass instance with its annotation; for use in `__post_init__`.

    Raises RecipeError, naming the field, what was given and what was expected.
    """
    hints = type_hints(type(value))
    for name, part in field_values(value).items():
        if not matches_type(part, hints[name]):
            given = f"{describe_head(value)} (given {name}={describe(part)})"
            todo = f"Write {part.__name__}(...)." if isinstance(part, type) else ""
            raise RecipeError(given, f"{name} must be {type_name(hints[name])}", todo)


def check_range(value: Any, low: float = 0.0, **fields: Any) -> None:
    """Refuse numbers below `low`, and infinite ones; schedules and None pass (raises RecipeError)."""
    for name, number in fields.items():
        if isinstance(number, (int, float)) and not (low <= number and math.isfinite(number)):
            given = f"{describe_head(value)} (given {name}={describe(number)})"
            raise RecipeError(given, f"{name} must be a finite number, at least {low:g}")


def matches_type(value: Any, hint: Any) -> bool:
    """Does `value` fit the annotation `hint`? A schedule fits everywhere: its values are checked when they come."""
    if hint is Any or isinstance(value, Schedule):
        return True
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches_type(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        items = args[:1] * len(value) if isinstance(value, (tuple, list)) and args[-1] is ... else args
        return isinstance(value, (tuple, list)) and len(value) == len(items) and all(map(matches_type, value, items))
    if hint in (int, float):
        number = isinstance(value, int) or (hint is float and isinstance(value, float) and not math.isnan(value))
        return number and not isinstance(value, bool)
    if hint is None or hint is type(None):
        return value is None
    if origin is not None:  # Callable[...]: a class makes its own instances
        return callable(value) and (not isinstance(value, type) or issubclass(value, args[-1]))
    return isinstance(value, hint) and not (isinstance(value, type) and getattr(hint, "_is_protocol", False))


def type_name(hint: Any) -> str:
    """The annotation in a user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if origin is tuple:
        return f"a tuple of {type_name(args[0])}"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "True or False", type(None): "None"}
    name = str(getattr(hint, "__name__", hint)).lower()
    return words.get(hint) or f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def describe(value: Any) -> str:
    """One line of source that makes the value again: `TRADES(beta=5.0)`, `8/255`, `pm_adv`."""
    if isinstance(value, Stairs):
        return "Stairs({" + ", ".join(f"{k}: {describe(v)}" for k, v in value.steps.items()) + "})"
    if isinstance(value, float) and len(repr(value)) > 8 and round(value * 255) / 255 == value:
        return f"{round(value * 255)}/255"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(describe(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    named = field_values(value)
    if named or dataclasses.is_dataclass(value):
        given = [repr(v) for v in getattr(value, "__given__", ())]
        knobs = [f"{name}={describe(part)}" for name, part in named.items()]
        return f"{plugin_name(value)}({', '.join(given + knobs)})"
    if callable(value):
        return plugin_name(value)
    text = repr(value)  # an address in it would be another one each time
    return text if " at 0x" not in text else f"{plugin_name(value)}({', '.join(_captured_texts(value))})"


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """{"weight.slope": "2.0", ...}: every leaf with its path; own functions carry a hash of their source."""
    named = field_values(value)
    if named and not isinstance(value, Schedule):
        flat = {path: describe_head(value)} if path else {}
        for name, part in named.items():
            flat |= flatten(part, f"{path}.{name}" if path else name)
        return flat
    return {path: describe(value) + _source_hash(value)}


def fingerprint(value: Any) -> str:
    """What tells one plugin from another, in a line: its name, its knobs, a hash of its source if it is foreign."""
    head, *knobs = flatten(value, "it").items()  # under a path, for a dataclass says what it is only there
    return ", ".join([head[1], *(f"{path.removeprefix('it.')}={text}" for path, text in knobs)])


def describe_head(value: Any) -> str:
    """The name of a dataclass value with what it was given by position, without its fields."""
    given = getattr(value, "__given__", ())
    return plugin_name(value) + (f"({', '.join(map(repr, given))})" if given else "") + _source_hash(value)


def _source_hash(value: Any) -> str:
    if not is_third_party(value):
        return ""
    said = _captured_texts(value)
    try:
        target = _maker(value.func if isinstance(value, functools.partial) else value)
        said.insert(0, f"source {hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:8]}")
    except (OSError, TypeError):
        pass
    return f" ({'; '.join(said)})" if said else ""


def _captured(value: Any) -> dict[str, Any]:
    """What a plugin that is no dataclass carries beside its source: arguments, attributes, the variables around it."""
    if isinstance(value, functools.partial):
        return {"of": value.func, **{str(i): part for i, part in enumerate(value.args)}, **value.keywords}
    if inspect.isfunction(value):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells}
    return {} if inspect.isclass(value) or dataclasses.is_dataclass(value) else dict(getattr(value, "__dict__", {}))


def _captured_texts(value: Any) -> list[str]:
    """The same in words: numbers, texts and plugins as they are written, of anything else the type."""
    known = (int, float, str, tuple, type(None))

    def text(part: Any) -> str:
        describable = isinstance(part, known) or callable(part) or field_values(part)
        return describe(part) if describable else type(part).__name__

    return [f"{name}={text(part)}" for name, part in _captured(value).items()]


def type_hints(cls: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, each Any where one of them cannot be read."""
    if cls not in _SEEN:
        try:
            _SEEN[cls] = typing.get_type_hints(cls)
        except NameError:  # an annotation that is there for type checkers alone
            _SEEN[cls] = {f.name: Any for f in dataclasses.fields(cls)}
    return _SEEN[cls]
