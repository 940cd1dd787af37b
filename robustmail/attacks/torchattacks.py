"""Adapter for torchattacks: its classes as attacks of a recipe."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustmail.attacks.library import bound, build_value, knob_class, library_class
from robustmail.attacks.loops import use_fast_loops
from robustmail.attacks.per_image_noise import own_noise
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.errors import AttackError, PluginError
from robustmail.fields import check_types, field_values
from robustmail.norms import check_budget, check_counts, norm_of
from robustmail.step import Adversarial

__all__ = ["torchattack"]

# None: chosen at the call. torchattacks' own defaults start every batch from the same noise, and assume 10 classes.
DEFAULTS = {"seed": None, "n_classes": None}

REFUSED = {
    "AutoAttack": ("10 instead of 100 iterations, so not the standard AutoAttack", "Use AutoAttack(eps=8/255)."),
    "MultiAttack": ("made of attacks that are bound to a model", "List several names in `evaluate` instead."),
}
"""Classes that are not offered: name -> (what is wrong, what to do)."""


def torchattack(name: str, /, **knobs: Any) -> Any:
    """The attack `name` of torchattacks with its own knobs: torchattack("TPGD", eps=8/255, alpha=2/255, steps=10).

    Returns a frozen value, called as (model, x, y) -> Adversarial. Its fields are torchattacks' parameters with
    torchattacks' defaults, with two exceptions: `seed=None` draws a seed from the global generator at each call, and
    `n_classes=None` takes the number of classes from the model (ten at most, as in AutoAttack's reference code).
    The attack sees the model through `model_view`: in eval mode, and with no lasting change to model or generators.
    Raises PluginError for an unknown name; RecipeError for a knob that does not exist or has a wrong value;
    AttackError for images outside [0, 1] or a result outside the ball; NonFiniteError for NaN or infinite logits.
    """
    if name in REFUSED:
        raise PluginError(f"torchattack({name!r})", *REFUSED[name])
    return build_value(_knob_class(name), knobs)


@dataclass(frozen=True)
class _Torchattack:
    _target: ClassVar[Any]
    __label__: ClassVar[str]
    __given__: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_types(self)
        lengths = {name: getattr(self, name, None) for name in ("eps", "alpha")}
        who = f"torchattack({self.__given__[0]!r})"
        check_budget(who, norm_of(self), **lengths)
        check_counts(who, steps=getattr(self, "steps", 1), n_queries=getattr(self, "n_queries", 1))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        who = f"torchattack({self.__given__[0]!r})"
        check_images(who, x)
        with model_view(model) as view:
            attack = own_noise(use_fast_loops(bound(self._target, view, self._knobs(who, view, x))))
            if getattr(attack, "device", x.device) is None:  # a model without parameters
                attack.set_device(x.device)
            x_adv = attack(x.detach().contiguous(), y.long())  # FAB cannot take channels-last strides
            return Adversarial(check_result(who, view, x, x_adv, getattr(self, "eps", None), norm_of(self)))

    def _knobs(self, who: str, view: ModelView, x: Tensor) -> dict[str, Any]:
        knobs = field_values(self)
        if "seed" in knobs and knobs["seed"] is None:
            knobs["seed"] = int(torch.randint(2**31 - 1, ()))
        if "n_classes" in knobs:
            with torch.no_grad():
                classes = view(x[:2]).shape[1]
            if self.__given__[0] == "APGDT" and classes < 4:
                raise AttackError(who, f"targeted DLR loss needs 4 classes, the model has {classes}")
            knobs["n_classes"] = min(knobs["n_classes"] or 10, classes)
        return knobs


@functools.cache
def _knob_class(name: str) -> type:
    import torchattacks

    base = torchattacks.attack.Attack
    classes = {
        key: value
        for key, value in vars(torchattacks).items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base and key not in REFUSED
    }
    target = library_class("torchattack", "torchattacks", classes, name)
    return knob_class(_Torchattack, "torchattack", target, DEFAULTS)
