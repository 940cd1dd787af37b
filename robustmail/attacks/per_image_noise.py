"""Noise that depends on the image, not on its place in a batch.

Libraries draw one random tensor for a whole batch, so the result for an image depends on the other images of its batch.
Inside `per_image_noise` each image has its own noise, a function of (where, the image's bytes, number of its draws so
far): the same in a batch of 1 or 500, in another order, in another process.
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
    """Generators of one attack: one for each image, by its content, and one that all images share."""

    def __init__(self, where: tuple[int | str, ...]) -> None:
        self.where = where
        self.shared = generator(*where)
        self.by_image: dict[bytes, torch.Generator] = {}

    def of(self, image: Tensor) -> torch.Generator:
        """The generator of an image [C, H, W], in the state after its last draw."""
        digest = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
        if digest not in self.by_image:
            self.by_image[digest] = generator(*self.where, digest.hex())
        return self.by_image[digest]


_CURRENT: ContextVar[Noise | None] = ContextVar("noise", default=None)


@contextmanager
def per_image_noise(x: Tensor, *where: int | str) -> Iterator[None]:
    """Inside the context, torch.rand, torch.randn, their _like forms and uniform_ draw separately for each image.

    x: the batch under attack, [B, C, H, W]. where: seed and purpose, which together with the image's bytes seed its
    generator. Draws of another shape, of one number per channel or of a part of the batch (Square's windows), are the
    same for all images.
    """
    noise = Noise(where)
    token = _CURRENT.set(noise)
    try:
        with _patched(noise, x):
            yield
    finally:
        _CURRENT.reset(token)


def own_noise(attack: Any) -> Any:
    """Let a torchattacks object draw noise for the images that it still attacks, as it drops broken ones on the way.

    Returns the same object, changed only inside `per_image_noise`.
    """
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
            drawn = {own: how(shape[1:], generator=own) for own in dict.fromkeys(generators)}  # equal images share it
            values = torch.stack([drawn[own] for own in generators])
        elif len(shape) == 4:  # for a part of the batch, it is not known which
            values = how((1, *shape[1:]), generator=noise.shared).expand(shape).clone()
        else:
            values = how(shape, generator=noise.shared)
        return values if like is None else values.to(like)

    return patched_random(draw)
