"""A network of timm with arguments of its constructor, as a value of a recipe."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from robustmail.errors import ModelError, RecipeError, did_you_mean
from robustmail.fields import field_values

__all__ = ["timm_model"]

# Parameters of timm's factories that download or open something, wrap the network, or are the recipe's business.
REFUSED = re.compile(
    "num_classes|in_chans|pretrained.*|checkpoint_path|cache_dir|scriptable|exportable|no_jit|pruned|features_only|"
    "feature_c.*|out_indices|model_cfg|kwargs_filter"
)
LONGEST, LARGEST = 300, 4096
"""letters of a text, and a number in it, that may come from a file"""


def timm_model(name: str, /, **knobs: Any) -> Any:
    """The network `name` of timm with arguments of its constructor: timm_model("vit_tiny_patch16_224", img_size=32).

    name: of timm or ours, without the tag of weights. knobs: numbers, texts, True, False, None, and tuples of them.
    Returns a frozen value with the knobs as its fields, called as (classes, channels) -> nn.Module with new weights.
    Raises ModelError for an unknown name; RecipeError for a knob that is not a literal, or that would load weights
    (the recipe's `init` does) or set the numbers of classes and channels (the data do).
    """
    if not is_in_timm(name):
        import timm

        near = did_you_mean(name, timm.list_models())
        raise ModelError(f"timm_model({name!r})", "timm has no such model", near if near.startswith("Did") else "")
    frozen = {key: _frozen(value) for key, value in knobs.items()}
    for key, value in frozen.items():
        given = f"timm_model({name!r}) (given {key}={value!r})"
        if REFUSED.fullmatch(key):
            raise RecipeError(given, f"{key} is not a knob here", "Data set classes and channels; init names weights.")
        if not _is_literal(value):
            raise RecipeError(given, "knobs are numbers, texts, True, False, None, or tuples of them")
    return _value_class(name, tuple(frozen))(**frozen)


def is_in_timm(name: str) -> bool:
    """Whether timm's registry, our networks included, has that name; never true for names that are downloaded.

    A Wide ResNet of any size, such as cifar_wrn40_2, is registered here.
    """
    import timm

    from robustmail.models import resnet, small, wide_resnet  # noqa: F401  registers ours

    wide_resnet.register_size(name)
    return timm.is_model(name) and ":" not in name and "/" not in name


@dataclass(frozen=True, repr=False)
class TimmModel:
    """Base of the values of `timm_model`: a derived class has the knobs that were given as its fields."""

    __label__: ClassVar[str] = "timm_model"
    __given__: ClassVar[tuple[str, ...]]

    @property
    def text(self) -> str:
        """The value as `read_timm_model` reads it."""
        knobs = "".join(f", {key}={value!r}" for key, value in field_values(self).items())
        return f"timm_model({self.__given__[0]!r}{knobs})"

    def __repr__(self) -> str:
        return self.text

    def check(self) -> None:
        """Check the knobs without allocating the network. Raises ModelError for one that it does not have."""
        try:
            with torch.device("meta"):
                self(10, 3)
        except ModelError:
            raise
        except Exception:  # it computes with its parameters, or its knobs contradict each other: `build` will say so
            return

    def __call__(self, classes: int, channels: int) -> nn.Module:
        """Build the network with new weights. Raises ModelError for a knob that it does not have."""
        import timm

        name, knobs = self.__given__[0], field_values(self)
        try:
            network: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels, **knobs)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in knobs:
                raise
            cls = type(timm.create_model(name, num_classes=classes, in_chans=channels))
            known = [key for key in inspect.signature(cls).parameters if not REFUSED.fullmatch(key)]
            near = did_you_mean(unknown[1], known)
            todo = near if near.startswith("Did") else f"It has {', '.join(known)}."
            raise ModelError(self.text, f"{cls.__name__} has no knob {unknown[1]!r}", todo) from error
        return network


def read_timm_model(text: str) -> TimmModel | None:
    """The value that a text such as timm_model('vit_tiny_patch16_224', img_size=32) stands for, or None.

    The text may come from a file: nothing in it is looked up but the name of the network in timm's registry, and its
    numbers are bounded.
    """
    if not text.startswith("timm_model(") or len(text) > LONGEST:
        return None
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and len(call.args) == 1):
            return None
        name = ast.literal_eval(call.args[0])
        knobs = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg}
        is_plain = isinstance(name, str) and len(knobs) == len(call.keywords) and all(map(_is_small, knobs.values()))
        return cast(TimmModel, timm_model(name, **knobs)) if is_plain else None
    except (ModelError, RecipeError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


@functools.cache
def _value_class(name: str, knobs: tuple[str, ...]) -> type[TimmModel]:
    """A frozen dataclass with these fields: values with equal knobs are equal."""
    fields = [(key, Any, dataclasses.field()) for key in knobs]
    space = {"__module__": __name__, "__given__": (name,)}
    options: dict[str, Any] = {"frozen": True, "kw_only": True, "repr": False}
    cls = dataclasses.make_dataclass("timm_model", fields, bases=(TimmModel,), namespace=space, **options)
    return cast(type[TimmModel], cls)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _is_small(value: Any) -> bool:
    """Whether a value from a file is a word, a number up to LARGEST, or a few of them."""
    if isinstance(value, (tuple, list)):
        return len(value) <= 16 and all(map(_is_small, value))
    if isinstance(value, str):
        return re.fullmatch(r"[\w.+-]*", value, re.ASCII) is not None
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= LARGEST)
