"""What margins say of the same examples, one thing changed at a time."""

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

__all__ = ["Values", "margin_cost", "margin_values"]

Values = dict[str, npt.NDArray[np.float32]]
"""What a margin says by what was changed: [1 + changes, N] each, the reference in the first row"""

BATCH = 100  # a margin sees so many at once, whatever fits: it may look at its batch


def margin_cost(margin: Margin, steps: int, classes: int, shape: tuple[int, int, int]) -> tuple[Cost, Cost]:
    """(what a margin adds to a training step of AT, what its attack costs), in passes; rehearsed on random images.

    Raises PluginError for a margin that fails, returns NaN or anything but one number per example.
    """
    plain = Recipe(data=digits(), model="small_cnn", attack=PGD(steps=steps), objective=AT(), epochs=1)
    with_margin = plain.but(margin=margin, weighter=Sigmoid(slope=1.0, bias=0.0))
    base, more = (_passes(recipe, classes, shape) for recipe in (plain, with_margin))
    return Cost(more.update[0] - base.update[0], more.update[1] - base.update[1]), Cost(*base.attack)


def _passes(recipe: Recipe, classes: int, shape: tuple[int, int, int]) -> Passes:
    return dry_run(recipe, classes, shape)[0]


def margin_values(
    model: nn.Module, part: Split, paths: Sequence[AttackPath], margins: Mapping[str, Margin], seed: int, size: int
) -> Iterator[ProgressUpdate | dict[str, Values]]:
    """Ask every margin about every example: as it is, and with one thing changed; at last the answers are yielded.

    draw: the same step again, another draw of whatever the margin itself draws. path: the reference's end, which is
    thus the same to the bit, with the traces of other paths (see `second_path`). end: the ends of other paths, with the
    reference's trace. both: the other paths as they come. Raises PluginError where a margin fails.
    """
    answers: dict[str, dict[str, list[npt.NDArray[np.float32]]]] = {m: {c: [] for c in CAUSES} for m in margins}
    for start in range(0, len(part.y), BATCH):
        which = slice(start, start + BATCH)
        x, y = image_batch(model, part, which)
        ways = [path.take(which, x.device) for path in paths]
        with exact_inference(model, size) as view:
            for cause, steps in _steps(view, x, y, ways).items():
                for step in steps:
                    step.logits_nat, step.logits_adv  # noqa: B018  computed once, for all margins
                for name, margin in margins.items():
                    rows = []
                    for k, step in enumerate(steps):
                        draw = k if cause == "draw" else 0
                        rows.append(_ask(name, margin, step, (seed, "margin", start, draw)))
                    answers[name][cause].append(np.stack(rows))
        yield ProgressUpdate("margins", min(start + BATCH, len(part.y)), len(part.y))
    yield {name: {cause: np.concatenate(rows, 1) for cause, rows in by.items()} for name, by in answers.items()}


def _steps(view: nn.Module, x: Tensor, y: Tensor, ways: Sequence[AttackPath]) -> dict[str, list[Step]]:
    """The reference's step and the changed ones, by what is changed."""
    first, others = ways[0], ways[1:]
    reference = Step(view, x, y, first.x_adv, first.trace)
    with torch.no_grad():
        return {
            "draw": [reference, reference],
            "path": [reference, *(Step(view, x, y, first.x_adv, second_path(first, way)) for way in others)],
            "end": [reference, *(Step(view, x, y, way.x_adv, first.trace) for way in others)],
            "both": [reference, *(Step(view, x, y, way.x_adv, way.trace) for way in others)],
        }


def _ask(name: str, margin: Margin, step: Step, where: tuple[int | str, ...]) -> npt.NDArray[np.float32]:
    """[B]: what a margin says, drawing from generators that are a function of `where`."""
    with fork_rng():  # with gradients: a margin may attack the model itself, whose weights need none here
        seed_all(*where)
        value = call_plugin("margin", margin, step.detached())
    if not isinstance(value, Tensor) or value.shape != step.y.shape:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise plugin_error(
            "margin", margin, f"returned {got} for a batch of {len(step.y)}", "Return one number per example."
        )
    found: npt.NDArray[np.float32] = value.detach().float().cpu().numpy()
    return found
