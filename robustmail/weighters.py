"""Weights from margins: [B] -> [B], not negative, falling as the margin grows.

Each weighter has a u(margin). With normalize=True, w_i = B u_i / sum_j u_j has mean one over the batch; it is computed
as a softmax of log u, which stays finite where every u_i underflows. With normalize=False, w = scale * u, as several
codes have it: then the weights also say how large the loss is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from robustmail.errors import RecipeError
from robustmail.fields import check_range, check_types, describe, formula_of
from robustmail.functional import precise
from robustmail.step import Weighter, counted_steps, means_one

__all__ = ["Affine", "Discrete", "Exp", "Lowest", "MeanOf", "Sigmoid", "Softmax", "Softplus", "Tanh"]


@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """MAIL's weight: u = sigmoid(-slope * (margin - bias)) (Eq. 8), of mean one over the batch (Algorithm 1).

    slope: how sharply the weight falls with the margin, at least 0; with 0 every weight is equal.
    bias: the margin at which u = 1/2.
    normalize: mean one over the batch, as in the paper; False as in the authors' code.
    scale: factor of u without normalize, at least 0; 3 in the authors' code.

    On `lps` with K = 10, Sigmoid(slope=1, bias=lam + 5) is GAIRAT's "Sigmoid" variant.
    Raises RecipeError for a field of the wrong type or range.
    """

    slope: float
    bias: float
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, slope=self.slope)
        check_range(self, low=-math.inf, bias=self.bias)

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        shift = f" {'-' if self.bias > 0 else '+'} {abs(self.bias):g}" if self.bias else ""
        argument = f"({{m}}{shift})" if shift else "{m}"
        return _formula(self, f"sigmoid(-{self.slope:g} {argument})")

    def __call__(self, margin: Tensor) -> Tensor:
        return _weights(self, logsigmoid(-self.slope * (precise(margin) - self.bias)))


@dataclass(frozen=True, kw_only=True)
class Tanh:
    """GAIRAT's weight: u = (1 + tanh(lam + 5 (1 - 2 kappa / K))) / 2, of mean one over the batch.

    lam: -1 in GAIRAT; infinity gives every example the weight one.
    steps: K, the steps of the attack whose `kappa` is the margin; at least 1.
    normalize: mean one over the batch.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    lam: float = -1.0
    steps: int = 10
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_range(self, low=1, steps=self.steps)

    @property
    def counted_steps(self) -> int:
        """K: the largest margin."""
        return self.steps

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, f"(1 + tanh({self.lam:g} + 5 (1 - 2 {{m}} / {self.steps}))) / 2")

    def __call__(self, margin: Tensor) -> Tensor:
        argument = self.lam + 5 * (1 - 2 * precise(margin) / self.steps)
        return _weights(self, logsigmoid(2 * argument))  # (1 + tanh a) / 2 = sigmoid(2a)


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """GAIRAT's "Discrete" weight: u = (K + 1 - kappa) / (K + 1), of mean one over the batch.

    steps: K, the steps of the attack whose `kappa` is the margin; at least 1.
    normalize: mean one over the batch.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    steps: int = 10
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        check_range(self, low=1, steps=self.steps)

    @property
    def counted_steps(self) -> int:
        """K: the largest margin."""
        return self.steps

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, f"({self.steps + 1} - {{m}}) / {self.steps + 1}")

    def __call__(self, margin: Tensor) -> Tensor:
        log_u = torch.log(self.steps + 1 - precise(margin))
        return _weights(self, log_u if self.normalize else log_u - math.log(self.steps + 1))


@dataclass(frozen=True, kw_only=True)
class Exp:
    """WMMR's weight: u = exp(-alpha * margin) (Zeng et al. 2021, on `pm_adv`).

    alpha: at least 0; 0.5 for AT and 2 for TRADES in the authors' code on CIFAR-10.
    normalize: mean one over the batch; False as in the authors' code.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    alpha: float
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, alpha=self.alpha)

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, f"exp(-{self.alpha:g} {{m}})")

    def __call__(self, margin: Tensor) -> Tensor:
        return _weights(self, -self.alpha * precise(margin))


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A line: u = max(0, bias - alpha * margin). VIR's weight on `vulnerability`, EWAT's on `entropy`.

    alpha: at least 0; 7 (AT) and 8 (TRADES) in VIR's code.
    bias: 0.007 (AT) and 1.7 (TRADES) in VIR's code; 0 for weights proportional to the entropy.
    normalize: mean one over the batch, every weight one where every u is 0; False as in VIR's code.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    alpha: float
    bias: float = 0.0
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, alpha=self.alpha)
        check_range(self, low=-math.inf, bias=self.bias)

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, f"max(0, {self.bias:g} - {self.alpha:g} {{m}})")

    def __call__(self, margin: Tensor) -> Tensor:
        return _weights(self, (self.bias - self.alpha * precise(margin)).clamp(min=0).log())


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """The softmax over the batch: u = exp(-margin / temperature) / sum_j exp(-margin_j / temperature).

    On `loss_adv` it is the worst mixture of the batch in a KL ball, KL-regularised DRO (DONE; Sow et al. 2024, from its
    abstract).

    temperature: more than 0; the larger, the more alike the weights.
    normalize: mean one over the batch; False leaves them with the sum one.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    temperature: float
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, temperature=self.temperature)
        if self.temperature == 0:  # a schedule is checked when it is resolved
            raise RecipeError("Softmax (given temperature=0)", "temperature must be more than 0")

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, f"softmax(-{{m}} / {self.temperature:g}) over the batch")

    def __call__(self, margin: Tensor) -> Tensor:
        return _weights(self, (-precise(margin) / self.temperature).log_softmax(0))


@dataclass(frozen=True, kw_only=True)
class Softplus:
    """WEAT's weight: u = 1 / log(1 + exp(margin)) (Mirza et al. 2024, on `energy`).

    normalize: mean one over the batch; False as in the authors' code.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, "1 / log(1 + exp({m}))")

    def __call__(self, margin: Tensor) -> Tensor:
        return _weights(self, -softplus(precise(margin)).log())


