"""What the names of attacks stand for, with all settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from robustmail.attacks.art import art
from robustmail.attacks.autoattack import AutoAttack
from robustmail.attacks.constraint_relaxation import CR
from robustmail.attacks.instances import adopted
from robustmail.attacks.margin_decomposition import MD
from robustmail.attacks.pgd import PGD
from robustmail.attacks.steps import ScaledCE
from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import eps_of
from robustmail.errors import RecipeError, did_you_mean
from robustmail.evaluation.attack_texts import NAMES, AttackName, parse_name, read_attack
from robustmail.evaluation.ledger import RESERVED
from robustmail.evaluation.transfer import Transferred, inner
from robustmail.fields import describe, field_values, replace_fields
from robustmail.norms import Norm, check_budget, distances, norm_of, tolerance
from robustmail.plugin_calls import plugin_name
from robustmail.step import Attack

__all__ = [
    "AttackSpec",
    "check_eps",
    "check_custom",
    "in_turn",
    "passes_per_image",
    "is_built_in",
    "attack_spec",
    "parse_attacks",
    "pgd_runs",
    "transferred",
    "unique_names",
]

START = "-start"  # between the name of a stage and the number of its start
PER_IMAGE = ("PGD", "APGD", "APGDT", "FAB", "Square")  # of torchattacks: `per_image_noise` knows what they draw


class AttackSpec(NamedTuple):
    """What a name stands for.

    name: of the attack. stages: attacks by name, each run on the images that the ones before left standing. eps, norm:
    the ball. note: what differs from the attack that usually has this name, if anything. restarts: how many of the
    stages are the same attack from further starts.
    """

    name: str
    stages: dict[str, Attack]
    eps: float
    norm: Norm
    note: str | None = None
    restarts: int = 1

    @property
    def settings(self) -> dict[str, str]:
        """All settings of each stage, as text; once for all restarts."""
        settings = {stage: describe(attack) for stage, attack in self.stages.items()}
        if self.restarts > 1:
            settings = dict([next(iter(settings.items())), ("restarts", f"{self.restarts}, the worst counts")])
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
        attack = inner(self.stages[stage])
        is_torchattack = type(attack).__module__ == "robustmail.attacks.torchattacks"
        is_known = is_torchattack and getattr(attack, "__given__", ("",))[0] in PER_IMAGE
        # A loss of one's own may look at the whole batch.
        is_pgd = isinstance(attack, PGD) and not attack.noise and isinstance(attack.loss, (str, ScaledCE))
        return is_known or is_pgd or isinstance(attack, (MD, CR))

    def uses_logits_only(self, stage: str) -> bool:
        """Whether a stage uses only the model's logits and their gradients, as all attacks of robustmail and of
        libraries do."""
        return type(inner(self.stages[stage])).__module__.startswith("robustmail.attacks")

    def must_stay_in_ball(self, stage: str) -> bool:
        """Whether it is an error if a stage leaves the ball. Not for a library's minimum-norm attack: its examples
        outside the ball do not count."""
        return hasattr(inner(self.stages[stage]), "eps") or not self.uses_logits_only(stage)

    def renamed(self, name: str) -> AttackSpec:
        """The same attack of one stage under another name."""
        return self._replace(name=name, stages={name: next(iter(self.stages.values()))})


def is_built_in(name: str) -> bool:
    """Whether the name is that of a built-in attack, with restarts and knobs or without."""
    return parse_name(name) is not None


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
    """The attack that a text stands for; an attack given as a value is taken as it is.

    nat: no attack.
    pgdN: N iterations of PGD on the cross-entropy from a random start. Its step is max(eps / 10, 2.5 eps / N), at most
    eps: Madry's rule for few iterations (2/255 at 10).
    cw: 20 iterations of PGD on the margin max_{j != y} z_j - z_y, which papers on robustness call CW. Its step is eps /
    10: the 0.003 at eps 0.031 of the authors' evaluation. cw-art: Carlini and Wagner's attack as in ART, which searches
    for the nearest example and is slow.
    pma: 100 iterations of PGD on max_{j != y} p_j - p_y, its step falling from eps / 4 by a cosine.
    md: the margin decomposition attack. cr: constraint relaxation, in L-inf.
    apgd: APGD-CE, 100 iterations. apgd-t, fab-t, square: the other stages of AutoAttack, each alone.
    aa: the standard AutoAttack.
    NAMExR, as pgd50x10: R starts, each on the images that the ones before left standing.
    NAME(KNOB=VALUE): other settings of the attack's class, as pgd20(eot=20).

    attack: a text as `read_attack` knows them, or an attack. eps, norm: the ball. classes: of the model.
    Raises RecipeError: an unknown name or knob, or an attack that needs more classes or another norm.
    """
    value = read_attack(attack) if isinstance(attack, str) else attack
    if not isinstance(value, str):
        return _of_value(value, eps, norm)
    name = parse_name(value)
    if name is None:
        wrong = "no such attack in validation and evaluation"
        raise RecipeError(f"attack {value!r}", wrong, did_you_mean(value, NAMES))
    spec = _of_name(name.base, eps, classes, norm)
    spec = _with_knobs(spec, name) if name.knobs else spec
    if name.restarts == 1:
        return spec
    ((stage, one_start),) = spec.stages.items()
    stages = {stage if k == 1 else f"{stage}{START}{k}": one_start for k in range(1, name.restarts + 1)}
    return spec._replace(name=str(name), stages=stages, restarts=name.restarts)


def _of_value(attack: Attack, eps: float, norm: Norm) -> AttackSpec:
    value: Attack = adopted(attack)
    name = str(getattr(value, "__given__", (plugin_name(value),))[0])  # a library's class by its own name
    if is_built_in(name):
        raise RecipeError(f"attack {name}", "named like a built-in attack", "Rename it.")
    if name in RESERVED:
        raise RecipeError(f"attack {name}", "named like a column of the ledger", "Rename it.")
    return AttackSpec(name, {name: value}, eps, norm)


def _of_name(name: str, eps: float, classes: int, norm: Norm) -> AttackSpec:
    """The attack of a name without restarts and knobs."""
    if name == "nat":
        return AttackSpec(name, {}, eps, norm)
    own: dict[str, Any] = {
        "cw": lambda: PGD(eps=eps, alpha=eps / 10, steps=20, norm=norm, loss="margin"),
        "pma": lambda: PGD(eps=eps, alpha=eps / 4, steps=100, norm=norm, loss="pm", patience=0, decay="cosine"),
        "md": lambda: MD(eps=eps, norm=norm),
        "cr": lambda: CR(eps=eps),
        "cw-art": lambda: _nearest(norm),
    }
    if name == "cr" and norm != "linf":
        raise RecipeError(f"attack 'cr' (given norm={norm})", "is defined in linf only", "Take md or apgd-t.")
    if name in own:
        return AttackSpec(name, {name: own[name]()}, eps, norm)
    if name.startswith("pgd"):
        # The library's PGD in l2 draws lengths for the whole batch at once, so that an image's result would depend on
        # the others.
        pgd = _pgd(name, eps, norm)
        knobs: dict[str, Any] = {"eps": eps, "alpha": pgd.alpha, "steps": pgd.steps}
        return AttackSpec(name, {name: torchattack("PGD", **knobs) if norm == "linf" else pgd}, eps, norm)
    standard = AutoAttack(eps=eps, norm=norm)
    stages = standard.stages(classes)
    if name == "aa":
        return AttackSpec(name, stages, eps, norm, standard.replaced(classes))
    stage = "apgd-ce" if name == "apgd" else name
    if stage not in stages:
        raise RecipeError(f"attack {name!r}", standard.replaced(classes) or "", "Name aa, or apgd and square.")
    return AttackSpec(name, {stage: stages[stage]}, eps, norm)


def _with_knobs(spec: AttackSpec, name: AttackName) -> AttackSpec:
    """The attack with other settings. Its stage has them in its name, for the ledger has a column of each stage."""
    who = f"attack {str(name)!r}"
    if len(spec.stages) != 1:
        raise RecipeError(who, f"{name.base} has no knobs", "Name one of apgd, apgd-t, fab-t and square with knobs.")
    (value,) = spec.stages.values()
    value = _pgd(name.base, spec.eps, spec.norm) if name.base.startswith("pgd") else value
    fields = field_values(value)
    knobs = {"eot_iter" if knob == "eot" and "eot_iter" in fields else knob: x for knob, x in name.knobs.items()}
    fixed = {"eps", "norm", *(["steps"] if name.base.startswith("pgd") else [])}
    for knob in knobs:
        if knob in fixed:
            todo = f"Write pgd{knobs[knob]}." if knob == "steps" else f"Pass --{knob}."
            raise RecipeError(who, f"{knob} is not a knob here", todo)
        if knob not in fields:
            raise RecipeError(who, f"{name.base} has no knob {knob!r}", did_you_mean(knob, {*fields} - fixed))
    text = name.without_restarts
    return spec._replace(name=text, stages={text.replace(", ", ";"): replace_fields(value, knobs)})


def pgd_runs(stages: Iterable[str]) -> list[list[str]]:
    """The stages that are PGD on the cross-entropy, those of one attack's restarts together."""
    by_base: dict[str, list[str]] = {}
    for stage in stages:
        base = stage.partition(START)[0]
        if base.startswith("pgd") and base[3:].isdigit():
            by_base.setdefault(base, []).append(stage)
    return list(by_base.values())


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


