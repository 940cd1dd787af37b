"""Why attacks fail on a model: causes by name, measured on the sample of the sanity checks.

What costs a few passes is always measured. What costs an attack is measured where a sign asks for it: PGD left images
standing that something else broke. docs/believing.md explains each cause under its name.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.margin_decomposition import MD
from robustmail.attacks.pgd import PGD
from robustmail.attacks.steps import ScaledCE, lengths
from robustmail.data.image_files import LabelledImages
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec
from robustmail.evaluation.evaluator import image_batch, run_attack
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.evaluation.ledger import BROKE, STOOD, Ledger
from robustmail.evaluation.measurements import MIN_IMAGES, Measurements
from robustmail.evaluation.results import Check
from robustmail.evaluation.statistics import paired
from robustmail.functional import true_class
from robustmail.norms import MAX_EPS, Norm
from robustmail.records import AttackProgress
from robustmail.runtime.rng import generator

__all__ = ["Sample", "cause_checks", "measure_causes"]

# Thresholds; docs/believing.md says where they come from.
SCALES = (0.01, 0.1, 10.0, 100.0)  # of the logits
LOST = (0.02, 0.05)  # share of images that a scale, or margin decomposition, breaks beyond: yellow, red
LOST_LOW = 0.02  # below the interval of it, for red
ONE_SIDED = 4.0  # times that the gradient of one logit is the other's: margin decomposition is tried
STEPS = (1e-4, 1 / 255)  # in every pixel: far less than the distance of 8-bit images, and this distance
FLAT = 0.05  # share of images whose logits such a step leaves as they are
SHALLOW = 0.7  # slope over the short step, as a share of the slope over the long one
REGAINED = (0.05, 0.10)  # share of images that PGD breaks at eps, and not at FAR eps: yellow, red
FAR = 4  # times eps
PLATEAU = 10  # images that stand at eps, none of which falls up to FAR eps
# eps up to which no image need fall; in l2 divided by the root of the numbers in an image
VISIBLE = {"linf": 16 / 255, "l2": 1 / 55}


@dataclass(frozen=True)
class Sample:
    """What the causes are measured on.

    model, part, ledger: the model, the images of the sample, and what the checks' attacks did to them.
    missed: [N] bool, the images that PGD-100 left standing and something else broke.
    eps, norm, seed: of the evaluation. sizer: batch sizes.
    """

    model: nn.Module
    part: LabelledImages
    ledger: Ledger
    missed: Tensor
    eps: float
    norm: Norm
    seed: int
    sizer: BatchSizer

    @property
    def has_sign(self) -> bool:
        """Whether enough images were missed that it is no chance."""
        return int(self.missed.sum()) >= MIN_IMAGES

    def attack(self, attacks: dict[str, Any], only: Tensor) -> Generator[AttackProgress, None, Tensor]:
        """[N] bool: which of the images `only`, [N] bool, stand under the attacks, by name; yields progress."""
        trial = self.ledger.unattacked()
        for stage in attacks:
            trial.outcome(stage)[~only] = STOOD  # not asked
        spec = AttackSpec("causes", attacks, max(attack.eps for attack in attacks.values()), self.norm)
        yield from run_attack(self.model, self.part, trial, spec, self.seed, self.sizer, keep_examples=False)
        return trial.standing(attacks) & only


Measuring = Generator[AttackProgress, None, dict[str, Any]]


def measure_causes(sample: Sample) -> Measuring:
    """Measure; yields progress and returns plain values, which `cause_checks` judges."""
    sizer = sample.sizer
    found: dict[str, Any] = {
        "steps": sizer.with_oom_retry(lambda: _steps(sample)),
        "one_sided": sizer.with_oom_retry(lambda: _one_sided(sample)),
        "missed": int(sample.missed.sum()),
    }
    if sample.has_sign:
        found["logit_scale"] = yield from _logit_scale(sample)
    if sample.has_sign or found["one_sided"] > ONE_SIDED:
        found["imbalance"] = yield from _imbalance(sample)
    found["far"] = yield from _far(sample)
    return found


def _logit_scale(sample: Sample) -> Measuring:
    """How many images PGD-20 leaves, and by scale how many of them it breaks from the same start when the loss sees the
    logits times the scale. The first misclassified iterate counts."""
    stands, lost = sample.ledger.right, {}
    for scale in (1.0, *SCALES):
        loss = ScaledCE(scale)
        attack = PGD(eps=sample.eps, alpha=sample.eps / 8, steps=20, norm=sample.norm, loss=loss, patience=0)
        left = yield from sample.attack({"logit-scale": attack}, stands)  # of one name, so it draws the same start
        if scale == 1:
            stands = worst = left
        else:
            lost[f"{scale:g}"], worst = int((stands & ~left).sum()), worst & left
    return {"standing": int(stands.sum()), "lost": lost, "worst": int((stands & ~worst).sum())}


def _imbalance(sample: Sample) -> Measuring:
    """Of the images that PGD-100 leaves, how many fall to margin decomposition alone, and to PGD on the margin alone:
    two runs of 20 steps each, both with steps that fall from 2 eps by a cosine."""
    eps, norm = sample.eps, sample.norm
    stands = sample.ledger.standing(["pgd100"])
    margin = PGD(eps=eps, alpha=min(2 * eps, MAX_EPS[norm]), steps=20, norm=norm, loss="margin", patience=0,
                 decay="cosine")  # fmt: skip
    under_margin = yield from sample.attack({"margin": margin, "margin-2": margin}, stands)
    under_md = yield from sample.attack({"md": MD(eps=eps, steps=20, norm=norm)}, stands)
    return {
        "only_md": int((under_margin & ~under_md).sum()),
        "only_margin": int((under_md & ~under_margin).sum()),
    }


def _far(sample: Sample) -> Measuring:
    """Of the images that PGD-100 breaks at eps, how many PGD-20 leaves at FAR eps. Nothing where no attack takes so
    large an eps."""
    far = FAR * sample.eps
    if far > MAX_EPS[sample.norm]:
        return {}
    broken = sample.ledger.outcome("pgd100") == BROKE
    attack = attack_spec("pgd20", far, 10, sample.norm).stages["pgd20"]
    left = yield from sample.attack({"far": attack}, broken)
    per_pixel = far if sample.norm == "linf" else far / sample.part.x[0].numel() ** 0.5
    return {
        "eps": sample.eps,
        "far": far,
        "broken": int(broken.sum()),
        "regained": int(left.sum()),
        "is_visible": per_pixel >= VISIBLE[sample.norm],
    }


def _batches(sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels, a pass of the model at a time."""
    x, y = image_batch(sample.model, sample.part, slice(None))
    size = sample.sizer.pass_size
    yield from zip(x.split(size), y.split(size), strict=True)


