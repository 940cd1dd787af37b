"""Weights from margins: [B] -> [B], not negative, falling as the margin grows.

Normalisation is a softmax of log u: w_i = B u_i / sum_j u_j has mean one over the batch, also over a short last batch,
and stays finite where every u_i underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from robustmail.fields import check_range, check_types
from robustmail.functional import precise

__all__ = ["Discrete", "Sigmoid", "Tanh"]


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """MAIL's weight: u = sigmoid(-slope * (margin - bias)) (Eq. 8), then mean one over the batch (Algorithm 1).

    slope: how sharply the weight falls with the margin, at least 0; with 0 every weight is equal.
    bias: the margin at which u = 1/2.
    scale: None normalises to mean one, as in the paper; a number multiplies u instead, 3.0 in the authors' code.

    On `lps` with K = 10, Sigmoid(slope=1, bias=lam + 5) is GAIRAT's "Sigmoid" variant.
    Raises RecipeError for a field of the wrong type or range.
    """

    slope: float
    bias: float
    scale: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, slope=self.slope, scale=self.scale)
        check_range(self, low=-math.inf, bias=self.bias)

    @property
    def mean_one(self) -> bool:
        """Is it normalised?"""
        return self.scale is None

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        shift = f" {'-' if self.bias > 0 else '+'} {abs(self.bias):g}" if self.bias else ""
        u = f"sigmoid(-{self.slope:g} ({{m}}{shift}))" if shift else f"sigmoid(-{self.slope:g} {{m}})"
        return f"u / mean(u), u = {u}" if self.scale is None else f"{self.scale:g} {u}"

    def __call__(self, margin: Tensor) -> Tensor:
        log_u = logsigmoid(-self.slope * (precise(margin) - self.bias))
        return _mean_one(log_u) if self.scale is None else self.scale * log_u.exp()


@dataclass(frozen=True, kw_only=True)
class Tanh:
    """GAIRAT's weight: u = (1 + tanh(lam + 5 (1 - 2 kappa / K))) / 2, then mean one over the batch.

    lam: -1 in GAIRAT; infinity gives every example the weight one. steps: K, the steps of the attack whose `kappa`
    is the margin; at least 1. Raises RecipeError for a field of the wrong type or range.
    """

    lam: float = -1.0
    steps: int = 10

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, low=1, steps=self.steps)

    @property
    def counted_steps(self) -> int:
        """K: the largest margin."""
        return self.steps

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return f"u / mean(u), u = (1 + tanh({self.lam:g} + 5 (1 - 2 {{m}} / {self.steps}))) / 2"

    def __call__(self, margin: Tensor) -> Tensor:
        argument = self.lam + 5 * (1 - 2 * precise(margin) / self.steps)
        return _mean_one(logsigmoid(2 * argument))  # (1 + tanh a) / 2 = sigmoid(2a)


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """GAIRAT's "Discrete" weight: u = (K + 1 - kappa) / (K + 1), then mean one over the batch.

    steps: K, the steps of the attack whose `kappa` is the margin; at least 1. Raises RecipeError for less.
    """

    steps: int = 10

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, low=1, steps=self.steps)

    @property
    def counted_steps(self) -> int:
        """K: the largest margin."""
        return self.steps

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return f"u / mean(u), u = ({self.steps + 1} - {{m}}) / {self.steps + 1}"

    def __call__(self, margin: Tensor) -> Tensor:
        return _mean_one(torch.log(self.steps + 1 - precise(margin)))


def _mean_one(log_u: Tensor) -> Tensor:
    return log_u.softmax(0) * len(log_u)