def transferred(specs: Iterable[AttackSpec], model: nn.Module, name: str, fingerprint: str) -> list[AttackSpec]:
    """The same attacks on another model, each with stages of its own: `pgd20 from NAME`.

    specs: the attacks; those without a stage (nat) are left out. model, name, fingerprint: the other model, its name,
    and the fingerprint of its weights.
    """
    name = re.sub(r"[^\w.+-]", "_", name)  # it becomes a part of columns of the ledger
    note = f"its examples were made on {name}, so it says nothing of attacks that know the evaluated model"
    return [
        spec._replace(
            name=f"{spec.name} from {name}",
            stages={
                f"{stage} from {name}": Transferred(attack=attack, source=f"{name} {fingerprint[:16]}", model=model)
                for stage, attack in spec.stages.items()
            },
            note="; ".join(filter(None, (spec.note, note))),
        )
        for spec in specs
        if spec.stages
    ]


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


def _pgd(name: str, eps: float, norm: Norm) -> PGD:
    steps = int(name.removeprefix("pgd"))
    return PGD(eps=eps, alpha=min(max(eps / 10, 2.5 * eps / steps), eps), steps=steps, norm=norm)


def passes_per_image(text: str) -> float:
    """Cost of an attack for an image that it does not break, in forward passes (a backward pass counts as two)."""
    name = parse_name(text)
    if name is None:
        return 100.0
    # aa: 100 + 9 x 100 iterations of APGD, 9 x 100 of FAB with two gradients each, 5,000 queries.
    parts = {"apgd-t": 3.0 * 900, "fab-t": 7.0 * 900, "square": 5000.0}
    # cr: all restarts of all classes; most images are given up before.
    others = {"nat": 1.0, "cw": 61.0, "pma": 301.0, "md": 302.0, "cr": 7500.0, "apgd": 301.0, "cw-art": 100.0}
    costs: Mapping[str, float] = {**others, **parts, "aa": 300 + sum(parts.values())}
    one_start = 1 + 3.0 * int(name.base[3:]) if name.base.startswith("pgd") else costs[name.base]
    factors = [max(1, value) for knob, value in name.knobs.items() if knob in ("eot", "targets") and _is_count(value)]
    return one_start * name.restarts * float(math.prod(factors))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
