"""Named attacks over a whole set of images; the result is how many stand, with an interval and the settings."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustmail.attacks.autoattack import AutoAttack
from robustmail.attacks.pgd import PGD
from robustmail.attacks.torchattacks import torchattack
from robustmail.attacks.view import Norm, View, settle, viewed
from robustmail.data.images import Part, to_float
from robustmail.errors import NonFiniteError, RecipeError, did_you_mean
from robustmail.randomness import reseed
from robustmail.records import Attacked, Attacking
from robustmail.step import Adversarial, Attack
from robustmail.values import describe, label

__all__ = ["NAMES", "Plan", "cost", "evaluate", "plan", "trial", "wilson"]

CHUNK = 250  # images per call of an attack: fixed, so that noise and verdicts do not depend on how it is run
NAMES = ("nat", "pgd10", "pgd20", "pgd100", "cw", "apgd", "aa")


class Plan(NamedTuple):
    """What a name stands for: attacks in order, each on the survivors of the ones before."""

    name: str
    stages: dict[str, Attack]
    eps: float
    norm: Norm
    note: str | None = None

    @property
    def settings(self) -> dict[str, str]:
        """Every stage spelt out, for the results."""
        said = {stage: describe(attack) for stage, attack in self.stages.items()}
        return said | ({"note": self.note} if self.note else {})


def plan(attack: str | Attack, eps: float, classes: int, norm: Norm = "linf") -> Plan:
    """The attack of a name at a budget; an attack of one's own is taken as it is.

    nat: no attack. pgdN: N iterations of PGD on the cross-entropy from a random start. cw: 20 iterations of PGD on
    the margin max_{j != y} z_j - z_y, which papers on robustness call CW. apgd: APGD-CE, 100 iterations. aa: the
    standard AutoAttack. cw steps by eps / 10, which is the 0.003 of the authors' evaluation at eps 0.031; pgdN by
    max(eps / 10, 2.5 eps / N), the same for many iterations and Madry's rule for few (2/255 at 10).
    Raises RecipeError for another name.
    """
    if not isinstance(attack, str):
        return Plan(label(attack), {label(attack): attack}, eps, norm)
    if attack == "nat":
        return Plan(attack, {}, eps, norm)
    if found := re.fullmatch(r"pgd([1-9]\d*)", attack):
        steps = int(found[1])
        knobs = {"eps": eps, "alpha": _step(eps, steps), "steps": steps}
        return Plan(attack, {attack: torchattack("PGD" if norm == "linf" else "PGDL2", **knobs)}, eps, norm)
    if attack == "cw":
        return Plan(attack, {"cw": PGD(eps=eps, alpha=eps / 10, steps=20, norm=norm, loss="margin")}, eps, norm)
    if attack == "apgd":
        apgd = torchattack("APGD", norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=100, loss="ce")
        return Plan(attack, {"apgd-ce": apgd}, eps, norm)
    if attack == "aa":
        standard = AutoAttack(eps=eps, norm=norm)
        return Plan(attack, standard.stages(classes), eps, norm, standard.replaced(classes))
    raise RecipeError(
        f"attack {attack!r}", "validation and evaluation have no such attack", did_you_mean(attack, NAMES)
    )


def trial(model: nn.Module, part: Part, what: Plan, seed: int = 0) -> Iterator[Attacking | Attacked]:
    """Run one plan over a set of images, telling how far it is; the last record is the verdict.

    Images that are misclassified as they are count as broken and are not attacked; each stage sees only what still
    stands, regrouped over the whole set. Everything is judged in float32 on the image itself, inside the ball.
    Nothing outside is changed: not the model, not its modes, not a generator.
    """
    began = time.perf_counter()
    standing = _natural(model, part)
    left = {"natural": len(standing)}
    for stage, attack in what.stages.items():
        tried = standing
        for i, chunk in enumerate(tried.split(CHUNK) if len(tried) else ()):
            with _exact(model) as view:
                reseed(seed, what.name, stage, i)
                broken = _broken(view, attack, part, chunk, what)
            standing = standing[~torch.isin(standing, chunk[broken])]
            yield Attacking(what.name, stage, min((i + 1) * CHUNK, len(tried)), len(tried), len(standing))
        left[stage] = len(standing)
    settings = dict(what.settings)
    if what.stages:
        settings |= {"seed": str(seed), "standing": ", ".join(f"{n} after {stage}" for stage, n in left.items())}
    correct, n = len(standing), len(part.y)
    low, high = wilson(correct, n)
    yield Attacked(what.name, correct, n, correct / n, low, high, time.perf_counter() - began, settings)


def evaluate(
    model: nn.Module,
    data: Part | tuple[Tensor, Tensor],
    attacks: Iterable[str | Attack] = ("nat", "pgd100"),
    eps: float = 8 / 255,
    norm: Norm = "linf",
    n: int | None = None,
    seed: int = 0,
    progress: Callable[[Attacking], Any] | None = None,
) -> list[Attacked]:
    """Robust accuracy of any nn.Module that takes images in [0, 1], one row per attack.

    data: (images, labels), uint8 or floats in [0, 1] [N, C, H, W] and integers [N]; n: only the first n.
    progress: called with how far it is. Raises RecipeError for an unknown attack, AttackError for images outside
    [0, 1].
    """
    part = Part(*data).first(n)
    with viewed(model) as view, torch.no_grad():
        classes = view(_images(view, part, slice(0, 2))).shape[1]
    rows = []
    for what in [plan(attack, eps, classes, norm) for attack in attacks]:
        for record in trial(model, part, what, seed):
            if isinstance(record, Attacked):
                rows.append(record)
            elif progress:
                progress(record)
    return rows


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@contextmanager
def _exact(model: nn.Module) -> Iterator[View]:
    """A view in plain float32: no autocast of the caller's, no TF32 on a GPU."""
    device = next((p.device.type for p in model.parameters()), "cpu")
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul) if device == "cuda" else ()
    before = [backend.allow_tf32 for backend in backends]
    with viewed(model) as view, torch.autocast(device, enabled=False):
        try:
            for backend in backends:
                backend.allow_tf32 = False
            yield view
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed


