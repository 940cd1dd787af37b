"""What is minimised: step -> per-example losses, split into the term that weights multiply and the rest.

Cross-entropies take the step's soft labels where it has them (`Step.labels`).

`formula` is the loss as text for `robustmail show`; a plugin may leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import softplus

from robustmail.fields import check_range, check_types
from robustmail.functional import ce, gap, kl, precise, true_class
from robustmail.memory import Memory, per_example
from robustmail.step import Step, Terms, logits_of

__all__ = ["AT", "HAT", "MART", "SOVR", "TRADES", "ARoW", "SelfAdaptive"]


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
    anchor: the image of the cross-entropy: "nat", x; or "adv", x', as in WEAT's form of that name.

    Raises RecipeError for a field of the wrong type or range.
    """

    beta: float = 5.0
    weigh: Literal["kl", "nat", "both"] = "kl"
    reverse: bool = False
    natural_passes: Literal[1, 2] = 1
    anchor: Literal["nat", "adv"] = "nat"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta)

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        divergence = f"{self.beta:g} KL({'adv || nat' if self.reverse else 'nat || adv'})"
        entropy = f"CE({self.anchor})"
        if self.weigh == "both":
            return f"({entropy} + {divergence})", ""
        return (divergence, entropy) if self.weigh == "kl" else (entropy, divergence)

    def __call__(self, step: Step) -> Terms:
        nat = step.logits_nat  # first: the order of the forward passes is the order of BatchNorm's updates
        adv = step.logits_adv
        nat_kl = nat if self.natural_passes == 1 else step.again().logits_nat
        entropy = ce(nat if self.anchor == "nat" else adv, step.labels)
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


@dataclass(frozen=True, kw_only=True)
class ARoW:
    """ARoW: plain = CE(x), weighted = beta * KL(p(x) || p(x')) * (1 - p_y(x')) (Yang et al. 2023, as in their code).

    The gradient runs through the factor 1 - p_y(x'), too. The authors learn x with label smoothing 0.2, which is the
    recipe's `label_smoothing`.

    beta: at least 0; the code's `lamb`, twice the paper's lambda: 6 in their script, 7 in their README.
    anti: True for their CoW, whose factor is p_y(x).

    Raises RecipeError for a field of the wrong type or range.
    """

    beta: float = 6.0
    anti: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta)

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        return f"{self.beta:g} KL(nat || adv) {'p_y(nat)' if self.anti else '(1 - p_y(adv))'}", "CE(nat)"

    def __call__(self, step: Step) -> Terms:
        nat, adv, y = step.logits_nat, step.logits_adv, step.y
        factor = true_class(step.probs_nat, y) if self.anti else 1 - true_class(step.probs_adv, y)
        return Terms(weighted=self.beta * kl(nat, adv) * factor, plain=ce(nat, step.labels))


@dataclass(frozen=True, kw_only=True)
class SOVR:
    """SOVR: plain = CE(x'), weighted = scale * OVR(x') - CE(x'), so that weight 1 puts OVR for CE (Kanai et al. 2022).

    OVR = softplus(-z_y) + sum_{k != y} softplus(z_k), the one-versus-rest loss. Derived from the abstract: neither code
    nor the equation could be read. Used with Lowest(share, normalize=False) on `logit_margin`. Soft labels act in CE
    alone.

    scale: factor of OVR, at least 0. Raises RecipeError for a field of the wrong type or range.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, scale=self.scale)

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        return f"({self.scale:g} OVR(adv) - CE(adv))", "CE(adv)"

    def __call__(self, step: Step) -> Terms:
        z, y = precise(step.logits_adv), step.y
        z_y = true_class(z, y)
        one_versus_rest = softplus(z).sum(1) - softplus(z_y) + softplus(-z_y)
        entropy = ce(z, step.labels)
        return Terms(weighted=self.scale * one_versus_rest - entropy, plain=entropy)


@dataclass(frozen=True, kw_only=True)
class HAT:
    """HAT: plain = CE(x) + gamma * CE(h), weighted = beta * KL(p(x) || p(x')) (Rade and Moosavi-Dezfooli 2022).

    The helper h = x + 2 (x' - x) lies twice as far away, outside of the box where x' reaches its edge; its label is the
    class that `step.teacher`, a network of standard training, gives x'. Labels and helper as in the authors' code.

    beta: factor of KL, at least 0; 2.5 in the authors' README.
    gamma: factor of the helper's cross-entropy, at least 0; 0.5 in their README, 1 in their code's defaults.

    Raises RecipeError for a field of the wrong type or range, and for a recipe without a teacher.
    """

    beta: float = 2.5
    gamma: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta, gamma=self.gamma)

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        return f"{self.beta:g} KL(nat || adv)", f"CE(nat) + {self.gamma:g} CE(helper, teacher's class of adv)"

    def __call__(self, step: Step) -> Terms:
        nat, adv = step.logits_nat, step.logits_adv
        helper = logits_of(step.model(step.x + 2 * (step.x_adv - step.x)))
        label = step.teacher(step.x_adv).argmax(1)
        plain = ce(nat, step.labels) + self.gamma * ce(helper, label)
        return Terms(weighted=self.beta * kl(nat, adv), plain=plain)


@dataclass(frozen=True, kw_only=True)
class SelfAdaptive:
    """Self-adaptive training in TRADES' form: weighted = -sum_k t_k log p_k(x), plain = beta * KL(p(x) || p(x')).

    The targets t [B, classes] are remembered per example: one-hot at first, and from epoch `start` on
    t <- decay * t + (1 - decay) * p(x), before the loss. Weighted with `target_confidence` (Huang et al. 2020).

    beta: factor of KL, at least 0; 6 as in TRADES.
    start: epoch, from 0, from which on the targets move; 70 of 100 in the authors' code.
    decay: of the targets, in [0, 1); 0.9 in the authors' code.

    Raises RecipeError for a field of the wrong type or range.
    """

    beta: float = 6.0
    start: int = 70
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, beta=self.beta, start=self.start, decay=self.decay)

    @property
    def memory(self) -> dict[str, Memory]:
        """The targets of each example."""
        return {"targets": per_example("classes", start="label", decay=self.decay)}

    @property
    def formula(self) -> tuple[str, str]:
        """The terms (weighted, plain) as text."""
        return "CE(nat, targets)", f"{self.beta:g} KL(nat || adv)"

    def __call__(self, step: Step) -> Terms:
        nat, adv = step.logits_nat, step.logits_adv
        if step.epoch >= self.start:
            step.remember(targets=step.probs_nat)
        return Terms(weighted=ce(nat, step.memory["targets"]), plain=self.beta * kl(nat, adv))
