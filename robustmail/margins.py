"""How far each example is from being misclassified: step -> [B], low = needs help.

A margin gets a detached step, so it changes neither a gradient nor a BatchNorm statistic.
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


def lps(step: Step) -> Tensor:
    """Least number of attack steps until the prediction is wrong, 0 ... K; K if it never is (the paper's LPS).

    Raises PluginError if the attack kept no trace.
    """
    return _trace(step, "lps").first_wrong.float()


def kappa(step: Step) -> Tensor:
    """Number of iterates 0 ... K-1 that are classified correctly, 0 ... K: LPS as GAIRAT's code counts it.

    It equals `lps` unless an example is misclassified at one iterate and correct again at a later one.
    Raises PluginError if the attack kept no trace.
    """
    return _trace(step, "kappa").correct.float().sum(0)


def _trace(step: Step, margin: str) -> Trace:
    if step.trace is None:
        todo = "Use attack=PGD(...), which keeps one; for TRADES with loss='kl', start='gaussian'."
        raise PluginError(margin, "the attack kept no trace of its steps", todo)
    return step.trace