def _natural(model: nn.Module, part: Part) -> Tensor:
    """Indices, [correct], of the images that are classified correctly as they are."""
    right = []
    with _exact(model) as view, torch.no_grad():
        for start in range(0, len(part.y), CHUNK):
            here = slice(start, start + CHUNK)
            x = _images(view, part, here)
            right.append(view(x).argmax(1) == part.y[here].to(x.device))
        if view.finite is not None and not view.finite:
            raise NonFiniteError("evaluate", "the model returns NaN or infinite logits")
    return torch.cat(right).nonzero().squeeze(1).to(part.y.device)


def _broken(view: View, attack: Attack, part: Part, chunk: Tensor, what: Plan) -> Tensor:
    """Which of a chunk's images the attack breaks, [chunk] bool."""
    x = _images(view, part, chunk)
    y = part.y[chunk].to(x.device)
    found = attack(view, x, y)
    x_adv = found.x if isinstance(found, Adversarial) else found
    x_adv = settle(what.name, view, x, x_adv, what.eps, what.norm)
    with torch.no_grad():
        wrong: Tensor = view(x_adv).argmax(1) != y
        return wrong.to(part.y.device)


def _images(view: nn.Module, part: Part, which: slice | Tensor) -> Tensor:
    x = part.x[which]
    device = next((p.device for p in view.parameters()), x.device)
    x = x.to(device)
    return x if x.is_floating_point() else to_float(x)


def _step(eps: float, steps: int) -> float:
    return max(eps / 10, 2.5 * eps / steps)


def cost(name: str) -> float:
    """What an attack costs at most per image, in forward passes (a backward pass counts as two): for forecasts."""
    if found := re.fullmatch(r"pgd(\d+)", name):
        return 1 + 3.0 * int(found[1])
    # aa: 100 + 9 x 100 iterations of APGD, 9 x 100 of FAB with two gradients each, 5,000 queries.
    return {"nat": 1.0, "cw": 61.0, "apgd": 301.0, "aa": 3.0 * 1000 + 7.0 * 900 + 5000}.get(name, 100.0)
