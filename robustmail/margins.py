"""How far each example is from being misclassified: step -> [B], low = needs help.

A margin looks at a detached step: nothing that it does reaches the gradient or a BatchNorm statistic.
"""

from __future__ import annotations

from torch import Tensor

from robustmail.errors import PluginError
from robustmail.functional import gap, precise, true_class
from robustmail.step import Step, Trace

__all__ = ["kappa", "lps", "pm_adv", "pm_dif", "pm_nat"]


def pm_adv(step: Step) -> Tensor:
    """Lead of the true class on the adversarial image: p_y(x') - max_{j != y} p_j(x'), in [-1, 1] (Eq. 5)."""
    return gap(step.probs_adv, step.y)


def pm_nat(step: Step) -> Tensor:
    """Lead of the true class on the natural image: p_y(x) - max_{j != y} p_j(x), in [-1, 1] (Eq. 6)."""
    return gap(step.probs_nat, step.y)


def pm_dif(step: Step) -> Tensor:
    """What the attack took from the true class by its first success: p_y(x) - p_y(x^(t)), in [-1, 1] (Eq. 7).

    t is the first misclassified iterate, or the last where there is none. The paper states the range [0, 1]; it is
    negative where the attack raised p_y. Needs an attack that keeps a trace.
    """
    trace = _trace(step, "pm_dif")
    t = trace.first_wrong
    last = precise(true_class(step.probs_adv, step.y))
    p_path = trace.p_true.to(last.dtype)
    crossed = t < len(p_path)
    at_crossing = p_path.gather(0, t.clamp(max=len(p_path) - 1)[None]).squeeze(0)
    return true_class(step.probs_nat, step.y) - at_crossing.where(crossed, last)


def lps(step: Step) -> Tensor:
    """Least number of attack steps until the prediction is wrong, 0 ... K; K if never (the paper's LPS).

    Needs an attack that keeps a trace.
    """
    return _trace(step, "lps").first_wrong.float()


def kappa(step: Step) -> Tensor:
    """How many of the iterates 0 ... K-1 are classified correctly, 0 ... K: LPS as GAIRAT's code counts it.

    It equals `lps` unless an example is crossed and comes back. Needs an attack that keeps a trace.
    """
    return _trace(step, "kappa").correct.float().sum(0)


def _trace(step: Step, who: str) -> Trace:
    if step.trace is None:
        raise PluginError(
            who, "the attack kept no trace of its steps",
            "Use attack=PGD(...), which keeps one; for TRADES with loss='kl', start='gaussian'.",
        )  # fmt: skip
    return step.trace
