"""What is minimised: step -> per-example losses, split into the term that weights multiply and the rest.

Cross-entropies take the step's soft labels where it has them (`Step.labels`).

`formula` is the loss as text for `robustmail show`; a plugin may leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from robustmail.fields import check_range, check_types
from robustmail.functional import ce, gap, kl, true_class
from robustmail.step import Step, Terms

__all__ = ["AT", "MART", "TRADES"]


@dataclass(frozen=True, kw_only=True)
class AT:
    """Adversarial training: weighted = CE(x') (Madry et al. 2018; MAIL-AT: Eq. 9)."""

    formula = ("CE(adv)", "")

    def __call__(self, step: Step) -> Terms:
        return Terms(weighted=ce(step.logits_adv, step.labels))


@dataclass(frozen=True, kw_only=True)
class TRADES:
    """TRADES: plain = CE(x), weighted = beta * KL(p(x) || p(x')) (Zhang et al. 2019; MAIL-TRADES: Eq. 10).

    The gradient flows through both arguments of KL.

    beta: factor of KL, at least 0; 5 in MAIL, 6 in TRADES' own script.
    weigh: the term that weights multiply: "kl" as in MAIL; "nat", the cross-entropy, as in GAIRAT's removed script; or
        "both".
    reverse: use KL(p(x') || p(x)), as MAIL prints it in Eq. 10; no published code does.
    natural_passes: forward passes of the natural images. TRADES' own script has 2: the same loss and gradient, but
        BatchNorm's statistics are updated once more.

    Raises RecipeError for a field of the wrong type or range.
    """

    beta: float = 5.0
    weigh: Literal["kl", "nat", "both"] = "kl"
    reverse: bool = False
    natural_passes: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta)

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        divergence = f"{self.beta:g} KL({'adv || nat' if self.reverse else 'nat || adv'})"
        if self.weigh == "both":
            return f"(CE(nat) + {divergence})", ""
        return (divergence, "CE(nat)") if self.weigh == "kl" else ("CE(nat)", divergence)

    def __call__(self, step: Step) -> Terms:
        nat = step.logits_nat  # first: the order of the forward passes is the order of BatchNorm's updates
        adv = step.logits_adv
        nat_kl = nat if self.natural_passes == 1 else step.again().logits_nat
        entropy = ce(nat, step.labels)
        divergence = self.beta * (kl(adv, nat_kl) if self.reverse else kl(nat_kl, adv))
        if self.weigh == "both":
            return Terms(weighted=entropy + divergence)
        if self.weigh == "kl":
            return Terms(weighted=divergence, plain=entropy)
        return Terms(weighted=entropy, plain=divergence)


@dataclass(frozen=True, kw_only=True)
class MART:
    """MART: weighted = BCE(x'), plain = beta * KL(p(x) || p(x')) * (1 - p_y(x)) (Wang et al. 2020).

    BCE = -log p'_y - log(1.0001 - max_{k != y} p'_k); the small constants are those of the authors' code. MAIL-MART
    weights the BCE alone. Soft labels act in the first term alone, which becomes -sum_k t_k log p'_k; other parts go
    by the class y. beta: at least 0; 5 for ResNet-18 and 6 for WRN in MART's scripts, 6 in the MAIL paper.
    Raises RecipeError for a field of the wrong type or range.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta)

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        return "BCE(adv)", f"{self.beta:g} KL(nat || adv) (1 - p_y(nat))"

    def __call__(self, step: Step) -> Terms:
        p, p_adv, y = step.probs_nat, step.probs_adv, step.y
        p_y, p_adv_y = true_class(p, y), true_class(p_adv, y)
        rival = p_adv_y - gap(p_adv, y)
        bce = ce(step.logits_adv, step.labels) - torch.log(1.0001 - rival + 1e-12)
        log_p = step.logits_nat.to(p.dtype).log_softmax(1)
        divergence = (p * (log_p - torch.log(p_adv + 1e-12))).sum(1)
        return Terms(weighted=bce, plain=self.beta * divergence * (1.0000001 - p_y))
