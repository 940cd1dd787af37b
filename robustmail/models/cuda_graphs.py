"""A network's forward pass, and the backward pass to its images, captured as two CUDA graphs and replayed.

At the batch sizes of adversarial training a GPU finishes a small kernel before the host can launch the next one. A
graph is launched as a whole. It stores addresses, so it is valid for one shape, and for parameters that are changed in
place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from robustmail.errors import ModelError, in_brief
from robustmail.models.classifier import example_logits

__all__ = ["SWITCH", "CudaGraph", "use_cuda_graphs"]

SWITCH = "ROBUSTMAIL_CUDA_GRAPHS"  # of the environment: 0 switches them off
WARM_UP = 3  # passes before the capture: cuDNN looks for its fastest kernels, and libraries initialise
CLOSE = 0.3  # largest relative error of replayed logits and gradients: bfloat16 under other kernels


class GraphRecorder(Protocol):
    """The methods of torch.cuda.CUDAGraph that are used here."""

    def replay(self) -> None: ...
    def pool(self) -> Any: ...


def use_cuda_graphs(device: torch.device) -> bool:
    """Whether to use CUDA graphs: on a GPU, unless ROBUSTMAIL_CUDA_GRAPHS=0 is set."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "0"


class CudaGraph:
    """A function of images, captured as CUDA graphs: [B, C, H, W] -> [B, classes], differentiable in the images.

    Each call returns new tensors. Taking the gradient of a pass twice, or after another pass, costs one forward pass
    more.
    function: images [B, C, H, W] -> logits [B, classes], deterministic. sample: a batch of the shape to capture.
    Raises ModelError if the device cannot capture the function, or the replay differs from it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], sample: Tensor) -> None:
        self.n_forward, self.is_consumed = 0, False
        try:
            with torch.enable_grad():
                self.x = sample.detach().clone().requires_grad_()
                _warm_up(function, self.x)
                self.forward_graph, self.logits = capture(lambda: function(self.x))
                self.grad_logits = torch.ones_like(self.logits)
                self.backward_graph, self.grad_x = capture(
                    lambda: torch.autograd.grad(self.logits, self.x, self.grad_logits)[0], self.forward_graph
                )
            self._compare(function, sample)
        except ModelError:
            raise
        except Exception as error:  # a device may fail in any way
            raise ModelError("CUDA graph", f"capture failed ({in_brief(error)})") from error

    def accepts(self, x: Tensor) -> bool:
        """Whether x has the shape, dtype and device of the captured batch."""
        return x.shape == self.x.shape and x.dtype == self.x.dtype and x.device == self.x.device

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        return cast(Tensor, _Replay.apply(x, self))  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> int:
        """Replay the forward pass into `self.logits`; returns its number."""
        with torch.no_grad():
            self.x.copy_(x)
        self.forward_graph.replay()
        self.n_forward, self.is_consumed = self.n_forward + 1, False
        return self.n_forward

    def backward(self, x: Tensor, grad_logits: Tensor, number: int) -> Tensor:
        """The gradient of x, from that of the logits which forward pass `number` gave for x."""
        if self.is_consumed or number != self.n_forward:  # the activations of that pass are overwritten
            self.forward(x)
        self.grad_logits.copy_(grad_logits)
        self.backward_graph.replay()
        self.is_consumed = True
        return self.grad_x.clone()

    def _compare(self, function: Callable[[Tensor], Tensor], sample: Tensor) -> None:
        # On other images than the captured ones: a graph that ignores its input would give the logits of the sample.
        images = 1 - sample
        logits, gradient = example_logits(function, images)
        replayed_logits, replayed_gradient = example_logits(self, images)
        scale = logits - example_logits(function, sample)[0]
        for name, error, size in (
            ("logits", replayed_logits - logits, scale),
            ("gradients", replayed_gradient - gradient, gradient),
        ):
            if not error.norm() <= CLOSE * size.norm():  # also true of NaN
                raise ModelError("CUDA graph", f"replay gives other {name}")


class _Replay(torch.autograd.Function):
    """A replayed forward pass, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cuda_graph: CudaGraph) -> Tensor:
        ctx.save_for_backward(x)
        ctx.cuda_graph, ctx.number = cuda_graph, cuda_graph.forward(x)
        return cuda_graph.logits.detach().clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Tensor, None]:
        return ctx.cuda_graph.backward(*ctx.saved_tensors, grad_logits, ctx.number), None


def capture(work: Callable[[], Tensor], before: GraphRecorder | None = None) -> tuple[GraphRecorder, Tensor]:
    """Capture `work`; returns the graph and the tensor into which every replay writes the result.

    before: a graph that is always replayed first, and whose memory this one may use.
    """
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog threads make calls that are forbidden in a thread that captures.
    with torch.cuda.graph(graph, pool=before.pool() if before else None, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def _warm_up(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            torch.autograd.grad(function(x).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
