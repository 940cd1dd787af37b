"""Random numbers as a function of (seed, purpose, epoch, step).

No generator state has to be saved to resume, and what one part of the program draws cannot change what another draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["derive_seed", "fork_rng", "generator", "patched", "patched_random", "seed_all"]

_RAND, _RANDN = torch.rand, torch.randn  # torch's own, which are replaced for a while


def derive_seed(*where: int | str) -> int:
    """A 63-bit seed from a position in a run, e.g. derive_seed(seed, "attack", epoch, step)."""
    return int.from_bytes(hashlib.blake2b(repr(where).encode(), digest_size=8).digest(), "big") >> 1


def generator(*where: int | str) -> torch.Generator:
    """A new CPU generator, seeded with a position in a run; the same numbers on every device."""
    return torch.Generator().manual_seed(derive_seed(*where))


def seed_all(*where: int | str) -> None:
    """Seed the global generators of torch, numpy and Python with a position in a run. Call it inside `fork_rng`."""
    seed = derive_seed(*where)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Restore the global generators of torch, numpy and Python on exit, whatever was drawn or seeded inside."""
    # torch.manual_seed seeds every GPU, so all are restored; a GPU that was never used has no state to restore.
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def patched(owner: Any, **replacements: Any) -> Iterator[None]:
    """Replace attributes of a module or class inside the block.

    Of nested blocks the innermost wins, and each restores what it replaced. All threads see the replacement.
    """
    before = {name: vars(owner)[name] for name in replacements if name in vars(owner)}
    for name, value in replacements.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in replacements:
            if name in before:
                setattr(owner, name, before[name])
            else:  # inherited
                delattr(owner, name)


@contextmanager
def patched_random(draw: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, `draw` makes the tensors of torch.rand, randn, rand_like, randn_like and of Tensor.uniform_.

    draw: called as draw(sampler, shape, like, **options) -> tensor of that shape. sampler: torch's own rand or randn;
    like: the tensor whose device, dtype and layout the result has, or None.
    """

    def sized(sampler: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *size, **options: draw(sampler, _shape(size), None, **options)

    def like(sampler: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda tensor, **_: draw(sampler, tuple(tensor.shape), tensor)

    def uniform_(self: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
        return self.copy_(low + (high - low) * draw(_RAND, tuple(self.shape), self))

    with ExitStack() as stack:
        functions = {"rand": sized(_RAND), "randn": sized(_RANDN), "rand_like": like(_RAND), "randn_like": like(_RANDN)}
        stack.enter_context(patched(torch, **functions))
        stack.enter_context(patched(torch.Tensor, uniform_=uniform_))
        yield


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
