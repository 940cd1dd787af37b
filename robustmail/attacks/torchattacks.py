"""torchattacks' classes as attacks of a recipe."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustmail.attacks.library import build_attack, knob_class, library_class
from robustmail.attacks.per_image_noise import own_noise
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.errors import AttackError, PluginError
from robustmail.fields import check_types, field_values
from robustmail.norms import check_budget, check_counts, norm_of
from robustmail.step import Adversarial

__all__ = ["torchattack"]

# None means: decided at the call. torchattacks' defaults start every batch from the same noise, and assume 10 classes.
DECIDED_LATER = {"seed": None, "n_classes": None}
MISLEADING = {
    "AutoAttack": "runs 10 iterations where AutoAttack has 100, so its name is not earned. Use AutoAttack(eps=8/255)",
    "MultiAttack": "takes attacks that are bound to a model. List several names in `evaluate` instead",
}


def torchattack(name: str, /, **knobs: Any) -> Any:
    """The attack `name` of torchattacks with its own knobs: torchattack("TPGD", eps=8/255, alpha=2/255, steps=10).

    Returns a frozen value, called as (model, x, y) -> Adversarial. Its fields are torchattacks' parameters with
    torchattacks' defaults, except that `seed=None` draws one from the global generator at each call and
    `n_classes=None` asks the model (ten at most, as AutoAttack's reference code).
    The model is lent through `model_view`: eval mode unless told otherwise, no mark left on it or on the generators.
    Raises PluginError for an unknown name, RecipeError for a knob that does not exist or fit, AttackError for images
    outside [0, 1] or a result outside the ball, NonFiniteError for NaN logits.
    """
    if name in MISLEADING:
        raise PluginError(f"torchattack({name!r})", *MISLEADING[name].split(". "))
    return build_attack(_knob_class(name), knobs)


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
            attack = own_noise(_mended(self._target(view, **self._knobs(who, view, x))))
            found = attack(x.detach().contiguous(), y.long())  # FAB wants plain strides
            return Adversarial(check_result(who, view, x, found, getattr(self, "eps", None), norm_of(self)))

    def _knobs(self, who: str, view: ModelView, x: Tensor) -> dict[str, Any]:
        knobs = field_values(self)
        if "seed" in knobs and knobs["seed"] is None:
            knobs["seed"] = int(torch.randint(2**31 - 1, ()))
        if "n_classes" in knobs:
            with torch.no_grad():
                classes = view(x[:2]).shape[1]
            if self.__given__[0] == "APGDT" and classes < 4:
                raise AttackError(who, f"the targeted DLR loss needs 4 classes, the model has {classes}")
            knobs["n_classes"] = min(knobs["n_classes"] or 10, classes)
        return knobs


def _mended(attack: Any) -> Any:
    """torchattacks' APGD-T, run by its APGD on the targeted loss: the same but for two faults of the former, which in
    l2 steps by the first image's length for all, and keeps a graph of the clean images alive."""
    import torchattacks

    if isinstance(attack, torchattacks.APGDT):

        def run(x: Tensor, y: Tensor) -> Any:
            with torch.no_grad():
                target = attack.get_logits(x).sort(dim=1)[1][:, -attack.target_class]
            attack.loss = "dlr"
            attack.dlr_loss = lambda logits, y: attack.dlr_loss_targeted(logits, y, target)
            return torchattacks.APGD.attack_single_run(attack, x, y)

        attack.attack_single_run = run
    return attack


@functools.cache
def _knob_class(name: str) -> type:
    import torchattacks

    classes = {
        n: c
        for n, c in vars(torchattacks).items()
        if inspect.isclass(c) and issubclass(c, torchattacks.attack.Attack) and n not in ("Attack", *MISLEADING)
    }
    target = library_class("torchattack", "torchattacks", classes, name)
    return knob_class(_Torchattack, "torchattack", target, DECIDED_LATER)
