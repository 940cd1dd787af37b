"""Can the number be believed? Measurements on a sample of images that reveal masked gradients and other faults.

`measure` runs the model on a sample. `judge` reads these measurements and the ledger and needs no model, so that shards
and merged results are judged alike. docs/believing.md explains each check under its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from robustmail.attacks.pgd import PGD
from robustmail.attacks.torchattacks import torchattack
from robustmail.data.image_files import LabelledImages
from robustmail.evaluation.attack_specs import AttackSpec, attack_spec, in_turn, pgd_runs
from robustmail.evaluation.causes import Sample, cause_checks, measure_causes
from robustmail.evaluation.evaluator import clean_pass, image_batch, run_attack
from robustmail.evaluation.exact_inference import BatchSizer, exact_inference
from robustmail.evaluation.label_checks import label_checks
from robustmail.evaluation.ledger import BROKE, UNTRIED, Ledger
from robustmail.evaluation.measurements import MIN_IMAGES, Measurements, level, red_if
from robustmail.evaluation.output_checks import (
    BATCH_DEPENDENT_LOGITS,
    RANDOM_LOGITS,
    measure_draws,
    measure_outputs,
    output_checks,
)
from robustmail.evaluation.quantiles import by_weight, weight_check
from robustmail.evaluation.results import Check
from robustmail.evaluation.statistics import paired, wilson
from robustmail.functional import ce
from robustmail.norms import MAX_EPS, Norm
from robustmail.records import AttackProgress
from robustmail.step import Attack

__all__ = ["SAMPLE", "Check", "Measurements", "curve", "judge", "light", "measure"]

SAMPLE, LARGE_SAMPLE = 128, 8  # images that are measured, the first ones; on a CPU fewer where they are large
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
TARGETED = "apgd-t"  # the stage of AutoAttack that does not have PGD's weakness
OF_PGD = ("pgd-to-strongest-gap", "more-steps-do-not-help")  # checks of what PGD alone can do here
OF_SCALE, NO_SCALE = "logit-scale", ("apgd-t", "cw", "md")  # these attacks compare logits, whose scale they do not see
CURVE = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)  # of eps


def measure(
    model: nn.Module, part: LabelledImages, known: Ledger, eps: float, norm: Norm, seed: int, sizer: BatchSizer
) -> Iterator[AttackProgress | dict[str, Any]]:
    """Measure on the first images what the checks need: yields progress, and at last the measurements as plain
    values (see `Measurements`).

    model, part: the model and all images of the data set.
    known: the evaluation's ledger; stages in it are not run again on its images.
    eps, norm, seed: of the evaluation.
    sizer: batch sizes.
    """
    part = part.first(LARGE_SAMPLE if sizer.is_large else SAMPLE)
    sample = clean_pass(model, part, sizer)
    n = len(sample)
    results: dict[str, Any] = {
        "n": n,
        **sizer.with_oom_retry(lambda: measure_outputs(model, part.first(64), sizer.pass_size)),
        "zero_gradients": sizer.with_oom_retry(lambda: _zero_gradients(model, part, sizer.pass_size)),
    }
    pgd10, pgd100 = (attack_spec(name, eps, 10, norm) for name in ("pgd10", "pgd100"))
    square = AttackSpec("square-300", {"square-300": _square(eps, norm)}, eps, norm)
    # Both lengths of PGD attack all images, for they are compared; the others what PGD-100 left standing.
    others = in_turn([pgd100, _targeted(eps, norm, results["classes"]), attack_spec("cw", eps, 10, norm), square])
    for spec in (pgd10, others):
        _recall(sample, known, list(spec.stages))
        yield from run_attack(model, part, sample, spec, seed, sizer, keep_examples=False)
    for name, stages in {"pgd10": ["pgd10"], "pgd100": ["pgd100"], "targeted": list(others.stages)[:2]}.items():
        results[name] = int(sample.standing(stages).sum()) / n
    before_square = sample.standing([stage for stage in sample.stages if stage != square.name])
    results["black_box"] = int((before_square & (sample.outcome(square.name) == BROKE)).sum()) / n
    results["broken"] = sample.index[~sample.standing(list(sample.stages))].tolist()  # places: a shard has only some
    missed = sample.standing(["pgd100"]) & ~sample.standing(list(sample.stages))
    huge = HUGE if norm == "linf" else HUGE * math.sqrt(part.x[0].numel())
    results["huge"] = huge if huge <= MAX_EPS[norm] else None  # no attack takes so large an eps
    curve = _curve_spec(eps, norm, results["huge"])
    yield from run_attack(model, part, sample, curve, seed, sizer, keep_examples=False)
    points, stages = [{"eps": 0.0, "correct": int(sample.right.sum())}], []
    for stage, attack in curve.stages.items():
        stages.append(stage)
        points.append({"eps": attack.eps, "correct": int(sample.standing(stages).sum())})  # type: ignore[attr-defined]
    results["curve"] = points
    if results["differs"] > RANDOM_LOGITS:
        draws = sizer.with_oom_retry(lambda: measure_draws(model, part, eps, norm, seed, sizer.pass_size))
        results["draws"] = draws
    elif results["by_company"] <= BATCH_DEPENDENT_LOGITS:  # otherwise verdicts say nothing of causes
        causes = yield from measure_causes(Sample(model, part, sample, missed, eps, norm, seed, sizer))
        results["causes"] = causes
    yield results


def _curve_spec(eps: float, norm: Norm, huge: float | None) -> AttackSpec:
    """PGD at several eps, smallest first: an image that is broken at one of them is broken at all larger ones."""
    radii = {min(factor * eps, MAX_EPS[norm]) for factor in CURVE} | ({huge} if huge is not None else set())
    stages: dict[str, Attack] = {
        f"pgd20 at {radius:.6g}": PGD(eps=radius, alpha=2.5 * radius / 20, steps=20, norm=norm)
        for radius in sorted(radii)
    }
    return AttackSpec("curve", stages, max(radii), norm)


def _recall(sample: Ledger, known: Ledger, stages: list[str]) -> None:
    """Copy outcomes of the same images from the evaluation's ledger: the same attack would have the same outcomes."""
    position = {index: i for i, index in enumerate(known.index.tolist())}
    pairs = [(i, position[index]) for i, index in enumerate(sample.index.tolist()) if index in position]
    for stage in stages:
        if stage in known.stages and pairs:
            in_sample, in_known = torch.tensor(pairs).T
            sample.outcome(stage)[in_sample] = known.stages[stage][in_known]


