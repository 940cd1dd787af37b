"""Adapter for the Adversarial Robustness Toolbox: its evasion attacks as attacks of a recipe; slow, but independent."""

from __future__ import annotations

import functools
import inspect
import logging.config
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robustmail.attacks.library import build_value, knob_class, library_class
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.errors import AttackError
from robustmail.fields import check_types, field_values
from robustmail.norms import check_budget, check_counts, norm_of
from robustmail.step import Adversarial

__all__ = ["art"]

DEFAULTS = {"verbose": False, "batch_size": None}
"""What differs from ART's defaults: no progress bar, and the whole batch at once instead of 32 images at a time."""


def art(name: str, /, **knobs: Any) -> Any:
    """The evasion attack `name` of ART with its own knobs: art("AutoProjectedGradientDescent", eps=8/255).

    Returns a frozen value, called as (model, x, y) -> Adversarial. Its fields are ART's parameters with ART's
    defaults, except `verbose=False` and `batch_size=None`, which is the whole batch. Many of ART's defaults are weak
    or made for other data (PGD: eps 0.3, no random start); `robustmail show` prints them.
    The model is protected as by `torchattack`, and the same errors are raised.
    """
    return build_value(_knob_class(name), knobs)


@dataclass(frozen=True)
class _Art:
    _target: ClassVar[Any]
    __label__: ClassVar[str]
    __given__: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        check_types(self)
        lengths = {name: getattr(self, name, None) for name in ("eps", "eps_step")}
        who = f"art({self.__given__[0]!r})"
        check_budget(who, norm_of(self), **lengths)
        check_counts(who, max_iter=getattr(self, "max_iter", 1))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        who = f"art({self.__given__[0]!r})"
        check_images(who, x)
        with model_view(model) as view:
            knobs = field_values(self)
            if "batch_size" in knobs:
                knobs["batch_size"] = knobs["batch_size"] or len(x)
            # ART moves the model to the current CUDA device, so that must be the device of x.
            with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
                x_adv = self._generate(who, view, x, y, knobs)
            return Adversarial(check_result(who, view, x, x_adv, getattr(self, "eps", None), norm_of(self)))

    def _generate(self, who: str, view: ModelView, x: Tensor, y: Tensor, knobs: dict[str, Any]) -> Tensor:
        try:
            attack = self._target(_classifier(view, x), **knobs)
            x_adv = attack.generate(x.detach().cpu().numpy(), y=y.cpu().numpy())
        except (ValueError, TypeError, NotImplementedError) as error:  # what ART raises for a wrong knob
            raise AttackError(who, f"refused by ART: {error}") from error
        return torch.from_numpy(x_adv).to(x)


def _classifier(view: nn.Module, x: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        classes = view(x[:2]).shape[1]  # type: ignore[operator]
    return PyTorchClassifier(
        model=view,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=(np.float32(0), np.float32(1)),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )


@functools.cache
def _knob_class(name: str) -> type:
    classes = {key: value for key, value in vars(import_evasion()).items() if inspect.isclass(value)}
    target = library_class("art", "ART", classes, name)
    parameters = inspect.signature(target).parameters
    return knob_class(_Art, "art", target, {key: value for key, value in DEFAULTS.items() if key in parameters})


def import_evasion() -> Any:
    """Import art.attacks.evasion without letting ART configure logging, which would close open log files."""
    configure = logging.config.dictConfig
    logging.config.dictConfig = lambda config: None
    try:
        import art.attacks.evasion
    finally:
        logging.config.dictConfig = configure
    return art.attacks.evasion