@dataclass(frozen=True, kw_only=True)
class Lowest:
    """SOVR's choice: u = 1 for the share of the batch that has the lowest margins, else 0 (Kanai et al. 2022).

    Examples that tie with the last one chosen are chosen too.

    share: of the batch, in (0, 1]; at least one example is chosen.
    normalize: mean one over the batch, so that the chosen ones weigh about 1 / share; False as in the paper.
    scale: factor of u without normalize, at least 0.

    Raises RecipeError for a field of the wrong type or range.
    """

    share: float
    normalize: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self, share=self.share)
        if isinstance(self.share, (int, float)) and not 0 < self.share <= 1:
            raise RecipeError(f"Lowest (given share={self.share:g})", "share must lie in (0, 1]", "Write share=0.4.")

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return _formula(self, f"1 for the lowest {100 * self.share:g} % of {{m}}, else 0")

    def __call__(self, margin: Tensor) -> Tensor:
        values = precise(margin)
        last = values.kthvalue(max(1, round(self.share * len(values)))).values
        return _weights(self, (values <= last).to(values.dtype).log())


@dataclass(frozen=True, kw_only=True)
class MeanOf:
    """The same weight for every example: the mean over the batch of another weighter's weights. Ours.

    Weights that are not normalised change two things: which examples count, and how large the loss is. With
    normalize=True only the first remains; with `MeanOf` only the second. So it is the control of equal loss size.

    weighter: one with normalize=False.

    Raises RecipeError for a weighter of mean one, of which nothing would be left.
    """

    weighter: Weighter
    normalize: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        if means_one(self.weighter):
            given = f"MeanOf (given {describe(self.weighter)})"
            raise RecipeError(given, "weights of mean one leave every weight 1", "Give that weighter normalize=False.")

    @property
    def counted_steps(self) -> int | None:
        """K, the largest margin, where the other weighter counts steps."""
        return counted_steps(self.weighter)

    @property
    def formula(self) -> str:
        """The weight as text; the placeholder {m} stands for the margin."""
        return f"mean(u), u = {formula_of(self.weighter, str, describe(self.weighter) + ' of {m}')}"

    def __call__(self, margin: Tensor) -> Tensor:
        return self.weighter(margin).mean().expand(len(margin))


def _check(weighter: Any, **not_negative: float) -> None:
    """Check the types, `scale`, and the fields that must not be negative; raises RecipeError."""
    check_types(weighter)
    check_range(weighter, scale=weighter.scale, **not_negative)
    if weighter.normalize is True and isinstance(weighter.scale, (int, float)) and weighter.scale != 1:
        given = f"{type(weighter).__name__} (given scale={weighter.scale:g})"
        raise RecipeError(given, "scale does nothing to weights of mean one", "Add normalize=False.")


def _weights(weighter: Any, log_u: Tensor) -> Tensor:
    """Weights from log u, [B]: of mean one, or scale * u. Where every u is 0, those of mean one are 1."""
    if not weighter.normalize:
        return log_u.exp() if weighter.scale == 1 else weighter.scale * log_u.exp()
    return log_u.where(log_u.isneginf().all().logical_not(), 0.0).softmax(0) * len(log_u)


def _formula(weighter: Any, u: str) -> str:
    """The formula of the weights, from the text of u."""
    if weighter.normalize:
        return f"u / mean(u), u = {u}"
    return u if weighter.scale == 1 else f"{weighter.scale:g} {u}"