def judge(measured: dict[str, Any] | None, ledger: Ledger, pgd: list[str], classes: int) -> dict[str, Any]:
    """The light, the gap in points, and all checks, as results.json has them.

    measured: what `measure` yielded last; None if it was not run.
    ledger: the evaluation's.
    pgd: the stages that are PGD on the cross-entropy.
    classes: of the model, whichever of them are among the labels.
    """
    gap = _gap(ledger, pgd)
    checks = [*_ledger_checks(ledger, gap, classes), *label_checks(ledger, classes)]
    if measured:
        m = Measurements.of(measured)
        checks += [*_sample_checks(m, ledger), *weight_check(by_weight(m.weights, ledger))]
    stages = {stage.partition("(")[0] for stage in ledger.stages}
    checks = [_milder(check, stages) for check in checks]
    colour = light(checks) if measured and ledger.stages else "grey"  # without an attack there is nothing to believe
    return {
        "light": colour,
        "gap": None if gap is None else round(gap[0], 2),
        "flags": [asdict(check) for check in checks if check.light != "green"],
        "examined": [asdict(replace(check, meaning="")) for check in checks if check.light == "green"],
    }


def _milder(check: Check, stages: set[str]) -> Check:
    """The check where the number that is quoted is not that of PGD on the cross-entropy alone."""
    if check.name == OF_SCALE and not stages.isdisjoint(NO_SCALE):
        return replace(check, light={"red": "yellow"}.get(check.light, "green"))
    is_softened = check.name in OF_PGD and check.light == "red" and TARGETED in stages
    return replace(check, light="yellow") if is_softened else check


def light(checks: list[Check]) -> str:
    """The worst light of the checks: "green", "yellow" or "red"; "grey" without checks."""
    return max((check.light for check in checks), key=LIGHTS.index, default="grey")


