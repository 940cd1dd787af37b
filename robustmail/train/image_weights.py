"""The weights that a run's margin and weighter would give to test images, as in its last epoch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from robustmail.data.image_files import LabelledImages
from robustmail.errors import PluginError, RecipeError
from robustmail.evaluation.evaluator import image_batch
from robustmail.evaluation.exact_inference import BatchSizer
from robustmail.memory import memory_of
from robustmail.plugin_calls import call_plugin, expect_batch
from robustmail.recipe import Recipe
from robustmail.runtime.rng import fork_rng, seed_all
from robustmail.step import Step
from robustmail.train.train_step import run_attack

__all__ = ["WEIGHED", "weights_of"]

WEIGHED = 500  # images, the first ones
BATCH = 100  # fixed, because a margin may depend on its batch


def weights_of(recipe: Recipe, model: nn.Module, part: LabelledImages, sizer: BatchSizer) -> list[float]:
    """Weights of the first WEIGHED images, of mean one over them where the weighter normalises; empty where there are
    none: no weighter, a margin that remembers what it saw in training, or one that cannot be called outside of it.

    recipe: of the run. model, part: the trained model and the test images. sizer: batch sizes.
    """
    last = recipe.at(recipe.epochs - 1)
    if last.margin is None or last.weighter is None or memory_of(last.margin):
        return []
    part = part.first(WEIGHED)
    try:
        margins = [
            sizer.with_oom_retry(partial(_margins, last, model, part, start, sizer))
            for start in range(0, len(part.y), BATCH)
        ]
        weights = call_plugin("weighter", last.weighter, torch.cat(margins))
        expect_batch("weighter", last.weighter, weights, len(part.y))
    except (PluginError, RecipeError):  # one's own plugin may need what only training knows
        return []
    return [float(f"{weight:.6g}") for weight in weights.tolist()]


def _margins(recipe: Recipe, model: nn.Module, part: LabelledImages, start: int, sizer: BatchSizer) -> Tensor:
    x, y = image_batch(model, part, slice(start, start + BATCH))
    with fork_rng(), sizer.exact_inference(model, x[:1]) as view:
        seed_all(recipe.seed, "weights", start)
        found = run_attack(recipe, view, x, y)
        margin = recipe.compute_margin(Step(view, x, y, found.x, found.trace))
    assert margin is not None
    return margin.detach().cpu()