def _steps(sample: Sample) -> dict[str, float]:
    """Share of images whose logits have the same bits after a step of 1e-4 up or down in every pixel; and the median
    over the images of the slope of the logits over that step, as a share of their slope over a step of 1/255."""
    flat, slopes = [], []
    short, long = STEPS
    draw = generator(sample.seed, "step-function")
    for x, _ in _batches(sample):
        sign = torch.randint(2, x.shape, generator=draw).to(x) * 2 - 1
        sign = torch.where(x > 1 - long, -1.0, torch.where(x < long, 1.0, sign))
        with exact_inference(sample.model, sample.sizer.pass_size) as view, torch.no_grad():
            here, near, far = (view(x + step * sign) for step in (0.0, short, long))
        flat.append((near == here).all(1))
        slopes.append(lengths(near - here) / short / (lengths(far - here) / long).clamp(min=1e-9))
    return {"flat": torch.cat(flat).float().mean().item(), "slope": torch.cat(slopes).median().item()}


def _one_sided(sample: Sample) -> float:
    """Median over the images of how many times the gradient of one of the two largest logits is the other's, in l1."""
    ratios = []
    for x, y in _batches(sample):
        with exact_inference(sample.model, sample.sizer.pass_size) as view:
            images = x.clone().requires_grad_()
            logits = view(images)
            rival = logits.detach().scatter(1, y[:, None], float("-inf")).argmax(1)
            sizes = [
                torch.autograd.grad(true_class(logits, label).sum(), images, retain_graph=True)[0]
                .flatten(1).abs().sum(1).clamp(min=1e-20)
                for label in (y, rival)
            ]  # fmt: skip
        ratios.append(torch.maximum(sizes[0] / sizes[1], sizes[1] / sizes[0]))
    return torch.cat(ratios).nan_to_num(nan=1.0).median().item()


