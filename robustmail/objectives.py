"""What is minimised: step -> per-example losses, split into the part that weights act on and the rest.

Each also says its loss as a formula, for `robustmail show`; a plugin may, and need not.
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
        return Terms(weighted=ce(step.logits_adv, step.y))


@dataclass(frozen=True, kw_only=True)
class TRADES:
    """TRADES: plain = CE(x), weighted = beta * KL(p(x) || p(x')) (Zhang et al. 2019; MAIL-TRADES: Eq. 10).

    The gradient flows through both arguments. beta: 5 in MAIL, 6 in TRADES' own script.
    weigh: what weights act on: "kl" as in MAIL; "nat", the cross-entropy, as in GAIRAT's removed script; or "both".
    reverse: KL(p(x') || p(x)), as MAIL's Eq. 10 prints it and no code has it.
    natural_passes: TRADES' own script runs the natural images through twice: the same loss and gradient, one more
    update of BatchNorm's statistics.
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
        """(weighted, plain), for people."""
        divergence = f"{self.beta:g} KL({'adv || nat' if self.reverse else 'nat || adv'})"
        return {
            "kl": (divergence, "CE(nat)"), "nat": ("CE(nat)", divergence), "both": (f"(CE(nat) + {divergence})", ""),
        }[self.weigh]  # fmt: skip

    def __call__(self, step: Step) -> Terms:
        natural = step.logits_nat  # first: the order of the forwards is the order of BatchNorm's updates
        adversarial = step.logits_adv
        natural_kl = natural if self.natural_passes == 1 else step.again().logits_nat
        pair = (adversarial, natural_kl) if self.reverse else (natural_kl, adversarial)
        entropy, divergence = ce(natural, step.y), self.beta * kl(*pair)
        if self.weigh == "both":
            return Terms(weighted=entropy + divergence)
        return Terms(divergence, entropy) if self.weigh == "kl" else Terms(entropy, divergence)


@dataclass(frozen=True, kw_only=True)
class MART:
    """MART: weighted = BCE(x'), plain = beta * KL(p(x) || p(x')) * (1 - p_y(x)) (Wang et al. 2020).

    BCE = -log p'_y - log(1.0001 - max_{k != y} p'_k); the small constants are those of the authors' code. MAIL-MART
    weights the BCE alone. beta: 5 for ResNet-18 and 6 for WRN in MART's scripts; 6 in the MAIL paper.
    """

    beta: float = 5.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta)

    @property
    def formula(self) -> tuple[str, str]:
        """(weighted, plain), for people."""
        return "BCE(adv)", f"{self.beta:g} KL(nat || adv) (1 - p_y(nat))"

    def __call__(self, step: Step) -> Terms:
        p, p_adv, y = step.probs_nat, step.probs_adv, step.y
        p_y, p_adv_y = true_class(p, y), true_class(p_adv, y)
        rival = p_adv_y - gap(p_adv, y)
        bce = ce(step.logits_adv, y) - torch.log(1.0001 - rival + 1e-12)
        log_p = step.logits_nat.to(p.dtype).log_softmax(1)
        divergence = (p * (log_p - torch.log(p_adv + 1e-12))).sum(1)
        return Terms(weighted=bce, plain=self.beta * divergence * (1.0000001 - p_y))
