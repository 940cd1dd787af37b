"""Is the number believable? What a handful of images tell about gradients that hide rather than a model that resists.

Two halves: `measure` asks the model, on a sample; `judge` reads what was measured and the ledger, and has no model. So
shards and merged results are judged alike. Each flag is explained in docs/believing.md under its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from robustmail.attacks.pgd import PGD
from robustmail.attacks.torchattacks import torchattack
from robustmail.data.dataset import Split
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec
from robustmail.evaluation.evaluator import clean_pass, image_batch, run_attack
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.evaluation.ledger import BROKE, UNTRIED, Ledger
from robustmail.evaluation.statistics import paired, wilson
from robustmail.functional import ce
from robustmail.norms import MAX_EPS, Norm
from robustmail.records import AttackProgress

__all__ = ["SAMPLE", "Check", "judge", "light", "measure"]

SAMPLE = 128  # images that are examined
LIGHTS = ("grey", "green", "yellow", "red")

# Thresholds; docs/believing.md says where they come from.
ZERO_GRADIENTS = 0.05  # share of images whose gradient is exactly zero, or not finite
HUGE = 0.5  # an L-inf ball in which every image can be made grey
STANDS_HUGE = 0.05  # share of images that may stand there
BLACK_BOX = (0.02, 0.05)  # share of images that only the black box breaks: yellow, red
GAP = (8.0, 12.0)  # points between the best PGD and the strongest: yellow, red
OVERLOOKED = (0.02, 0.10)  # share of images that only the checks' own attacks break: yellow, red
NO_HELP, MUCH_BETTER = 0.5, 10.0  # points: ten times the steps, and a targeted attack
ROUNDING = 5.0  # points that 8 bits may be better
TARGETED = "apgd-t"  # the stage of AutoAttack that PGD's weakness does not touch
OF_PGD = ("pgd-to-strongest-gap", "more-steps-do-not-help")  # checks of what PGD alone can do here
CURVE = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # of eps


@dataclass(frozen=True)
class Check:
    """One check: what was measured, and what it means where the light is not green."""

    name: str
    light: str
    measured: str
    meaning: str = ""


def measure(
    model: nn.Module, part: Split, known: Ledger, eps: float, norm: Norm, seed: int, room: BatchSizer
) -> Iterator[AttackProgress | dict[str, Any]]:
    """Examine the first images of a set; the last thing yielded is what was measured, plain numbers.

    `known`: what an evaluation has found already on images of the set; none of its stages is run again.
    """
    part = part.first(SAMPLE)
    sample = clean_pass(model, part, room)
    n = len(sample)
    found: dict[str, Any] = {
        "n": n, **room.with_oom_retry(lambda: _outputs(model, part.first(64), room.pass_size)),
        "zero_gradients": room.with_oom_retry(lambda: _zero_gradients(model, part, room.pass_size)),
    }  # fmt: skip
    for name, what in {
        "pgd10": attack_spec("pgd10", eps, 10, norm), "pgd100": attack_spec("pgd100", eps, 10, norm),
        "margin": attack_spec("cw", eps, 10, norm), "targeted": _targeted(eps, norm, found["classes"]),
    }.items():  # fmt: skip
        _recall(sample, known, list(what.stages))
        yield from run_attack(model, part, sample, what, seed, room, keep_examples=False)
        found[name] = int(sample.standing(what.stages).sum()) / n
    rest = sample.standing(list(sample.stages)).nonzero().flatten()
    black = AttackSpec("square", {"square": _square(eps, norm)}, eps, norm)
    left = sample.take(rest)
    yield from run_attack(model, Split(part.x[rest], part.y[rest]), left, black, seed, room, keep_examples=False)
    found["black_box"] = int((left.outcome("square") == BROKE).sum()) / n
    broken = ~sample.standing(list(sample.stages))
    broken[rest] |= left.outcome("square") == BROKE
    found["broken"] = sample.index[broken].tolist()  # places in the data set, for a shard holds only some of them
    most = MAX_EPS[norm]
    huge = HUGE if norm == "linf" else HUGE * math.sqrt(part.x[0].numel())
    found["huge"] = huge if huge <= most else None  # no attack takes so large a budget
    points = [{"eps": 0.0, "correct": int(sample.right.sum())}]
    for radius in sorted({*(min(factor * eps, most) for factor in CURVE), *([huge] if huge <= most else [])}):
        attack = PGD(eps=radius, alpha=2.5 * radius / 20, steps=20, norm=norm)
        what = AttackSpec("curve", {f"pgd20 at {radius:.3g}": attack}, radius, norm)
        yield from run_attack(model, part, sample, what, seed, room, keep_examples=False)
        points.append({"eps": radius, "correct": int(sample.standing(what.stages).sum())})
    yield {**found, "curve": points}


def _recall(sample: Ledger, known: Ledger, stages: list[str]) -> None:
    """Take over what the evaluation has found of the same images; the same attack would find the same."""
    place = {index: i for i, index in enumerate(known.index.tolist())}
    pairs = [(i, place[index]) for i, index in enumerate(sample.index.tolist()) if index in place]
    for stage in stages:
        if stage in known.stages and pairs:
            here, there = torch.tensor(pairs).T
            sample.outcome(stage)[here] = known.stages[stage][there]


def judge(measured: dict[str, Any] | None, ledger: Ledger, pgd: list[str], classes: int) -> dict[str, Any]:
    """The light, the gap in points, and every check as a flag or as passed; plain values.

    pgd: the stages that are PGD on the cross-entropy. classes: of the model, whichever of them are among the labels.
    """
    gap = _gap(ledger, pgd)
    checks = [*_of_ledger(ledger, gap, classes), *(_of_sample(measured, ledger) if measured else [])]
    if TARGETED in ledger.stages:  # then the number that is quoted is not PGD's
        checks = [_milder(check) if check.name in OF_PGD else check for check in checks]
    flags = [asdict(check) for check in checks if check.light != "green"]
    passed = [asdict(replace(check, meaning="")) for check in checks if check.light == "green"]
    said = light(checks) if measured and ledger.stages else "grey"  # without an attack there is nothing to believe
    gap_said = None if gap is None else round(gap[0], 2)
    return {"light": said, "gap": gap_said, "flags": flags, "examined": passed}


def _milder(check: Check) -> Check:
    return replace(check, light="yellow") if check.light == "red" else check


def light(checks: list[Check]) -> str:
    """The worst of the lights."""
    return max((check.light for check in checks), key=LIGHTS.index, default="grey")


def curve(measured: dict[str, Any]) -> dict[str, Any]:
    """The measured curve with its intervals."""
    n = measured["n"]
    points = []
    for point in measured["curve"]:
        low, high = wilson(point["correct"], n)
        points.append({"eps": point["eps"], "accuracy": point["correct"] / n, "low": low, "high": high})
    return {"attack": "PGD, 20 iterations of 2.5 eps / 20", "n": n, "points": points}


def _outputs(model: nn.Module, part: Split, size: int) -> dict[str, Any]:
    """Is the answer the same when asked twice, and in other company; is it probabilities; are the images left alone?"""
    x, _ = image_batch(model, part, slice(None))
    given = x.clone()
    with exact_inference(model, size) as view, torch.no_grad():
        once = view(given)
        altered = not torch.equal(given, x)
        again, others = view(x.clone()), view(x[::2].clone())
    scale = once.abs().amax().clamp(min=1e-9)
    sums = once.sum(1)
    return {
        "classes": once.shape[1],
        "differs": ((once - again).abs().amax() / scale).item(),
        "changes_its_mind": (once.argmax(1) != again.argmax(1)).float().mean().item(),
        "by_company": ((once[::2] - others).abs().amax() / scale).item(),
        "alters_images": altered,
        "probabilities": bool(once.min() >= 0 and once.max() <= 1 and (sums - 1).abs().max() < 1e-3),
    }


def _zero_gradients(model: nn.Module, part: Split, size: int) -> float:
    """Share of the images at which the gradient of the cross-entropy is exactly zero, or not finite."""
    x, y = image_batch(model, part, slice(None))
    zero = []
    for some, label in zip(x.split(size), y.split(size), strict=True):
        with exact_inference(model, size) as view:
            some = some.clone().requires_grad_()
            logits = view(some)
            (gradient,) = torch.autograd.grad(ce(logits, label).sum(), some)
            largest = gradient.flatten(1).abs().amax(1)  # NaN where any is
            zero.append(((largest == 0) | ~largest.isfinite()).cpu())
    return torch.cat(zero).float().mean().item()


def _targeted(eps: float, norm: Norm, classes: int) -> AttackSpec:
    if classes < 4:
        return attack_spec("apgd", eps, classes, norm)
    attack = torchattack(
        "APGDT", norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, steps=10, n_classes=min(10, classes)
    )
    return AttackSpec("apgd-t-10", {"apgd-t-10": attack}, eps, norm)


def _square(eps: float, norm: Norm) -> Any:
    named = {"linf": "Linf", "l2": "L2"}[norm]
    return torchattack("Square", norm=named, eps=eps, n_queries=300, loss="margin", resc_schedule=True)


def _gap(ledger: Ledger, pgd: list[str]) -> tuple[float, float] | None:
    """(points between the best PGD and the worst case, lower end of its interval); None without a PGD, or
    with nothing beside it."""
    if not pgd or set(ledger.stages) == set(pgd):
        return None
    best = min(pgd, key=lambda stage: int(ledger.standing([stage]).sum()))
    stands, worst = ledger.standing([best]), ledger.stands
    found = paired(len(ledger), int((stands & ~worst).sum()), int((worst & ~stands).sum()))
    return 100 * found.difference, 100 * found.low


def _of_ledger(ledger: Ledger, gap: tuple[float, float] | None, classes: int) -> Iterator[Check]:
    n, right = len(ledger), int(ledger.right.sum())
    low, _ = wilson(right, n)
    yield Check("chance-accuracy", "green" if low > 1 / classes else "red",
               f"{100 * right / n:.1f} % of the clean images are right, chance is {100 / classes:.1f} %",
               "the weights, the architecture or the input convention are likely wrong")  # fmt: skip
    if gap is not None:
        level = _level(gap[0] if gap[1] > GAP[0] / 2 else 0.0, *GAP)
        yield Check("pgd-to-strongest-gap", level, f"PGD leaves {gap[0]:.1f} points more standing than all attacks do",
                   "PGD flatters this model; quote the strongest attack only")  # fmt: skip
    if (ledger.rounded != UNTRIED).any():
        gain = 100 * int((ledger.rounded != BROKE).logical_and(ledger.rounded != UNTRIED).sum()) / n
        yield Check("eight-bit", _level(gain, ROUNDING, math.inf),
                   f"{gain:.1f} points of the broken images are no longer broken when the example is rounded to 8 bits",
                   "as files, these images resist better than the number says")  # fmt: skip


def _of_sample(found: dict[str, Any], ledger: Ledger) -> Iterator[Check]:
    n = found["n"]
    for doubt in found.get("doubts", []):
        yield Check("doubtful-reading", "yellow", doubt, "the network or its input convention may be another one")
    yield Check("randomised-output", "red" if found["differs"] > 1e-4 else "green",
               f"asked twice, logits differ by {100 * found['differs']:.2g} % of the largest, and the class for "
               f"{100 * found['changes_its_mind']:.1f} % of the images",
               "one attack on one draw says little; attack the average of many")  # fmt: skip
    random = found["differs"] > 1e-4
    yield Check("batch-dependent-output", "red" if found["by_company"] > 1e-3 and not random else "green",
               f"beside other images, logits differ by {100 * found['by_company']:.2g} % of the largest",
               "an image's class depends on those beside it, as in train mode; put the model in eval mode")  # fmt: skip
    yield Check("alters-its-images", "red" if found["alters_images"] else "green",
               f"the model {'writes into' if found['alters_images'] else 'leaves alone'} the images it is given",
               "attacks go on from images that are not theirs; let the model copy them")  # fmt: skip
    yield Check("probabilities", "red" if found["probabilities"] else "green",
               "outputs are probabilities" if found["probabilities"] else "outputs are no probabilities",
               "a loss on top of a softmax has hardly a gradient; return logits")  # fmt: skip
    zero = found["zero_gradients"]
    yield Check("zero-gradients", "red" if zero > ZERO_GRADIENTS else "green",
               f"the gradient is zero or not finite at {100 * zero:.1f} % of {n} images",
               "attacks that follow the gradient cannot move there")  # fmt: skip
    black = found["black_box"]
    yield Check("black-box-beats-white-box", _level(black, *BLACK_BOX) if black * n >= 3 else "green",
               f"300 random queries broke {100 * black:.1f} % of {n} images that no gradient attack did",
               "gradients do not lead where the model is weak")  # fmt: skip
    both, missed = _overlooked(found, ledger)
    yield Check("overlooked", _level(missed / both, *OVERLOOKED) if missed >= 3 else "green",
               f"short attacks of this check broke {missed} images that stand in the evaluation, of {both}",
               "the attacks chosen are too weak here; take aa")  # fmt: skip
    gained, better = 100 * (found["pgd10"] - found["pgd100"]), 100 * (found["pgd100"] - found["targeted"])
    lost = paired(n, max(0, round(n * better / 100)), 0)
    masked = gained <= NO_HELP and better >= MUCH_BETTER and 100 * lost.low > MUCH_BETTER / 2
    yield Check("more-steps-do-not-help", "red" if masked else "green",
               f"ten times the steps of PGD gain {gained:.1f} points, a targeted attack {better:.1f}",
               "PGD is stuck, not the model strong")  # fmt: skip
    if found["huge"] is None:
        return
    stands = next(point["correct"] for point in found["curve"] if point["eps"] == found["huge"]) / n
    yield Check("huge-eps", "red" if stands > STANDS_HUGE else "green",
               f"{100 * stands:.1f} % of {n} images stand at eps {found['huge']:.3g}, where nothing can",
               "the attack is failing: in so large a ball every image can be made any other")  # fmt: skip


def _overlooked(found: dict[str, Any], ledger: Ledger) -> tuple[int, int]:
    """(images of the sample that the ledger has, those of them that stand in it and that the checks broke)."""
    sampled = ledger.index < found["n"]  # the sample is the first images of the set
    broken = torch.isin(ledger.index, torch.tensor(found["broken"], dtype=torch.int64))
    return max(1, int(sampled.sum())), int((broken & ledger.stands).sum()) if ledger.stages else 0


def _level(value: float, yellow: float, red: float) -> str:
    return "red" if value >= red else "yellow" if value >= yellow else "green"
