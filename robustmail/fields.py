"""Trees of frozen dataclasses, such as a recipe: their fields are read, checked, changed and printed here.

Overrides, schedules, `show` and the comparison of two recipes all use this module, so a plugin need not be more than a
callable or a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from robustmail.errors import RecipeError
from robustmail.plugin_calls import definition_of, is_third_party, plugin_name
from robustmail.schedules import Schedule, Stairs, is_schedule

T = TypeVar("T")


def field_values(value: Any) -> dict[str, Any]:
    """The fields of a dataclass instance that are parameters, by name; {} for anything else.

    Those of a tuple of plugins are its items by their index, "0", "1", ...
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    if type(value) is tuple and all(map(callable, value)):
        return {str(index): item for index, item in enumerate(value)}
    return {}


def replace_fields(value: T, new: Mapping[str, Any]) -> T:
    """A copy with some of its fields changed; new: by the names of `field_values`, the value's own."""
    if isinstance(value, tuple):
        return typing.cast(T, tuple((field_values(value) | dict(new)).values()))
    return dataclasses.replace(value, **new)  # type: ignore[type-var]


def map_schedules(value: T, change: Callable[[Any], Any]) -> T:
    """Return `value` with every schedule replaced by `change(schedule)`, recursively, also inside the replacements.

    Returns `value` itself if nothing changed.
    """
    if isinstance(value, (str, int, float, types.NoneType)):
        return value  # most fields: a recipe is resolved thousands of times
    if is_schedule(value):
        changed = typing.cast(T, change(value))
        return changed if changed is value else map_schedules(changed, change)
    old = field_values(value)
    new = {name: map_schedules(part, change) for name, part in old.items()}
    if all(new[name] is old[name] for name in old):
        return value
    return replace_fields(value, new)


def iter_schedules(value: Any) -> Iterator[Schedule]:
    """Yield every schedule in the tree, also those in the steps of `Stairs`."""
    if is_schedule(value):
        yield value
    inside = value.steps if isinstance(value, Stairs) else {} if is_schedule(value) else field_values(value)
    for part in inside.values():
        yield from iter_schedules(part)


def check_types(value: Any) -> None:
    """Check every field of a dataclass instance against its annotation; for use in `__post_init__`.

    Raises RecipeError with the field, the value given and the type expected.
    """
    cls: type = type(value)
    hints = type_hints(cls)
    for name, part in field_values(value).items():
        if not matches_type(part, hints[name]):
            given = f"{describe_head(value)} (given {name}={describe(part)})"
            todo = f"Write {part.__name__}(...)." if isinstance(part, type) else ""
            raise RecipeError(given, f"{name} must be {type_name(hints[name])}", todo)


def check_range(value: Any, low: float = 0.0, **fields: Any) -> None:
    """Check that numbers are finite and at least `low`; skips schedules and None. Raises RecipeError."""
    for name, number in fields.items():
        if isinstance(number, (int, float)) and not (low <= number and math.isfinite(number)):
            given = f"{describe_head(value)} (given {name}={describe(number)})"
            raise RecipeError(given, f"{name} must be a finite number, at least {low:g}")


def matches_type(value: Any, hint: Any) -> bool:
    """Whether `value` has the type `hint`. A schedule matches any hint: its values are checked when they are used."""
    if hint is Any or is_schedule(value):
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
    if origin is not None:  # Callable[...]: a class returns its own instances
        return callable(value) and (not isinstance(value, type) or issubclass(value, args[-1]))
    return isinstance(value, hint) and not (isinstance(value, type) and getattr(hint, "_is_protocol", False))


def type_name(hint: Any) -> str:
    """The type as text, with its article: "a whole number", "'eval' or 'train'"."""
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
    """The value as one line of source: `TRADES(beta=5.0)`, `8/255`, `pm_adv`."""
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
    text = repr(value)  # without an address, which differs in each process
    return text if " at 0x" not in text else f"{plugin_name(value)}({', '.join(_captured_texts(value))})"


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """All leaves of the tree as text, by path: {"weighter.slope": "2.0", ...}.

    Plugins of the user's own carry a hash of their source.
    """
    named = field_values(value)
    if named and not is_schedule(value):
        flat = {path: describe_head(value)} if path and not isinstance(value, tuple) else {}
        for name, part in named.items():
            flat |= flatten(part, f"{path}.{name}" if path else name)
        return flat
    return {path: describe(value) + _source_hash(value)}


def fingerprint(value: Any) -> str:
    """A line that differs for different plugins: name, fields, and, for the user's own, a hash of the source."""
    head, *leaves = flatten(value, "it").items()  # with a path, since only then the name of a dataclass is included
    return ", ".join([head[1], *(f"{path.removeprefix('it.')}={text}" for path, text in leaves)])


def describe_head(value: Any) -> str:
    """The name of a dataclass value with its positional arguments, without its fields: torchattack('PGD')."""
    given = getattr(value, "__given__", ())
    return plugin_name(value) + (f"({', '.join(map(repr, given))})" if given else "") + _source_hash(value)


def _source_hash(value: Any) -> str:
    if not is_third_party(value):
        return ""
    texts = _captured_texts(value)
    try:
        target = definition_of(value.func if isinstance(value, functools.partial) else value)
        texts.insert(0, f"source {hashlib.sha256(inspect.getsource(target).encode()).hexdigest()[:8]}")
    except (OSError, TypeError):
        pass
    return f" ({'; '.join(texts)})" if texts else ""


def _captured(value: Any) -> dict[str, Any]:
    """Values that a plugin other than a dataclass holds: bound arguments, attributes, variables of its closure."""
    if isinstance(value, functools.partial):
        return {"of": value.func, **{str(i): part for i, part in enumerate(value.args)}, **value.keywords}
    if inspect.isfunction(value):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells}
    return {} if inspect.isclass(value) or dataclasses.is_dataclass(value) else dict(getattr(value, "__dict__", {}))


def _captured_texts(value: Any) -> list[str]:
    """The captured values as text: numbers, strings and plugins as source, of anything else the type."""
    known = (int, float, str, tuple, type(None))

    def text(part: Any) -> str:
        describable = isinstance(part, known) or callable(part) or field_values(part)
        return describe(part) if describable else type(part).__name__

    return [f"{name}={text(part)}" for name, part in _captured(value).items()]


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name; all Any if one of the annotations cannot be evaluated."""
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name that is imported under TYPE_CHECKING only
        return {f.name: Any for f in dataclasses.fields(cls)}


def formula_of(plugin: Any, hint: Any, default: Any) -> Any:
    """A plugin's attribute `formula`, for people, if it is of the expected type; else the default."""
    formula = getattr(plugin, "formula", None)
    return formula if matches_type(formula, hint) else default
