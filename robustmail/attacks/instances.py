"""Attacks of torchattacks and ART as people hold them, bound to a model: turned into values of this toolkit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from robustmail.attacks.art import art
from robustmail.attacks.torchattacks import torchattack
from robustmail.errors import RecipeError

__all__ = ["adopted"]

LIBRARIES = {"torchattacks.attack": ("torchattacks", torchattack), "art.attacks.attack": ("ART", art)}
ALIASES = {"rho": "thr_decr", "resc_schedule": "rescale_schedule"}  # parameters that torchattacks keeps otherwise
SILENT = ("verbose", "summary_writer")  # parameters that change nothing but what is printed
OF_THE_MODEL = ("model", "model_name", "device", "_attacks", "_attack", "_estimator", "_summary_writer_arg",
                "_summary_writer", "verbose")  # fmt: skip
PLAIN = (bool, int, float, str, type(None), np.generic)
WRAP = "Write a function (model, x, y) -> images instead, which makes it for that model and calls it."


def adopted(attack: Any) -> Any:
    """An instance of torchattacks' or ART's classes as the value with its settings; anything else as it is.

    The model that it is bound to is not looked at: the attack is made for whatever model it then attacks.
    Raises RecipeError, with the line to write, for a class in place of an instance, and for an instance that holds
    what the value cannot say: targets, a training mode, a normalisation, a changed attribute.
    """
    cls = attack if isinstance(attack, type) else type(attack)
    if (found := _library(cls)) is None:
        return attack
    library, value_of = found
    who = f"attack {cls.__name__}"
    if cls.__module__.split(".")[0] != library.lower():
        raise RecipeError(who, f"is a class of one's own on one of {library}, whose settings are not known", WRAP)
    if isinstance(attack, type):
        knobs = ", eps=8/255, ..." if "eps" in inspect.signature(cls).parameters else ""
        raise RecipeError(
            who, f"is a class of {library}, not an attack", f"Write {value_of.__name__}({cls.__name__!r}{knobs})."
        )
    for wrong, todo in _held(attack):
        raise RecipeError(who, wrong, todo)
    settings = dict(_settings(who, attack))
    value = value_of(cls.__name__, **settings)
    again = cls(attack.model if hasattr(attack, "model") else attack.estimator, **settings)
    for name, kept in vars(attack).items():
        if name not in OF_THE_MODEL and not _alike(kept, vars(again).get(name)):
            raise RecipeError(who, f"its {name} is no setting that can be taken over", WRAP)
    return value


def _library(cls: type) -> tuple[str, Any] | None:
    """(name of the library whose attack a class is, what makes a value of it); None for anything else."""
    return next((LIBRARIES[base.__module__] for base in cls.__mro__ if base.__module__ in LIBRARIES), None)


def _settings(who: str, attack: Any) -> Iterator[tuple[str, Any]]:
    """(parameter of its class, value) as an instance keeps them; what it made of a default itself is left to it."""
    for parameter in list(inspect.signature(type(attack)).parameters.values())[1:]:
        name = parameter.name
        if name in SILENT:
            continue
        holders = [holder for holder in (attack, getattr(attack, "_attack", None)) if holder is not None]
        kept = [getattr(h, n) for h in holders for n in (name, ALIASES.get(name, name)) if hasattr(h, n)]
        if not kept and name == "n_classes" and hasattr(attack, "n_target_classes"):
            kept = [attack.n_target_classes + 1]
        if not kept:
            raise RecipeError(who, f"does not keep its {name}", WRAP)
        if isinstance(kept[0], PLAIN):
            yield name, kept[0].item() if isinstance(kept[0], np.generic) else kept[0]
        elif isinstance(kept[0], (tuple, list)) and all(isinstance(part, PLAIN) for part in kept[0]):
            yield name, tuple(kept[0])


def _held(attack: Any) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do) of each thing that an instance was told beside its parameters."""
    estimator = getattr(attack, "estimator", None)
    if getattr(attack, "targeted", False) or getattr(attack, "attack_mode", "default") != "default":
        yield "is targeted, and labels here are the true ones", WRAP
    if getattr(attack, "_model_training", False):
        yield "was told to attack in training mode", "Leave that out; in a recipe it is attack_mode='train'."
    told = getattr(attack, "normalization_used", None) or {}
    inside = getattr(estimator, "preprocessing", None)
    mean, std = (told.get(n, getattr(inside, n, plain)) for n, plain in (("mean", 0.0), ("std", 1.0)))
    if np.any(np.asarray(mean) != 0) or np.any(np.asarray(std) != 1):
        said = ", ".join(str(tuple(round(float(v), 6) for v in np.ravel(part))) for part in (mean, std))
        todo = f"Leave that out, and evaluate Classifier(model, ({said})), which takes images in [0, 1]."
        yield "was told how images are normalised", todo
    clip = getattr(estimator, "clip_values", None)
    if clip is not None and (span := np.ravel(clip).tolist()) != [0, 1]:
        yield f"its classifier takes images in {span}", "Images are in [0, 1] here, and so is eps."
    if any(getattr(estimator, name, None) for name in ("preprocessing_defences", "postprocessing_defences")):
        yield "its classifier has defences, which would be left out", "Put them into the model."


def _alike(kept: Any, made: Any) -> bool:
    """Are two attributes the same, as far as can be told?"""
    if isinstance(kept, PLAIN):
        return isinstance(made, PLAIN) and bool(kept == made)
    if isinstance(kept, (tuple, list)):
        return isinstance(made, (tuple, list)) and len(kept) == len(made) and all(map(_alike, kept, made))
    if callable(kept) and hasattr(kept, "__qualname__"):
        return bool(getattr(made, "__qualname__", None) == kept.__qualname__)
    return type(kept) is type(made) and _library(type(kept)) is None
