"""The values of margins on the same examples, with one thing changed at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robustmail.attacks.pgd import PGD
from robustmail.data.dataset import Split
from robustmail.data.sources import digits
from robustmail.evaluation.evaluator import image_batch
from robustmail.evaluation.exact_inference import exact_inference
from robustmail.margin_lab.attack_paths import AttackPath, second_path
from robustmail.margin_lab.results import CAUSES, Cost
from robustmail.objectives import AT
from robustmail.plugin_calls import call_plugin, plugin_error
from robustmail.recipe import Recipe
from robustmail.records import ProgressUpdate
from robustmail.runtime.rng import fork_rng, seed_all
from robustmail.step import Margin, Step
from robustmail.train.dry_run import Passes, dry_run
from robustmail.weighters import Sigmoid

__all__ = ["MarginValues", "margin_cost", "margin_values"]

MarginValues = dict[str, npt.NDArray[np.float32]]
"""Values of one margin by what was changed (see `CAUSES`): [1 + variations, N] each, the reference in row 0."""

BATCH = 100  # fixed, because a margin may depend on its batch


def margin_cost(margin: Margin, steps: int, classes: int, shape: tuple[int, int, int]) -> tuple[Cost, Cost]:
    """Count (the passes that a margin adds to a training step of AT, the passes of the attack), in a dry run.

    steps: of the attack, PGD.
    classes: number of classes.
    shape: of an image, (C, H, W).

    Raises PluginError: the margin fails, returns NaN, or does not return one number per example.
    """
    without_margin = Recipe(data=digits(), model="small_cnn", attack=PGD(steps=steps), objective=AT(), epochs=1)
    with_margin = without_margin.but(margin=margin, weighter=Sigmoid(slope=1.0, bias=0.0))
    before, after = (_count_passes(recipe, classes, shape) for recipe in (without_margin, with_margin))
    return Cost(after.update[0] - before.update[0], after.update[1] - before.update[1]), Cost(*before.attack)


def _count_passes(recipe: Recipe, classes: int, shape: tuple[int, int, int]) -> Passes:
    return dry_run(recipe, classes, shape)[0]


def margin_values(
    model: nn.Module, part: Split, paths: Sequence[AttackPath], margins: Mapping[str, Margin], seed: int, size: int
) -> Iterator[ProgressUpdate | dict[str, MarginValues]]:
    """Evaluate every margin on every example and on its controlled variations; yields progress, then the values.

    The variations:
        draw: the same step again with new random numbers, for margins that draw some.
        path: the reference's x_adv, the same bits, with the traces of the other paths (see `second_path`).
        end: the x_adv of the other paths with the reference's trace.
        both: x_adv and trace of the other paths.

    model: takes images in [0, 1], returns logits [B, classes].
    part: the N examples.
    paths: the attack paths of these examples, the reference first.
    margins: by name.
    seed: of the random numbers that a margin draws.
    size: images in one forward pass (slice of `exact_inference`).

    Raises PluginError: a margin fails or does not return one number per example.
    """
    batches: dict[str, dict[str, list[npt.NDArray[np.float32]]]] = {
        name: {cause: [] for cause in CAUSES} for name in margins
    }
    for start in range(0, len(part.y), BATCH):
        rows = slice(start, start + BATCH)
        x, y = image_batch(model, part, rows)
        batch_paths = [path.take(rows, x.device) for path in paths]
        with exact_inference(model, size) as view:
            for cause, steps in _variations(view, x, y, batch_paths).items():
                for step in steps:
                    step.logits_nat, step.logits_adv  # noqa: B018  computed once, for all margins
                for name, margin in margins.items():
                    seeds = [(seed, "margin", start, k if cause == "draw" else 0) for k in range(len(steps))]
                    values = [_evaluate(margin, step, *parts) for step, parts in zip(steps, seeds, strict=True)]
                    batches[name][cause].append(np.stack(values))
        yield ProgressUpdate("margins", min(start + BATCH, len(part.y)), len(part.y))
    yield {
        name: {cause: np.concatenate(values, 1) for cause, values in by_cause.items()}
        for name, by_cause in batches.items()
    }


def _variations(view: nn.Module, x: Tensor, y: Tensor, paths: Sequence[AttackPath]) -> dict[str, list[Step]]:
    """The steps by what is changed; the reference comes first in each list."""
    first, other_paths = paths[0], paths[1:]
    reference = Step(view, x, y, first.x_adv, first.trace)
    with torch.no_grad():
        return {
            "draw": [reference, reference],
            "path": [reference, *(Step(view, x, y, first.x_adv, second_path(first, path)) for path in other_paths)],
            "end": [reference, *(Step(view, x, y, path.x_adv, first.trace) for path in other_paths)],
            "both": [reference, *(Step(view, x, y, path.x_adv, path.trace) for path in other_paths)],
        }


def _evaluate(margin: Margin, step: Step, *seed: int | str) -> npt.NDArray[np.float32]:
    """Values of a margin, [B]; its random numbers depend on `seed` alone."""
    with fork_rng():  # gradients stay on: a margin may attack the model; the parameters need no gradient here
        seed_all(*seed)
        values = call_plugin("margin", margin, step.detached())
    if not isinstance(values, Tensor) or values.shape != step.y.shape:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise plugin_error(
            "margin", margin, f"returned {got} for a batch of {len(step.y)}", "Return one number per example."
        )
    array: npt.NDArray[np.float32] = values.detach().float().cpu().numpy()
    return array
