"""The batches of training: which images a step takes, and what is done to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustmail.data.dataset import Extra, ImageData, Split, augment, batch_indices, to_float
from robustmail.errors import RecipeError
from robustmail.runtime.deferred import to_device
from robustmail.runtime.rng import generator

__all__ = ["Batch", "draw_batch", "epoch_batches", "name_places"]


class Batch(NamedTuple):
    """What one step trains on, all processes together."""

    x: Tensor
    """[B, C, H, W] in [0, 1], augmented"""
    y: Tensor
    """[B] int64"""


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


def draw_batch(images: ImageData, train: Split, places: Tensor, seed: int, position: tuple[int, int]) -> Batch:
    """Take the images at `places`, [B], and augment them; all draws are made on the host.

    images: says which augmentation suits the data, and has the extra images. train: the training part, on the device.
    places: as `epoch_batches` has them. position: (epoch, step), both from 0, which seeds the draws.
    """
    x, y = _take(images.extra, train, places)
    rng = generator(seed, "augment", *position)
    return Batch(to_float(augment(x, images.pad, images.flip, rng)), y)


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
