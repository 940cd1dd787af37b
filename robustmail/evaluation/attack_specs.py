"""What the names of attacks stand for, with all settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from robustmail.attacks.art import art
from robustmail.attacks.autoattack import AutoAttack
from robustmail.attacks.instances import adopted
from robustmail.attacks.pgd import PGD
from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import eps_of
from robustmail.errors import RecipeError, did_you_mean
from robustmail.evaluation.ledger import RESERVED
from robustmail.fields import describe
from robustmail.norms import Norm, check_budget, distances, norm_of, tolerance
from robustmail.plugin_calls import plugin_name
from robustmail.step import Attack

__all__ = [
    "NAMES",
    "AttackSpec",
    "check_eps",
    "check_custom",
    "in_turn",
    "passes_per_image",
    "is_built_in",
    "attack_spec",
    "parse_attacks",
    "unique_names",
]

NAMES = ("nat", "pgd10", "pgd20", "pgd100", "cw", "cw-art", "apgd", "apgd-t", "fab-t", "square", "aa")
PER_IMAGE = ("PGD", "APGD", "APGDT", "FAB", "Square")  # of torchattacks: `per_image_noise` knows what they draw


class AttackSpec(NamedTuple):
    """What a name stands for.

    name: of the attack. stages: attacks by name, each run on the images that the ones before left standing. eps, norm:
    the ball. note: what differs from the attack that usually has this name, if anything.
    """

    name: str
    stages: dict[str, Attack]
    eps: float
    norm: Norm
    note: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """All settings of each stage, as text."""
        settings = {stage: describe(attack) for stage, attack in self.stages.items()}
        return settings | ({"note": self.note} if self.note else {})

    @property
    def max_distance(self) -> float:
        """Largest distance of an adversarial image, rounding included."""
        return self.eps + tolerance(self.eps)

    def in_ball(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """[B] bool: which images x_adv [B, C, H, W] are in the ball around x."""
        return distances(x, x_adv, self.norm) <= self.max_distance

    def is_per_image(self, stage: str) -> bool:
        """Whether what a stage does to an image is independent of the images beside it."""
        attack = self.stages[stage]
        is_torchattack = type(attack).__module__ == "robustmail.attacks.torchattacks"
        is_known = is_torchattack and getattr(attack, "__given__", ("",))[0] in PER_IMAGE
        return is_known or (isinstance(attack, PGD) and not attack.noise)

    def uses_logits_only(self, stage: str) -> bool:
        """Whether a stage uses only the model's logits and their gradients, as all attacks of robustmail and of
        libraries do."""
        return type(self.stages[stage]).__module__.startswith("robustmail.attacks")

    def must_stay_in_ball(self, stage: str) -> bool:
        """Whether it is an error if a stage leaves the ball. Not for a library's minimum-norm attack: its examples
        outside the ball do not count."""
        return hasattr(self.stages[stage], "eps") or not self.uses_logits_only(stage)

    def renamed(self, name: str) -> AttackSpec:
        """The same attack of one stage under another name."""
        return self._replace(name=name, stages={name: next(iter(self.stages.values()))})


def is_built_in(name: str) -> bool:
    """Whether the name is that of a built-in attack."""
    return name in NAMES or re.fullmatch(r"pgd[1-9]\d*", name) is not None


def check_eps(eps: float, norm: Norm) -> None:
    """Refuse an eps that is not a positive, finite number or larger than any distance of images (raises
    RecipeError)."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not math.isfinite(eps):
        raise RecipeError(f"eps={eps!r}", "is no finite number", "Write 8/255.")
    check_budget("evaluate", norm, eps=eps)
    if eps == 0:
        raise RecipeError("eps=0", "must be above 0, for there is nothing to attack", "Write 8/255.")


def check_custom(spec: AttackSpec) -> None:
    """Refuse an attack whose own eps is smaller than the evaluation's (raises RecipeError)."""
    for stage, attack in spec.stages.items():
        eps = eps_of(attack)
        if norm_of(attack) == spec.norm and eps is not None and eps < spec.eps * (1 - 1e-6):
            own, wanted = describe(eps), describe(float(spec.eps))
            wrong = f"its eps is smaller than the evaluation's {wanted}, so its result would overstate robustness"
            raise RecipeError(
                f"attack {stage} (given eps={own})", wrong, f"Give it eps={wanted}, or evaluate at {own}."
            )


