"""All randomness is a function of (seed, purpose, where we are), so nothing has to be remembered to resume, and
what one part draws cannot change what another part sees."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["forked", "generator", "key", "reseed"]


def key(*where: int | str) -> int:
    """A 63-bit number for a place in a run: key(seed, "attack", epoch, step)."""
    return int.from_bytes(hashlib.blake2b(repr(where).encode(), digest_size=8).digest(), "big") >> 1


def generator(*where: int | str) -> torch.Generator:
    """A CPU generator of its own for a place in a run, the same on every device."""
    return torch.Generator().manual_seed(key(*where))


def reseed(*where: int | str) -> None:
    """Seed the global generators of torch, numpy and Python for a place in a run; only ever inside `forked`."""
    seed = key(*where)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def forked() -> Iterator[None]:
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
