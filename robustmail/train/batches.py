"""The batches of training: which images a step takes, and what is done to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustmail.data.dataset import ImageData, Split, augment, batch_indices, to_float
from robustmail.fields import describe
from robustmail.functional import one_hot
from robustmail.plugin_calls import call_plugin, plugin_error
from robustmail.recipe import Recipe
from robustmail.runtime.deferred import to_device
from robustmail.runtime.rng import generator

__all__ = ["Batch", "augment_batch", "augmentation_text", "draw_batch", "epoch_batches"]


class Batch(NamedTuple):
    """What one step trains on, all processes together."""

    x: Tensor
    """[B, C, H, W] in [0, 1], augmented"""
    y: Tensor
    """[B] int64; of a mixed image the class with the largest share"""
    targets: Tensor | None = None
    """[B, classes] float32, mixed and smoothed; None where every label is hard"""


def epoch_batches(n: int, size: int, seed: int, epoch: int) -> list[Tensor]:
    """The places in the training set, [B] each, that the steps of an epoch take; on the host.

    n: number of training images. size: images in a batch. seed: of the recipe. epoch: from 0.
    """
    return batch_indices(n, size, generator(seed, "order", epoch))


def draw_batch(recipe: Recipe, images: ImageData, train: Split, places: Tensor, position: tuple[int, int]) -> Batch:
    """Take the images at `places`, [B], of the training part, and augment them; all draws are made on the host.

    recipe: `Recipe.at(epoch)`.
    images: says which augmentation suits the data, for a recipe without its own.
    train: the training part, on the device.
    places: on the host.
    position: (epoch, step), both from 0, which seeds the draws.

    Raises PluginError for an augmentation that fails, or returns something of another shape.
    """
    rows = to_device(train.x.device, places)
    rng = generator(recipe.seed, "augment", *position)
    x = train.x[rows]
    if recipe.augment is None:
        x = augment(x, images.pad, images.flip, rng)
    return augment_batch(recipe, to_float(x), train.y[rows], images.classes, rng)


def augment_batch(recipe: Recipe, x: Tensor, y: Tensor, classes: int, rng: torch.Generator) -> Batch:
    """Apply the recipe's own augmentations, then its label smoothing.

    recipe: without schedules.
    x: [B, C, H, W] in [0, 1].
    y: [B] int64.
    classes: number of classes.
    rng: on the host.

    Targets stay None where no augmentation has replaced them and nothing is smoothed. Raises PluginError.
    """
    targets = hard = one_hot(y, classes)
    for augmentation in recipe.augment or ():
        result = call_plugin("augmentation", augmentation, x, targets, rng)
        _check_result(augmentation, result, x, targets)
        x, targets = result
    if targets is not hard:  # a tie keeps the image's own class
        largest, other = targets.max(1)
        y = torch.where(targets.gather(1, y[:, None]).squeeze(1) < largest, other, y)
    elif not recipe.label_smoothing:
        return Batch(x, y)
    return Batch(x, y, (1 - recipe.label_smoothing) * targets + recipe.label_smoothing / classes)


def augmentation_text(recipe: Recipe, images: ImageData) -> str:
    """What is done to training images and labels, in words."""
    own = recipe.augment
    text = images.augmentation if own is None else ", ".join(map(describe, own)) or "none"
    return f"{text}; labels smoothed by {recipe.label_smoothing:g}" if recipe.label_smoothing else text


def _check_result(augmentation: Any, result: Any, *given: Tensor) -> None:
    """An augmentation returns images and targets as it was given them: same shape, type and device."""
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
        wrong = f"returned {type(result).__name__}, expected a pair of tensors, (x, targets)"
        raise plugin_error("augmentation", augmentation, wrong)
    for name, part, old in zip(("x", "targets"), result, given, strict=True):
        if (part.shape, part.dtype, part.device) != (old.shape, old.dtype, old.device):
            returned, expected = (f"{str(t.dtype)[6:]} {list(t.shape)} on {t.device}" for t in (part, old))
            raise plugin_error("augmentation", augmentation, f"returned {name} as {returned}, expected {expected}")