# The checks


def cause_checks(m: Measurements) -> Iterator[Check]:
    """Judge what `measure_causes` returned; nothing where it was not run."""
    if not m.causes:
        return
    yield _step_function_check(m, **m.causes["steps"])
    yield _logit_scale_check(m.n, m.causes)
    yield _imbalance_check(m.n, m.causes)
    if m.causes["far"]:
        yield _far_check(m.n, m.causes["far"], m.curve)


def _step_function_check(m: Measurements, flat: float, slope: float) -> Check:
    is_flat, is_shallow = flat > FLAT, slope < SHALLOW and not m.probabilities  # those are flat where they are near 1
    return Check(
        "step-function",
        "red" if is_flat and m.zero_gradients > FLAT else "yellow" if is_flat or is_shallow else "green",
        f"a step of {STEPS[0]:g} in every pixel leaves the logits of {100 * flat:.1f} % of the images as they are; "
        f"their slope over it is {slope:.2f} times that over 1/255",
        "the gradient does not see the steps; attack with a backward pass that goes through them (BPDA)",
    )


def _logit_scale_check(n: int, found: dict[str, Any]) -> Check:
    if "logit_scale" not in found:
        return _not_asked("logit-scale", found["missed"])
    lost, worst = found["logit_scale"]["lost"], found["logit_scale"]["worst"]
    scale = max(lost, key=lost.__getitem__)
    return Check(
        "logit-scale",
        _level(n, worst, 0),
        f"with logits times {scale}, which changes no prediction, PGD breaks {lost[scale]} more of {n} images; with "
        f"any factor {worst}",
        "the loss is flat where the logits are so large or small; take cw, apgd-t or aa, which see no scale",
    )


def _imbalance_check(n: int, found: dict[str, Any]) -> Check:
    if "imbalance" not in found:
        return _not_asked("imbalanced-gradients", found["missed"])
    only_md, only_margin = found["imbalance"]["only_md"], found["imbalance"]["only_margin"]
    return Check(
        "imbalanced-gradients",
        _level(n, only_md, only_margin),
        f"margin decomposition alone breaks {only_md} of {n} images, PGD on the margin with as many steps alone "
        f"{only_margin}; the gradient of one logit is {found['one_sided']:.1f} times the other's",
        "one logit's gradient hides the other's; add md to the attacks",
    )


def _not_asked(name: str, missed: int) -> Check:
    return Check(name, "green", f"not asked for: {missed} images that PGD left standing were broken otherwise", "")


def _level(n: int, lost: int, won: int) -> str:
    """lost: images that only the other attack breaks. won: images that only it leaves."""
    if lost < MIN_IMAGES or (lost - won) / n < LOST[0]:
        return "green"
    return "red" if (lost - won) / n >= LOST[1] and paired(n, lost, won).low > LOST_LOW else "yellow"


def _far_check(n: int, far: dict[str, Any], curve: list[dict[str, Any]]) -> Check:
    regained = far["regained"] / n if far["regained"] >= MIN_IMAGES else 0.0
    standing, still = (
        next(point["correct"] for point in curve if point["eps"] == far[name]) for name in ("eps", "far")
    )
    is_plateau = far["is_visible"] and standing >= PLATEAU and still == standing
    return Check(
        "larger-eps-does-not-help",
        "red" if regained >= REGAINED[1] else "yellow" if regained >= REGAINED[0] or is_plateau else "green",
        f"of {far['broken']} images that PGD breaks at eps, {far['regained']} stand at {FAR} eps; of {standing} that "
        f"stand at eps, {still} do",
        "a larger ball holds the smaller one, so an attack that works breaks more in it",
    )
