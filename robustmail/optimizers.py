"""Optimisers as values of a recipe."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from robustmail.attacks.library import build_value, knob_class
from robustmail.errors import PluginError, RecipeError, did_you_mean
from robustmail.fields import check_range, check_types, field_values

__all__ = ["SGD", "Optimizer", "torch_optimizer"]

NO_CLOSURE = ("computes the loss several times a step, which a training step does not", "Use AdamW or SGD.")
REFUSED = {
    "LBFGS": NO_CLOSURE,
    "SparseAdam": ("is for sparse gradients, which no loss here has", "Use Adam."),
    "Adahessian": ("needs second derivatives of the loss", "Use AdamW."),
    "Lookahead": ("wraps another optimiser", "Name that one."),
}
"""Classes that are not offered: name -> (what is wrong, what to do)."""

FUSED = ("SGD", "Adam", "AdamW")
"""torch's optimisers that update all parameters in one kernel on a GPU, and skip the update there if told so."""


@runtime_checkable
class Optimizer(Protocol):
    """parameters -> a torch optimiser. Each step sets the torch optimiser's options from this value's fields."""

    @property
    def lr(self) -> float: ...

    def __call__(self, parameters: Iterable[nn.Parameter], /) -> torch.optim.Optimizer: ...


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum and weight decay: torch.optim.SGD.

    lr: learning rate, at least 0.
    momentum: at least 0.
    weight_decay: at least 0; acts on every parameter, BatchNorm and biases included, as in the code of MAIL and of the
        methods that it builds on.
    nesterov: use Nesterov's momentum.
    decay_norms: False leaves parameters of at most one dimension, which are norms and biases, without weight decay.

    Raises RecipeError for a field of the wrong type or range, or nesterov=True without momentum.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 3.5e-3
    nesterov: bool = False
    decay_norms: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise RecipeError("SGD (given nesterov=True, momentum=0)", "Nesterov's momentum with momentum=0")

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.SGD(
            _groups(parameters, self.decay_norms),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=all(p.is_cuda for p in parameters) or None,  # one kernel for all parameters
        )


def torch_optimizer(name: str, /, **knobs: Any) -> Any:
    """The optimiser `name` of torch.optim or timm.optim: torch_optimizer("AdamW", lr=1e-3, decay_norms=False).

    Returns a frozen value, called as parameters -> torch.optim.Optimizer. Its fields are the optimiser's parameters
    with its own defaults, and `decay_norms`, True by default: False leaves parameters of at most one dimension, which
    are norms and biases, without weight decay. Where both libraries have a name, it is torch's; but `Muon` is timm's,
    for torch's takes matrices alone.
    Raises PluginError for an unknown name, or an optimiser that needs more than a gradient; RecipeError for a knob that
    does not exist or has a wrong value, and for one without a learning rate.
    """
    if name in REFUSED:
        raise PluginError(f"torch_optimizer({name!r})", *REFUSED[name])
    return build_value(_knob_class(name), knobs)


@dataclass(frozen=True, kw_only=True)
class _TorchOptimizer:
    _target: ClassVar[Any]
    __label__: ClassVar[str]
    __given__: ClassVar[tuple[str, ...]]

    decay_norms: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        knobs, who = field_values(self), f"torch_optimizer({self.__given__[0]!r})"
        if knobs["lr"] is None:
            raise RecipeError(who, "no learning rate", "Add lr=1e-3.")
        check_range(self, lr=knobs["lr"], weight_decay=knobs.get("weight_decay"))
        if not self.decay_norms and "weight_decay" not in knobs:
            raise RecipeError(f"{who} (given decay_norms=False)", "it has no weight decay", "Leave decay_norms out.")

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters, knobs = list(parameters), field_values(self)
        groups = _groups(parameters, knobs.pop("decay_norms"))
        if self.__given__[0] in FUSED and knobs["fused"] is None and not knobs["foreach"]:
            knobs["fused"] = all(p.is_cuda for p in parameters) or None
        optimizer: torch.optim.Optimizer = self._target(groups, **knobs)
        return optimizer


def _groups(parameters: list[nn.Parameter], decay_norms: bool) -> list[Any]:
    """The parameters; or, without decay of norms, two groups, the second of at most one dimension and not decayed."""
    if decay_norms:
        return parameters
    decayed, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return [group for group in ({"params": decayed}, {"params": others, "weight_decay": 0.0}) if group["params"]]


@functools.cache
def _knob_class(name: str) -> type:
    import timm.optim

    classes = {**_optimizers_of(timm.optim), **_optimizers_of(torch.optim)}
    classes["Muon"] = vars(timm.optim).get("Muon", classes.get("Muon"))
    if name not in classes:
        wrong = "no such optimiser in torch.optim and timm.optim"
        raise PluginError(f"torch_optimizer({name!r})", wrong, did_you_mean(str(name), classes))
    target = classes[name]
    has_lr = isinstance(inspect.signature(target).parameters["lr"].default, (int, float))
    return knob_class(_TorchOptimizer, "torch_optimizer", target, {} if has_lr else {"lr": None})


def _optimizers_of(module: ModuleType) -> dict[str, Any]:
    base = torch.optim.Optimizer
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base and name not in REFUSED
    }
