"""All randomness is a function of (seed, purpose, where we are), so nothing has to be remembered to resume, and
what one part draws cannot change what another part sees."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

__all__ = ["patched_random", "fork_rng", "generator", "derive_seed", "seed_all"]

_RAND, _RANDN = torch.rand, torch.randn  # torch's own, which are replaced for a while


def derive_seed(*where: int | str) -> int:
    """A 63-bit number for a place in a run: key(seed, "attack", epoch, step)."""
    return int.from_bytes(hashlib.blake2b(repr(where).encode(), digest_size=8).digest(), "big") >> 1


def generator(*where: int | str) -> torch.Generator:
    """A CPU generator of its own for a place in a run, the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*where))


def seed_all(*where: int | str) -> None:
    """Seed the global generators of torch, numpy and Python for a place in a run; only ever inside `fork_rng`."""
    seed = derive_seed(*where)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Let libraries draw from, and reseed, the global generators of torch, numpy and Python; then put them back."""
    # torch.manual_seed seeds every GPU, so each is put back; one that was never used has nothing to be put back to.
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def patched_random(draw: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, draw(how, shape, like, **options) makes the tensors of torch.rand, torch.randn, their _like and uniform_.

    how: torch's own rand or randn, which takes (shape, **options) too; like: the tensor that it shall be like, or None.
    """

    def fresh(how: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *size, **options: draw(how, _shape(size), None, **options)

    def alike(how: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda other, **_: draw(how, tuple(other.shape), other)

    def filled(self: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
        return self.copy_(low + (high - low) * draw(_RAND, tuple(self.shape), self))

    with ExitStack() as stack:
        for name, value in {"rand": fresh(_RAND), "randn": fresh(_RANDN), "rand_like": alike(_RAND),
                            "randn_like": alike(_RANDN)}.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "uniform_", filled))
        yield


def _shape(size: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)
