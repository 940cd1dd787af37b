"""How far each example is from being misclassified: step -> [B], low = needs help.

A margin gets a detached step, so it changes neither a gradient nor a BatchNorm statistic. It declares its range,
on which weighters are held to their laws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robustmail.errors import PluginError
from robustmail.fields import check_range, check_types
from robustmail.functional import ce, gap, kl, precise, true_class
from robustmail.memory import Memory, per_example
from robustmail.step import Step, Trace, margin_range

__all__ = [
    "energy", "entropy", "kappa", "logit_margin", "loss_adv", "lps", "p_adv", "pm_adv", "pm_dif", "pm_nat",
    "target_confidence", "vulnerability",
]  # fmt: skip


@margin_range(-1, 1)
def pm_adv(step: Step) -> Tensor:
    """Lead of the true class on the adversarial image: p_y(x') - max_{j != y} p_j(x'), in [-1, 1] (Eq. 5)."""
    return gap(step.probs_adv, step.y)


@margin_range(-1, 1)
def pm_nat(step: Step) -> Tensor:
    """Lead of the true class on the natural image: p_y(x) - max_{j != y} p_j(x), in [-1, 1] (Eq. 6)."""
    return gap(step.probs_nat, step.y)


@margin_range(-1, 1)
def pm_dif(step: Step) -> Tensor:
    """Drop of the true class's probability until the attack first succeeds: p_y(x) - p_y(x^(t)), in [-1, 1] (Eq. 7).

    t is the first misclassified iterate, or the last iterate if none is. The paper states the range [0, 1]; the value
    is negative where the attack raised p_y. Raises PluginError if the attack kept no trace.
    """
    trace = _trace(step, "pm_dif")
    t = trace.first_wrong
    last = precise(true_class(step.probs_adv, step.y))
    p_path = trace.p_true.to(last.dtype)
    is_broken = t < len(p_path)
    at_t = p_path.gather(0, t.clamp(max=len(p_path) - 1)[None]).squeeze(0)
    return true_class(step.probs_nat, step.y) - at_t.where(is_broken, last)


@margin_range(0, math.inf)
def lps(step: Step) -> Tensor:
    """Least number of attack steps until the prediction is wrong, 0 ... K; K if it never is (the paper's LPS).

    Raises PluginError if the attack kept no trace.
    """
    return _trace(step, "lps").first_wrong.float()


@margin_range(0, math.inf)
def kappa(step: Step) -> Tensor:
    """Number of iterates 0 ... K-1 that are classified correctly, 0 ... K: LPS as GAIRAT's code counts it.

    It equals `lps` unless an example is misclassified at one iterate and correct again at a later one.
    Raises PluginError if the attack kept no trace.
    """
    return _trace(step, "kappa").correct.float().sum(0)


@margin_range(-math.inf, math.inf)
def logit_margin(step: Step) -> Tensor:
    """Lead of the true class in the logits of the adversarial image: z_y(x') - max_{j != y} z_j(x') (SOVR).

    It has the sign of `pm_adv`, but does not saturate. Kanai et al. 2022.
    """
    return gap(precise(step.logits_adv), step.y)


@margin_range(0, 1)
def p_adv(step: Step) -> Tensor:
    """Probability of the true class on the adversarial image: p_y(x'), in [0, 1] (ARoW; Yang et al. 2023)."""
    return true_class(step.probs_adv, step.y)


@margin_range(-math.inf, 0)
def entropy(step: Step) -> Tensor:
    """Minus the entropy of the prediction on the adversarial image: sum_k p_k(x') log p_k(x'), in [-log classes, 0].

    An uncertain prediction is a low margin, whether it is right or wrong (EWAT; Kim et al. 2021, from its abstract).
    """
    p = step.probs_adv
    return (p * step.logits_adv.to(p.dtype).log_softmax(1)).sum(1)


@margin_range(-math.inf, 0)
def loss_adv(step: Step) -> Tensor:
    """Minus the cross-entropy of the adversarial image: log p_y(x'), at most 0 (KL-DRO, DONE; Sow et al. 2024)."""
    return -ce(step.logits_adv, step.y)


@margin_range(0, math.inf)
def energy(step: Step) -> Tensor:
    """Size of the energy of the natural image: |E(x)| with E(x) = -log sum_k exp z_k(x), at least 0 (WEAT).

    It needs no label. Mirza et al. 2024.
    """
    return precise(step.logits_nat).logsumexp(1).abs()


@dataclass(frozen=True)
class target_confidence:
    """Confidence of the remembered targets, with the sign turned: -max_k t_k, in [-1, 0] (Huang et al. 2020).

    The weights of `SelfAdaptive`, which remembers the targets, known in training alone. decay: that of the objective.
    Raises RecipeError for a field of the wrong type or range.
    """

    range: ClassVar[tuple[float, float]] = (-1.0, 0.0)
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, decay=self.decay)

    @property
    def memory(self) -> dict[str, Memory]:
        """The targets of each example."""
        return {"targets": per_example("classes", start="label", decay=self.decay)}

    def __call__(self, step: Step) -> Tensor:
        return -step.memory["targets"].amax(1)


@dataclass(frozen=True)
class vulnerability:
    """How much the attack changes an unsure prediction: -exp(-gamma p_y(x)) KL(p(x) || p(x')), at most 0 (VIR).

    Fakorede et al. 2023, as in the authors' code. gamma: at least 0; 10 for AT and 3 for TRADES in the authors' code.
    Raises RecipeError for a field of the wrong type or range.
    """

    range: ClassVar[tuple[float, float]] = (-math.inf, 0.0)
    gamma: float = 10.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, gamma=self.gamma)

    def __call__(self, step: Step) -> Tensor:
        sure = true_class(step.probs_nat, step.y)
        return -(-self.gamma * sure).exp() * kl(step.logits_nat, step.logits_adv)


def _trace(step: Step, margin: str) -> Trace:
    if step.trace is None:
        todo = "Use attack=PGD(...), which keeps one; for TRADES with loss='kl', start='gaussian'."
        raise PluginError(margin, "the attack kept no trace of its steps", todo)
    return step.trace
