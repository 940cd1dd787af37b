"""The batches of training: which images a step takes, and what is done to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from robustmail.augmentations.geometry import Crop, Flip
from robustmail.data.dataset import Extra, ImageData, Split, batch_indices, to_float
from robustmail.errors import RecipeError
from robustmail.fields import describe
from robustmail.functional import one_hot
from robustmail.plugin_calls import call_plugin, plugin_error
from robustmail.recipe import Recipe
from robustmail.runtime.deferred import to_device
from robustmail.runtime.rng import generator
from robustmail.step import Augmentation

__all__ = [
    "Batch",
    "augment_batch",
    "augmentation_text",
    "crops_and_flips",
    "draw_batch",
    "epoch_batches",
    "name_places",
]


class Batch(NamedTuple):
    """What one step trains on, all processes together."""

    x: Tensor
    """[B, C, H, W] in [0, 1], augmented"""
    y: Tensor
    """[B] int64; of a mixed image the class with the largest share"""
    targets: Tensor | None = None
    """[B, classes] float32, mixed and smoothed; None where every label is hard"""


def epoch_batches(n: int, size: int, seed: int, epoch: int, extra: Extra | None = None) -> list[Tensor]:
    """The places, [B] each, that the steps of an epoch take; on the host.

    n: number of training images, which have the places 0 ... n - 1.
    size: images in a batch.
    seed: of the recipe.
    epoch: from 0.
    extra: images that are mixed into every batch; the k-th has the place n + k.

    An epoch has ceil(n / size) steps in any case. With extra images, each batch has int(share * size) of them, drawn
    with replacement, behind the next ones of the epoch's shuffled training images, of which an epoch then sees a part.
    Raises RecipeError where that leaves no extra image in a batch.
    Source: Gowal et al., Improving Robustness using Generated Data, 2021.
    """
    rng = generator(seed, "order", epoch)
    if extra is None:
        return batch_indices(n, size, rng)
    n_extra = int(extra.share * size)
    if n_extra == 0:
        given = f"mixed (given share={extra.share:g})"
        raise RecipeError(given, f"leaves no extra image in a batch of {size}", "Raise share or batch.")
    order, steps = torch.randperm(n, generator=rng), -(-n // size)
    return [
        torch.cat([
            order[step * (size - n_extra) : (step + 1) * (size - n_extra)],
            n + torch.randint(len(extra), (n_extra,), generator=generator(seed, "extra", epoch, step)),
        ])
        for step in range(steps)
    ]  # fmt: skip


def draw_batch(recipe: Recipe, images: ImageData, train: Split, places: Tensor, position: tuple[int, int]) -> Batch:
    """Take the images at `places`, [B], and augment them; all draws are made on the host.

    recipe: `Recipe.at(epoch)`.
    images: says which augmentation suits the data, for a recipe without its own, and has the extra images.
    train: the training part, on the device.
    places: as `epoch_batches` has them, on the host.
    position: (epoch, step), both from 0, which seeds the draws.

    Raises PluginError for an augmentation that fails, or returns something of another shape.
    """
    x, y = _take(images.extra, train, places)
    rng = generator(recipe.seed, "augment", *position)
    suited = crops_and_flips(images.pad, images.flip)
    return augment_batch(recipe, to_float(x), y, images.classes, rng, suited)


def crops_and_flips(pad: int, flip: bool) -> tuple[Augmentation, ...]:
    """The augmentation of a data source: a random crop of the padded image, and its mirror image where it may be one.

    A crop draws without a padding, too, so that the mirror images of a seed do not depend on it.
    """
    if not (pad or flip):
        return ()
    return (Crop(pad), Flip()) if flip else (Crop(pad),)


def augment_batch(
    recipe: Recipe, x: Tensor, y: Tensor, classes: int, rng: torch.Generator, suited: Sequence[Augmentation] = ()
) -> Batch:
    """Apply the recipe's own augmentations, or those that suit the data, then its label smoothing.

    recipe: without schedules.
    x: [B, C, H, W] in [0, 1].
    y: [B] int64.
    classes: number of classes.
    rng: on the host.
    suited: the augmentations of a recipe without its own.

    Targets stay None where no augmentation has replaced them and nothing is smoothed. Raises PluginError.
    """
    targets = hard = one_hot(y, classes)
    for augmentation in suited if recipe.augment is None else recipe.augment:
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


def name_places(places: Tensor, n: int, most: int = 8) -> str:
    """The first places of a batch in words: "training images 3, 1, ..., extra images 70, ..."; n: training images."""
    parts = {"training": places[places < n], "extra": places[places >= n] - n}
    return ", ".join(
        f"{kind} images {', '.join(map(str, part[:most].tolist()))}{', ...' if len(part) > most else ''}"
        for kind, part in parts.items() if len(part)
    )  # fmt: skip


def _take(extra: Extra | None, train: Split, places: Tensor) -> Split:
    """The images at `places`, [B], bytes and labels, on the device of the training part."""
    n, device = len(train.y), train.x.device
    rows = to_device(device, places if extra is None else places[places < n])
    part = Split(train.x[rows], train.y[rows])
    if extra is None:
        return part
    added = extra.take(places[places >= n] - n)
    return Split(*(torch.cat([a, to_device(device, b)]) for a, b in zip(part, added, strict=True)))


def _check_result(augmentation: Any, result: Any, *given: Tensor) -> None:
    """An augmentation returns images and targets as it was given them: same shape, type and device."""
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(part, Tensor) for part in result):
        wrong = f"returned {type(result).__name__}, expected a pair of tensors, (x, targets)"
        raise plugin_error("augmentation", augmentation, wrong)
    for name, part, old in zip(("x", "targets"), result, given, strict=True):
        if (part.shape, part.dtype, part.device) != (old.shape, old.dtype, old.device):
            returned, expected = (f"{str(t.dtype)[6:]} {list(t.shape)} on {t.device}" for t in (part, old))
            raise plugin_error("augmentation", augmentation, f"returned {name} as {returned}, expected {expected}")
