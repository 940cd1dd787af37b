"""What is minimised: step -> per-example losses, split into the part that weights act on and the rest.

Each also says its loss as a formula, for `robustmail show`; a plugin may, and need not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robustmail.scores import ce, gap, kl, true_class
from robustmail.step import Step, Terms
from robustmail.values import check

__all__ = ["AT", "MART", "TRADES"]


@dataclass(frozen=True, kw_only=True)
class AT:
    """Adversarial training: weighted = CE(x') (Madry et al. 2018; MAIL-AT: Eq. 9)."""

    formula = ("CE(adv)", "")

    def __call__(self, step: Step) -> Terms:
        return Terms(weighted=ce(step.logits_adv, step.y))


@dataclass(frozen=True, kw_only=True)
class TRADES:
    """TRADES: plain = CE(x), weighted = beta * KL(p(x) || p(x')) (Zhang et al. 2019; MAIL-TRADES: Eq. 10).

    The gradient flows through both arguments. Eq. 10 of the MAIL paper prints the KL the other way round; its code,
    and every other, has this direction. beta: 5 in MAIL, 6 in TRADES' own script.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def formula(self) -> tuple[str, str]:
        return f"{self.beta:g} KL(nat || adv)", "CE(nat)"

    def __call__(self, step: Step) -> Terms:
        natural = step.logits_nat  # first: the order of the forwards is the order of BatchNorm's updates
        return Terms(weighted=self.beta * kl(natural, step.logits_adv), plain=ce(natural, step.y))


@dataclass(frozen=True, kw_only=True)
class MART:
    """MART: weighted = BCE(x'), plain = beta * KL(p(x) || p(x')) * (1 - p_y(x)) (Wang et al. 2020).

    BCE = -log p'_y - log(1.0001 - max_{k != y} p'_k); the small constants are those of the authors' code. MAIL-MART
    weights the BCE alone. beta: 5 for ResNet-18 and 6 for WRN in MART's scripts; 6 in the MAIL paper.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def formula(self) -> tuple[str, str]:
        return "BCE(adv)", f"{self.beta:g} KL(nat || adv) (1 - p_y(nat))"

    def __call__(self, step: Step) -> Terms:
        p, p_adv, y = step.probs_nat, step.probs_adv, step.y
        p_y, p_adv_y = true_class(p, y), true_class(p_adv, y)
        rival = p_adv_y - gap(p_adv, y)
        bce = ce(step.logits_adv, y) - torch.log(1.0001 - rival + 1e-12)
        log_p = step.logits_nat.to(p.dtype).log_softmax(1)
        divergence = (p * (log_p - torch.log(p_adv + 1e-12))).sum(1)
        return Terms(weighted=bce, plain=self.beta * divergence * (1.0000001 - p_y))
