"""The batches of training: which images a step takes, and what is done to them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from robustmail.data.dataset import ImageData, Split, augment, batch_indices, to_float
from robustmail.runtime.deferred import to_device
from robustmail.runtime.rng import generator

__all__ = ["Batch", "draw_batch", "epoch_batches"]


class Batch(NamedTuple):
    """What one step trains on, all processes together."""

    x: Tensor
    """[B, C, H, W] in [0, 1], augmented"""
    y: Tensor
    """[B] int64"""


def epoch_batches(n: int, size: int, seed: int, epoch: int) -> list[Tensor]:
    """The places in the training set, [B] each, that the steps of an epoch take; on the host.

    n: number of training images. size: images in a batch. seed: of the recipe. epoch: from 0.
    """
    return batch_indices(n, size, generator(seed, "order", epoch))


def draw_batch(images: ImageData, train: Split, places: Tensor, seed: int, position: tuple[int, int]) -> Batch:
    """Take the images at `places`, [B], of the training part, and augment them; all draws are made on the host.

    images: says which augmentation suits the data. position: (epoch, step), both from 0, which seeds the draws.
    """
    rows = to_device(train.x.device, places)
    rng = generator(seed, "augment", *position)
    return Batch(to_float(augment(train.x[rows], images.pad, images.flip, rng)), train.y[rows])
