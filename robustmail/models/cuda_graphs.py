"""A pass through a network and back to its images, recorded once and played again: two CUDA graphs.

At the batch sizes of adversarial training a GPU is done with a small kernel sooner than the host can launch the next
one. A recording is launched as a whole. It remembers addresses, so it holds for one shape, and for weights that are
changed in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from robustmail.errors import ModelError, in_brief
from robustmail.models.classifier import example_logits

__all__ = ["CudaGraph", "enabled"]

WARM_UP = 3  # passes before a recording: cuDNN looks for its fastest kernels, and libraries set themselves up
CLOSE = 0.3  # how far logits and gradients may be from those not recorded, as a share: bfloat16 under other kernels


class GraphRecorder(Protocol):
    """What of a torch.cuda.CUDAGraph is needed here."""

    def replay(self) -> None: ...
    def pool(self) -> Any: ...


def enabled(device: torch.device) -> bool:
    """On a GPU, but for ROBUSTMAIL_CUDA_GRAPHS=0."""
    return device.type == "cuda" and os.environ.get("ROBUSTMAIL_CUDA_GRAPHS") != "0"


class CudaGraph:
    """function: images [B, C, H, W] -> logits [B, classes], differentiable in the images, and nothing drawn at random.

    Logits and gradients are the caller's to keep. A gradient that is asked for twice, or after another pass, costs a
    pass more. Raises ModelError where the device cannot record the function, or plays something else than it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], sample: Tensor) -> None:
        self.turn, self.spent = 0, False
        try:
            with torch.enable_grad():
                self.x = sample.detach().clone().requires_grad_()
                _warm_up(function, self.x)
                self.there, self.logits = capture(lambda: function(self.x))
                self.slope = torch.ones_like(self.logits)
                self.way_back, self.gradient = capture(
                    lambda: torch.autograd.grad(self.logits, self.x, self.slope)[0], self.there
                )
            self._compare(function, sample)
        except ModelError:
            raise
        except Exception as error:  # a device may refuse in any way
            raise ModelError("its passes", f"cannot be recorded ({in_brief(error)})") from error

    def takes(self, x: Tensor) -> bool:
        """Are these images such as were recorded?"""
        return x.shape == self.x.shape and x.dtype == self.x.dtype and x.device == self.x.device

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        return cast(Tensor, _Replay.apply(x, self))  # type: ignore[no-untyped-call]

    def forth(self, x: Tensor) -> int:
        """Play the pass; the number of it."""
        with torch.no_grad():
            self.x.copy_(x)
        self.there.replay()
        self.turn, self.spent = self.turn + 1, False
        return self.turn

    def back(self, x: Tensor, slope: Tensor, turn: int) -> Tensor:
        """The gradient of x, which went forth at `turn`, from that of its logits."""
        if self.spent or turn != self.turn:  # what the pass left for the way back is gone
            self.forth(x)
        self.slope.copy_(slope)
        self.way_back.replay()
        self.spent = True
        return self.gradient.clone()

    def _compare(self, function: Callable[[Tensor], Tensor], sample: Tensor) -> None:
        """Other images than were recorded must get logits and gradients of their own."""
        (logits, slope), (played, played_slope) = example_logits(function, 1 - sample), example_logits(self, 1 - sample)
        apart = logits - example_logits(function, sample)[0]
        for what, error, size in ("logits", played - logits, apart), ("gradients", played_slope - slope, slope):
            if not error.norm() <= CLOSE * size.norm():  # also true of NaN
                raise ModelError("its passes", f"have other {what} when recorded")


class _Replay(torch.autograd.Function):
    """A recorded pass and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: CudaGraph) -> Tensor:
        ctx.save_for_backward(x)
        ctx.recorded, ctx.turn = recorded, recorded.forth(x)
        return recorded.logits.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.recorded.back(*ctx.saved_tensors, slope, ctx.turn), None


def capture(work: Callable[[], Tensor], before: GraphRecorder | None = None) -> tuple[GraphRecorder, Tensor]:
    """(what repeats the work, the tensor it leaves its result in).

    before: a recording that is always played first, whose memory this one may use.
    """
    graph = torch.cuda.CUDAGraph()
    # Threads that watch over NCCL ask the device things that may not be asked in a thread that records.
    with torch.cuda.graph(graph, pool=before.pool() if before else None, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def _warm_up(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            torch.autograd.grad(function(x).sum(), x)
    torch.cuda.current_stream().wait_stream(aside)
