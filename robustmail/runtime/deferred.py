"""Read values of tensors on the device without making the host wait.

A GPU works through a queue that the host fills; each read of a value waits until the queue is empty. `read_later` reads
at once, except inside `defer_reads`: there the read waits until its step is over. All values of a step then come in
one transfer, while the host queues the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = ["DeferredReads", "read_later", "defer_reads", "to_device"]

Callback = Callable[[list[float]], object]


class DeferredReads:
    """The questions of one step.

    broken: a number on the device that is 1 as soon as something was not `ok`, in this step or the one before, and
    stays so; an optimiser that is told so leaves the weights alone. None as long as nobody said what is ok.
    """

    def __init__(self, before: DeferredReads | None = None) -> None:
        self.broken: Tensor | None = None if before is None else before.broken
        self._asked: list[tuple[Tensor, Callback]] = []
        self._answers: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def ask(self, facts: Tensor, then: Callback, ok: Tensor | None) -> None:
        """Put a question."""
        self._asked.append((facts.detach().double(), then))
        if ok is not None:
            bad = (~ok).float()
            self.broken = bad if self.broken is None else torch.maximum(bad, self.broken)

    def send(self) -> None:
        """Let the answers be brought as soon as they are there; no question comes after this."""
        flat = torch.cat([facts for facts, _ in self._asked])
        self._answers = flat.to("cpu", non_blocking=True)
        if flat.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> None:
        """Wait for the answers and hand them out in the order of the questions; raises what they raise."""
        if self._arrived is not None:
            self._arrived.synchronize()
        assert self._answers is not None
        for (_, then), answer in zip(self._asked, self._answers.split([len(f) for f, _ in self._asked]), strict=True):
            then(answer.tolist())


_CURRENT: ContextVar[DeferredReads | None] = ContextVar("later", default=None)


@contextmanager
def defer_reads(later: DeferredReads | None) -> Iterator[None]:
    """Inside, `read_later` puts its questions to `later`; None: they are answered at once."""
    token = _CURRENT.set(later)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def read_later(facts: Tensor, then: Callback, ok: Tensor | None = None) -> Tensor | None:
    """then(the numbers in `facts`, [n]), now or later; it may raise.

    ok: whether all is well, as a tensor of one bool, for those who cannot wait for `then`. Returns `Later.broken`, or
    None where the question has been answered.
    """
    later = _CURRENT.get()
    if later is None:
        then(facts.tolist())
        return None
    later.ask(facts, then, ok)
    return later.broken


def to_device(device: torch.device, x: Tensor) -> Tensor:
    """A tensor of the host on a device, sent without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
