"""Convert attack objects of torchattacks and ART, which are bound to a model, to values of a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from robustmail.attacks.art import art
from robustmail.attacks.library import bound
from robustmail.attacks.torchattacks import torchattack
from robustmail.errors import RecipeError

__all__ = ["adopted"]

LIBRARIES = {"torchattacks.attack": ("torchattacks", torchattack), "art.attacks.attack": ("ART", art)}
ALIASES = {"rho": "thr_decr", "resc_schedule": "rescale_schedule"}  # parameter -> attribute in torchattacks
SILENT = ("verbose", "summary_writer")  # parameters that change only what is printed
OF_THE_MODEL = ("model", "model_name", "device", "_attacks", "_attack", "_estimator", "_summary_writer_arg",
                "_summary_writer", "verbose")  # fmt: skip
PLAIN = (bool, int, float, str, type(None), np.generic)
WRAP = "Write a function (model, x, y) -> images instead, which makes it for that model and calls it."


def adopted(attack: Any) -> Any:
    """Return torchattack(...) or art(...) with the settings of an attack object of these libraries; else `attack`.

    The model that the object is bound to is ignored: the value attacks any model.
    Raises RecipeError, with the line to write, for a class instead of an object, and for an object with settings that
    the value does not have: targets, a training mode, a normalisation, a changed attribute.
    """
    cls = attack if isinstance(attack, type) else type(attack)
    if (library_and_adapter := _library(cls)) is None:
        return attack
    library, adapter = library_and_adapter
    who = f"attack {cls.__name__}"
    if cls.__module__.split(".")[0] != library.lower():
        raise RecipeError(who, f"is a class of one's own on one of {library}, whose settings are not known", WRAP)
    if isinstance(attack, type):
        knobs = ", eps=8/255, ..." if "eps" in inspect.signature(cls).parameters else ""
        raise RecipeError(
            who, f"is a class of {library}, not an attack", f"Write {adapter.__name__}({cls.__name__!r}{knobs})."
        )
    for wrong, todo in _unsupported(attack):
        raise RecipeError(who, wrong, todo)
    settings = dict(_settings(who, attack))
    value = adapter(cls.__name__, **settings)
    rebuilt = bound(cls, attack.model if hasattr(attack, "model") else attack.estimator, settings)
    for name, attribute in vars(attack).items():
        if name not in OF_THE_MODEL and not _is_same(attribute, vars(rebuilt).get(name)):
            raise RecipeError(who, f"its {name} is no setting that can be taken over", WRAP)
    return value


def _library(cls: type) -> tuple[str, Any] | None:
    """(name of the library, its adapter) for a class of attacks of torchattacks or ART; None for any other class."""
    return next((LIBRARIES[base.__module__] for base in cls.__mro__ if base.__module__ in LIBRARIES), None)


def _settings(who: str, attack: Any) -> Iterator[tuple[str, Any]]:
    """Yield (parameter, value) of an attack object; not those that it derived from a default itself."""
    for parameter in list(inspect.signature(type(attack)).parameters.values())[1:]:
        name = parameter.name
        if name in SILENT:
            continue
        holders = [holder for holder in (attack, getattr(attack, "_attack", None)) if holder is not None]
        values = [getattr(h, n) for h in holders for n in (name, ALIASES.get(name, name)) if hasattr(h, n)]
        if not values and name == "n_classes" and hasattr(attack, "n_target_classes"):
            values = [attack.n_target_classes + 1]
        if not values:
            raise RecipeError(who, f"does not keep its {name}", WRAP)
        value = values[0]
        if isinstance(value, PLAIN):
            yield name, value.item() if isinstance(value, np.generic) else value
        elif isinstance(value, (tuple, list)) and all(isinstance(part, PLAIN) for part in value):
            yield name, tuple(value)


def _unsupported(attack: Any) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong, what to do) for each setting beside its parameters that a value does not have."""
    estimator = getattr(attack, "estimator", None)
    if getattr(attack, "targeted", False) or getattr(attack, "attack_mode", "default") != "default":
        yield "is targeted, and labels here are the true ones", WRAP
    if getattr(attack, "_model_training", False):
        yield "attacks in training mode", "Leave that out; in a recipe it is attack_mode='train'."
    normalization = getattr(attack, "normalization_used", None) or {}
    preprocessing = getattr(estimator, "preprocessing", None)
    defaults = (("mean", 0.0), ("std", 1.0))
    mean, std = (normalization.get(name, getattr(preprocessing, name, default)) for name, default in defaults)
    if np.any(np.asarray(mean) != 0) or np.any(np.asarray(std) != 1):
        texts = ", ".join(str(tuple(round(float(v), 6) for v in np.ravel(part))) for part in (mean, std))
        todo = f"Leave that out, and evaluate Classifier(model, ({texts})), which takes images in [0, 1]."
        yield "normalises images itself", todo
    clip = getattr(estimator, "clip_values", None)
    if clip is not None and (span := np.ravel(clip).tolist()) != [0, 1]:
        yield f"its classifier takes images in {span}", "Images are in [0, 1] here, and so is eps."
    if any(getattr(estimator, name, None) for name in ("preprocessing_defences", "postprocessing_defences")):
        yield "its classifier has defences, which would be left out", "Put them into the model."


def _is_same(a: Any, b: Any) -> bool:
    """Whether two attributes are equal; of objects that cannot be compared, only the types are."""
    if isinstance(a, PLAIN):
        return isinstance(b, PLAIN) and bool(a == b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_is_same, a, b))
    if callable(a) and hasattr(a, "__qualname__"):
        return bool(getattr(b, "__qualname__", None) == a.__qualname__)
    return type(a) is type(b) and _library(type(a)) is None