def attack_spec(attack: str | Attack, eps: float, classes: int, norm: Norm = "linf") -> AttackSpec:
    """The attack that a name stands for; an attack given as a value is taken as it is.

    nat: no attack.
    pgdN: N iterations of PGD on the cross-entropy from a random start. Its step is max(eps / 10, 2.5 eps / N), at most
    eps: Madry's rule for few iterations (2/255 at 10).
    cw: 20 iterations of PGD on the margin max_{j != y} z_j - z_y, which papers on robustness call CW. Its step is eps /
    10: the 0.003 at eps 0.031 of the authors' evaluation. cw-art: Carlini and Wagner's attack as in ART, which searches
    for the nearest example and is slow.
    apgd: APGD-CE, 100 iterations. apgd-t, fab-t, square: the other stages of AutoAttack, each alone.
    aa: the standard AutoAttack.

    attack: a name or an attack. eps, norm: the ball. classes: of the model.
    Raises RecipeError: an unknown name, or an attack that needs more classes.
    """
    if not isinstance(attack, str):
        value: Attack = adopted(attack)
        name = str(getattr(value, "__given__", (plugin_name(value),))[0])  # a library's class by its own name
        if is_built_in(name):
            raise RecipeError(f"attack {name}", "named like a built-in attack", "Rename it.")
        if name in RESERVED:
            raise RecipeError(f"attack {name}", "named like a column of the ledger", "Rename it.")
        return AttackSpec(name, {name: value}, eps, norm)
    if attack == "nat":
        return AttackSpec(attack, {}, eps, norm)
    if match := re.fullmatch(r"pgd([1-9]\d*)", attack):
        steps = int(match[1])
        knobs: dict[str, Any] = {"eps": eps, "alpha": _step(eps, steps), "steps": steps}
        # The library's PGD in l2 draws lengths for the whole batch at once, so that an image's result would depend on
        # the others.
        return AttackSpec(
            attack, {attack: torchattack("PGD", **knobs) if norm == "linf" else PGD(norm=norm, **knobs)}, eps, norm
        )
    if attack == "cw":
        return AttackSpec(attack, {"cw": PGD(eps=eps, alpha=eps / 10, steps=20, norm=norm, loss="margin")}, eps, norm)
    if attack == "cw-art":
        return AttackSpec(attack, {"cw-art": _nearest(norm)}, eps, norm)
    standard = AutoAttack(eps=eps, norm=norm)
    if attack == "aa":
        return AttackSpec(attack, standard.stages(classes), eps, norm, standard.replaced(classes))
    stages = standard.stages(classes)
    stage = "apgd-ce" if attack == "apgd" else attack
    if attack in NAMES and stage in stages:
        return AttackSpec(attack, {stage: stages[stage]}, eps, norm)
    if attack in NAMES:
        raise RecipeError(f"attack {attack!r}", standard.replaced(classes) or "", "Name aa, or apgd and square.")
    raise RecipeError(f"attack {attack!r}", "no such attack in validation and evaluation", did_you_mean(attack, NAMES))


def parse_attacks(attacks: Iterable[str | Attack], eps: float, classes: int, norm: Norm) -> list[AttackSpec]:
    """The specs of attacks given by name or value, with unique names.

    Raises RecipeError: no attack at all, an unknown name, or an attack of one's own with a smaller eps.
    """
    specs = unique_names([attack_spec(attack, eps, classes, norm) for attack in attacks])
    if not specs:
        raise RecipeError("attacks", "no attack given", "Write nat,pgd100.")
    for spec in specs:
        check_custom(spec)
    return specs


def in_turn(specs: list[AttackSpec]) -> AttackSpec:
    """One attack of the stages of several, each run on the images that the ones before left standing."""
    first, *others = specs
    stages = {stage: attack for spec in specs for stage, attack in spec.stages.items()}
    return first._replace(name=" + ".join(spec.name for spec in specs), stages=stages) if others else first


def unique_names(specs: list[AttackSpec]) -> list[AttackSpec]:
    """The specs without repetitions; of two that differ but have one name, the second becomes PGD-2."""
    by_name: dict[str, AttackSpec] = {}
    for spec in specs:
        name, k = spec.name, 1
        while name in by_name and by_name[name].settings != spec.settings:
            k += 1
            name = f"{spec.name}-{k}"
        by_name.setdefault(name, spec if k == 1 else spec.renamed(name))
    return list(by_name.values())


def _nearest(norm: Norm) -> Any:
    """ART's attacks of Carlini and Wagner have no eps; its defaults (10 iterations) find next to nothing."""
    if norm == "linf":
        return art("CarliniLInfMethod", max_iter=100, learning_rate=0.01)
    return art("CarliniL2Method", max_iter=100, learning_rate=0.01, binary_search_steps=5, batch_size=50)


def _step(eps: float, steps: int) -> float:
    return min(max(eps / 10, 2.5 * eps / steps), eps)


def passes_per_image(name: str) -> float:
    """Cost of an attack for an image that it does not break, in forward passes (a backward pass counts as two)."""
    if match := re.fullmatch(r"pgd(\d+)", name):
        return 1 + 3.0 * int(match[1])
    # aa: 100 + 9 x 100 iterations of APGD, 9 x 100 of FAB with two gradients each, 5,000 queries.
    parts = {"apgd-t": 3.0 * 900, "fab-t": 7.0 * 900, "square": 5000.0}
    return {"nat": 1.0, "cw": 61.0, "apgd": 301.0, "aa": 300 + sum(parts.values()), **parts}.get(name, 100.0)
