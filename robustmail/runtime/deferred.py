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

from robustmail.runtime.devices import wide

__all__ = ["DeferredReads", "read_later", "defer_reads", "to_device"]

Callback = Callable[[list[float]], object]


class DeferredReads:
    """The values that one step wants to read, kept on the device until the step is over.

    found_inf: scalar on the device, 1.0 once any check failed in this step or an earlier one. Passed to a fused
    optimiser, which then skips its update. None if no check was made.
    """

    def __init__(self, previous: DeferredReads | None = None) -> None:
        self.found_inf: Tensor | None = None if previous is None else previous.found_inf
        self._requests: list[tuple[Tensor, Callback]] = []
        self._on_host: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def add(self, values: Tensor, callback: Callback, ok: Tensor | None) -> None:
        """Register values [n] to read, and the callback that takes them; ok: see `read_later`."""
        self._requests.append((wide(values.detach()), callback))
        if ok is not None:
            failed = (~ok).float()
            self.found_inf = failed if self.found_inf is None else torch.maximum(failed, self.found_inf)

    def send(self) -> None:
        """Start copying all values to the host, without waiting; nothing may be added afterwards."""
        flat = torch.cat([values for values, _ in self._requests])
        self._on_host = flat.to("cpu", non_blocking=True)
        if flat.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> None:
        """Wait for the copy, then call every callback in the order of `add`; raises what a callback raises."""
        if self._copied is not None:
            self._copied.synchronize()
        assert self._on_host is not None
        parts = self._on_host.split([len(values) for values, _ in self._requests])
        for (_, callback), part in zip(self._requests, parts, strict=True):
            callback(part.tolist())


_CURRENT: ContextVar[DeferredReads | None] = ContextVar("deferred_reads", default=None)


@contextmanager
def defer_reads(reads: DeferredReads | None) -> Iterator[None]:
    """Inside, `read_later` adds to `reads` instead of reading; with None it reads at once."""
    token = _CURRENT.set(reads)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def read_later(values: Tensor, callback: Callback, ok: Tensor | None = None) -> Tensor | None:
    """Call callback(list of the numbers in `values`, [n]): at once, or inside `defer_reads` after the step.

    values: tensor [n], on any device.
    callback: takes a list of n floats; it may raise.
    ok: tensor of one bool, False where the update must be skipped; for code that runs before the callback.

    Returns `DeferredReads.found_inf`, or None where the callback has been called already.
    """
    reads = _CURRENT.get()
    if reads is None:
        callback(values.tolist())
        return None
    reads.add(values, callback, ok)
    return reads.found_inf


def to_device(device: torch.device, x: Tensor) -> Tensor:
    """Copy a tensor from the host to a device; to a GPU without waiting for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
