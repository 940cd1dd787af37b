"""Checks of a model's outputs: do they repeat, also beside other images, are they logits, is the input left alone?

docs/believing.md explains each check under its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.attacks.pgd import PGD
from robustmail.attacks.view import call_model
from robustmail.data.image_files import LabelledImages
from robustmail.evaluation.evaluator import image_batch
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.evaluation.measurements import Measurements, red_if
from robustmail.evaluation.results import Check
from robustmail.norms import Norm
from robustmail.runtime.rng import seed_all

__all__ = ["BATCH_DEPENDENT_LOGITS", "RANDOM_LOGITS", "measure_draws", "measure_outputs", "output_checks"]

RANDOM_LOGITS = 1e-4  # difference of logits between two passes, as a share of the largest
BATCH_DEPENDENT_LOGITS = 1e-3  # the same beside other images
DRAWS, EOT = 20, 10  # passes that judge a model which answers at random; passes in each of its gradients


def measure_outputs(model: nn.Module, part: LabelledImages, size: int) -> dict[str, Any]:
    """Whether outputs repeat, also beside other images; whether they are probabilities; whether the input is
    unchanged."""
    x, _ = image_batch(model, part, slice(None))
    given = x.clone()
    with exact_inference(model, size) as view, torch.no_grad():
        call_model(model, given[:size])  # not through the view, which hands out copies
        alters_images = not torch.equal(given, x)
        first, second, beside_others = view(x), view(x), view(x[::2])
    scale = first.abs().amax().clamp(min=1e-9)
    sums = first.sum(1)
    return {
        "classes": first.shape[1],
        "differs": ((first - second).abs().amax() / scale).item(),
        "changes_its_mind": (first.argmax(1) != second.argmax(1)).float().mean().item(),
        "by_company": ((first[::2] - beside_others).abs().amax() / scale).item(),
        "alters_images": alters_images,
        "probabilities": bool(first.min() >= 0 and first.max() <= 1 and (sums - 1).abs().max() < 1e-3),
    }


def measure_draws(
    model: nn.Module, part: LabelledImages, eps: float, norm: Norm, seed: int, size: int
) -> dict[str, dict[str, float]]:
    """How much the verdicts of a model that answers at random move between DRAWS passes: on clean images, and under
    PGD-20 whose gradients are averages of EOT passes.

    model, part: the model and the images. eps, norm, seed: of the evaluation. size: images in a pass.
    """
    x, y = image_batch(model, part, slice(None))
    attack = PGD(eps=eps, alpha=eps / 8, steps=20, norm=norm, eot=EOT)
    with exact_inference(model, size) as view:
        seed_all(seed, "draws")
        images = {"clean": x, "attacked": attack(view, x, y).x}
        with torch.no_grad():
            right = {kind: torch.stack([view(x).argmax(1) == y for _ in range(DRAWS)]) for kind, x in images.items()}
    return {kind: _moves(by_draw) for kind, by_draw in right.items()}


def _moves(right: Tensor) -> dict[str, float]:
    """right: [DRAWS, N] bool. Shares of images: right in a draw on average, at least, at most; of both kinds."""
    by_draw, by_image = right.float().mean(1), right.float().mean(0)
    moves = ((by_image > 0) & (by_image < 1)).float().mean()
    return {"mean": by_draw.mean().item(), "low": by_draw.min().item(), "high": by_draw.max().item(),
            "moves": moves.item()}  # fmt: skip


def output_checks(m: Measurements, has_eot: bool) -> Iterator[Check]:
    """Judge what was measured. has_eot: whether an attack of the evaluation averages its gradients."""
    is_random = m.differs > RANDOM_LOGITS
    yield (
        _randomness(m, has_eot)
        if is_random
        else Check(
            "randomised-output", "green", f"asked twice, logits differ by {100 * m.differs:.2g} % of the largest", ""
        )
    )
    yield Check(
        "batch-dependent-output",
        red_if(m.by_company > BATCH_DEPENDENT_LOGITS and not is_random),
        f"beside other images, logits differ by {100 * m.by_company:.2g} % of the largest",
        "an image's class depends on those beside it, as in train mode; put the model in eval mode",
    )
    yield Check(
        "alters-its-images",
        red_if(m.alters_images),
        f"the model {'writes into' if m.alters_images else 'leaves alone'} the images it is given",
        "attacks go on from images that are not theirs; let the model copy them",
    )
    yield Check(
        "probabilities",
        red_if(m.probabilities),
        "outputs are probabilities" if m.probabilities else "outputs are no probabilities",
        "a loss on top of a softmax has hardly a gradient; return logits",
    )


def _randomness(m: Measurements, has_eot: bool) -> Check:
    measured = (
        f"asked twice, logits differ by {100 * m.differs:.2g} % of the largest, and the class for "
        f"{100 * m.changes_its_mind:.1f} % of the images"
    )
    if m.draws:
        clean, attacked = (_shares(m.draws[kind]) for kind in ("clean", "attacked"))
        measured += (
            f"; in {DRAWS} draws the verdict moves for {100 * m.draws['attacked']['moves']:.1f} % of {m.n} images, on "
            f"average {clean} are right, under PGD-20 with eot={EOT} {attacked}"
        )
    meaning = "each verdict is one draw; quote these averages beside the number"
    if not has_eot:
        meaning = "without EOT the number is a lottery; attack the average of many draws, as pgd100(eot=20) does"
    return Check("randomised-output", "red", measured, meaning)


def _shares(draws: dict[str, float]) -> str:
    """`90.1 % (86.7 to 93.8 %)`"""
    return f"{100 * draws['mean']:.1f} % ({100 * draws['low']:.1f} to {100 * draws['high']:.1f} %)"
