"""Optimisers as values of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from robustmail.errors import RecipeError
from robustmail.fields import check_range, check_types

__all__ = ["SGD", "Optimizer"]


@runtime_checkable
class Optimizer(Protocol):
    """parameters -> a torch optimiser. Each step sets the torch optimiser's options from this value's fields."""

    @property
    def lr(self) -> float: ...

    def __call__(self, parameters: Iterable[torch.nn.Parameter], /) -> torch.optim.Optimizer: ...


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum and weight decay: torch.optim.SGD.

    lr: learning rate, at least 0.
    momentum: at least 0.
    weight_decay: at least 0; acts on every parameter, BatchNorm and biases included, as in the code of MAIL and of the
        methods that it builds on.
    nesterov: use Nesterov's momentum.

    Raises RecipeError for a field of the wrong type or range, or nesterov=True without momentum.
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 3.5e-3
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.nesterov and self.momentum == 0:
            raise RecipeError("SGD (given nesterov=True, momentum=0)", "Nesterov's momentum with momentum=0")

    def __call__(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=all(p.is_cuda for p in parameters) or None,  # one kernel for all parameters
        )
