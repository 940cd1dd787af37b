"""From a class of a library to a value of a recipe: a frozen dataclass with one field per knob (parameter).

Fields, order and defaults come from the signature of the library's class. So a misspelt knob is an error,
`robustmail show` prints every setting, and `attack.eps=4/255` is an override like any other.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from typing import Any

from torch import nn

from robustmail.errors import PluginError, RecipeError, did_you_mean

__all__ = ["bound", "build_value", "knob_class", "library_class"]

COUNTS = re.compile(r"^n_|^nb_|steps|iter|restarts|queries|size|classes|random_init")


def library_class(label: str, library: str, classes: Mapping[str, type], name: str) -> type:
    """Return the class called `name`. Raises PluginError, with the nearest name, if there is none."""
    if name not in classes:
        raise PluginError(f"{label}({name!r})", f"{library} has no such attack", did_you_mean(str(name), classes))
    return classes[name]


def knob_class(base: type, label: str, target: type, defaults: Mapping[str, Any]) -> type:
    """Make a frozen dataclass, derived from `base`, whose fields are the parameters of `target`.

    defaults: defaults that differ from those of `target`; the types of these fields are not checked.
    """
    fields: list[tuple[str, Any, Any]] = []
    for p in list(inspect.signature(target).parameters.values())[1:]:  # the first is the model, or the parameters
        default = defaults.get(p.name, p.default)
        kind = Any if p.name in defaults else _kind(p)
        required = default is inspect.Parameter.empty
        fields.append((p.name, kind, dataclasses.field() if required else dataclasses.field(default=default)))
    space = {"__module__": base.__module__, "__label__": label, "__given__": (target.__name__,), "_target": target}
    return dataclasses.make_dataclass(
        target.__name__, fields, bases=(base,), namespace=space, frozen=True, kw_only=True
    )


def build_value(cls: Callable[..., Any], knobs: Mapping[str, Any]) -> Any:
    """Return cls(**knobs). Raises RecipeError for a knob that does not exist, or is required and missing."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    who = f"{cls.__label__}({cls.__given__[0]!r})"  # type: ignore[attr-defined]
    for name in knobs:
        if name not in fields:
            raise RecipeError(who, f"no knob {name!r}", did_you_mean(name, fields))
    for f in fields.values():
        if f.default is dataclasses.MISSING and f.name not in knobs:
            raise RecipeError(who, f"knob {f.name!r} required", f"Add {f.name}=....")
    return cls(**knobs)


def _kind(p: inspect.Parameter) -> Any:
    """Type of a knob, inferred from its annotation, default and name; Any if unknown."""
    if isinstance(p.default, (bool, str)):
        return type(p.default)
    if "float" in str(p.annotation) and isinstance(p.default, (int, float)):
        return float
    if isinstance(p.default, (int, float)):
        return int if isinstance(p.default, int) and COUNTS.search(p.name) else float
    return Any


def bound(target: Callable[..., Any], model: nn.Module, knobs: Mapping[str, Any]) -> Any:
    """A library's attack on this model, without the line that torchattacks prints of a model without parameters."""
    is_bare = next(model.parameters(), None) is None if isinstance(model, nn.Module) else False
    with redirect_stdout(io.StringIO()) if is_bare else nullcontext():
        return target(model, **knobs)
