"""Noise that belongs to an image, not to its place in a batch.

Libraries draw one random tensor for a whole batch, so that a verdict depends on the company an image is attacked in.
Inside `per_image_noise` every image gets noise of its own, a function of (where, the image's own bytes, how many draws
it has seen): the same in a batch of 1 or 500, in another order, in another process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from robustmail.runtime.rng import generator, patched_random

__all__ = ["own_noise", "per_image_noise"]

Draw = Callable[..., Tensor]


class Noise:
    """The generators of one attack: one for each image it has met, and one that all share."""

    def __init__(self, where: tuple[int | str, ...]) -> None:
        self.where = where
        self.shared = generator(*where)
        self.own: dict[bytes, torch.Generator] = {}

    def of(self, image: Tensor) -> torch.Generator:
        """The generator of an image, which goes on where it was."""
        digest = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        if digest not in self.own:
            self.own[digest] = generator(*self.where, digest.hex())
        return self.own[digest]


_CURRENT: ContextVar[Noise | None] = ContextVar("noise", default=None)


@contextmanager
def per_image_noise(x: Tensor, *where: int | str) -> Iterator[None]:
    """Every draw of a whole image inside the block is its image's own; x: the batch under attack, [B, C, H, W].

    A draw of one number per channel, or of a few for the whole batch (Square's windows), is the same for all images.
    """
    noise = Noise(where)
    token = _CURRENT.set(noise)
    try:
        with _patched(noise, x):
            yield
    finally:
        _CURRENT.reset(token)


def own_noise(attack: Any) -> Any:
    """Tell a torchattacks object, which drops fooled images from its batch, to draw for just those it still attacks."""
    noise = _CURRENT.get()
    if noise is not None and hasattr(attack, "attack_single_run"):
        single_run = attack.attack_single_run

        def run(x: Tensor, *rest: Any, **options: Any) -> Any:
            with _patched(noise, x):
                return single_run(x, *rest, **options)

        attack.attack_single_run = run
    return attack


def _patched(noise: Noise, x: Tensor) -> AbstractContextManager[None]:
    generators = [noise.of(image) for image in x]

    def draw(how: Draw, shape: tuple[int, ...], like: Tensor | None, **_: Any) -> Tensor:
        if len(shape) == 4 and shape[0] == len(generators) and shape[-1] > 1:
            drawn = torch.stack([how(shape[1:], generator=own) for own in generators])
        elif len(shape) == 4:  # of a part of the batch, which part is not known
            drawn = how((1, *shape[1:]), generator=noise.shared).expand(shape).clone()
        else:
            drawn = how(shape, generator=noise.shared)
        return drawn if like is None else drawn.to(like)

    return patched_random(draw)