def curve(measured: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by eps as results.json has it: the measured points with 95 % intervals."""
    n = measured["n"]
    points = []
    for point in measured["curve"]:
        low, high = wilson(point["correct"], n)
        points.append({"eps": point["eps"], "accuracy": point["correct"] / n, "low": low, "high": high})
    attack = "PGD, 20 iterations of 2.5 eps / 20 (what a smaller eps broke stays broken)"
    return {"attack": attack, "n": n, "points": points}


def _zero_gradients(model: nn.Module, part: LabelledImages, size: int) -> float:
    """Share of the images at which the gradient of the cross-entropy is exactly zero, or not finite."""
    x, y = image_batch(model, part, slice(None))
    zero = []
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        with exact_inference(model, size) as view:
            images = images.clone().requires_grad_()
            logits = view(images)
            (gradient,) = torch.autograd.grad(ce(logits, labels).sum(), images)
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
    norm_name = {"linf": "Linf", "l2": "L2"}[norm]
    return torchattack("Square", norm=norm_name, eps=eps, n_queries=300, loss="margin", resc_schedule=True)


def _gap(ledger: Ledger, pgd: list[str]) -> tuple[float, float] | None:
    """(points between the best PGD and the worst case, lower end of their 95 % interval); None without PGD, or if no
    other attack was run."""
    if not pgd or set(ledger.stages) == set(pgd):
        return None
    best = min(pgd_runs(pgd), key=lambda stages: int(ledger.standing(stages).sum()))
    stands, worst = ledger.standing(best), ledger.stands
    difference = paired(len(ledger), int((stands & ~worst).sum()), int((worst & ~stands).sum()))
    return 100 * difference.difference, 100 * difference.low


# The checks


def _ledger_checks(ledger: Ledger, gap: tuple[float, float] | None, classes: int) -> Iterator[Check]:
    """Checks that need the ledger only."""
    n, right = len(ledger), int(ledger.right.sum())
    low, _ = wilson(right, n)
    yield Check(
        "chance-accuracy",
        red_if(low <= 1 / classes),
        f"{100 * right / n:.1f} % of the clean images are right, chance is {100 / classes:.1f} %",
        "the weights, the architecture or the input convention are likely wrong",
    )
    if gap is not None:
        points, interval_low = gap
        yield Check(
            "pgd-to-strongest-gap",
            level(points if interval_low > GAP[0] / 2 else 0.0, *GAP),
            f"PGD leaves {points:.1f} points more standing than all attacks do",
            "PGD flatters this model; quote the strongest attack only",
        )
    if (ledger.rounded != UNTRIED).any():
        gain = 100 * int((ledger.rounded != BROKE).logical_and(ledger.rounded != UNTRIED).sum()) / n
        yield Check(
            "eight-bit",
            level(gain, ROUNDING, math.inf),
            f"{gain:.1f} points of the broken images are no longer broken when the example is rounded to 8 bits",
            "as files, these images resist better than the number says",
        )


def _sample_checks(m: Measurements, ledger: Ledger) -> Iterator[Check]:
    """Checks that need measurements on the sample."""
    for doubt in m.doubts:
        yield Check("doubtful-reading", "yellow", doubt, "the network or its input convention may be another one")
    yield from output_checks(m, has_eot=any("eot" in stage for stage in ledger.stages))
    yield Check(
        "zero-gradients",
        red_if(m.zero_gradients > ZERO_GRADIENTS),
        f"the gradient is zero or not finite at {100 * m.zero_gradients:.1f} % of {m.n} images",
        "attacks that follow the gradient cannot move there",
    )
    yield Check(
        "black-box-beats-white-box",
        level(m.black_box, *BLACK_BOX) if m.black_box * m.n >= MIN_IMAGES else "green",
        f"300 random queries broke {100 * m.black_box:.1f} % of {m.n} images that no gradient attack did",
        "gradients do not lead where the model is weak",
    )
    n_common, n_missed = _overlooked(m.n, m.broken, ledger)
    yield Check(
        "overlooked",
        level(n_missed / n_common, *OVERLOOKED) if n_missed >= MIN_IMAGES else "green",
        f"short attacks of this check broke {n_missed} images that stand in the evaluation, of {n_common}",
        "the attacks chosen are too weak here; take aa",
    )
    by_steps, by_target = 100 * (m.pgd10 - m.pgd100), 100 * (m.pgd100 - m.targeted)
    difference = paired(m.n, max(0, round(m.n * by_target / 100)), 0)
    is_stuck = by_steps <= NO_HELP and by_target >= MUCH_BETTER and 100 * difference.low > MUCH_BETTER / 2
    yield Check(
        "more-steps-do-not-help",
        red_if(is_stuck),
        f"ten times the steps of PGD gain {by_steps:.1f} points, a targeted attack {by_target:.1f}",
        "PGD is stuck, not the model strong",
    )
    if m.huge is not None:
        standing = next(point["correct"] for point in m.curve if point["eps"] == m.huge) / m.n
        yield Check(
            "huge-eps",
            red_if(standing > STANDS_HUGE),
            f"{100 * standing:.1f} % of {m.n} images stand at eps {m.huge:.3g}, where nothing can",
            "the attack is failing: in so large a ball every image can be made any other",
        )
    yield from cause_checks(m)


def _overlooked(n_sample: int, broken_places: list[int], ledger: Ledger) -> tuple[int, int]:
    """(images both of the sample and of the ledger, those of them that stand in the ledger but that the checks
    broke)"""
    in_sample = ledger.index < n_sample  # the sample is the first images of the data set
    broken = torch.isin(ledger.index, torch.tensor(broken_places, dtype=torch.int64))
    return max(1, int(in_sample.sum())), int((broken & ledger.stands).sum()) if ledger.stages else 0
