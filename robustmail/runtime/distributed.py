"""One run in several processes, each with its share of every batch, that together compute what one would.

torchrun starts them; each holds the whole data set and the whole model. A batch is cut into one share for each,
attacked and reckoned there, and the gradients are summed. Whatever looks at a batch as a whole sees all of it: the mean
of the loss, weights of mean one, BatchNorm's statistics, and the noise of an attack, drawn for all and then cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from robustmail.errors import DeviceError, RobustmailError, RunError, in_brief
from robustmail.runtime.devices import pick_device
from robustmail.runtime.rng import patched_random

__all__ = [
    "alike",
    "gather_batch",
    "main_process_first",
    "process_group",
    "is_main_process",
    "global_mean",
    "local_rows",
    "shard_batch",
    "process_label",
    "rank",
    "speaks",
    "all_reduce_sum",
    "all_gather_lists",
    "from_main_process",
    "world_size",
]

T = TypeVar("T")
_BATCH_NORM = torch.nn.functional.batch_norm  # torch's own, which is replaced for a while


class BatchShard(NamedTuple):
    """What this process has of a batch of `n`."""

    n: int
    rows: slice


_CURRENT: ContextVar[BatchShard | None] = ContextVar("share", default=None)


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Is this the process that writes and shows?"""
    return rank() == 0


def speaks() -> bool:
    """Is this the one of torchrun's processes that speaks for all? Also where they have not met, or have parted."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def process_group(device: str = "auto", patience: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Be one of torchrun's processes inside the block: NCCL and a GPU each, or gloo on the CPU; else do nothing.

    patience: how long to wait for a process that lives but does not answer.
    Raises DeviceError where there are fewer GPUs than processes, RunError where the others are not to be found.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    where = pick_device(device)
    if where.type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if where.index is not None or here > gpus:
            wrong = f"{here} processes on this machine, one GPU each, but {gpus} GPUs"
            raise DeviceError(f"device={device!r}", wrong, "Use device=cuda and as many processes, or device=cpu.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if where.type == "cuda" else "gloo"
    with _peer_errors():
        dist.init_process_group(backend, timeout=patience)
    try:
        yield
        with _peer_errors():
            dist.barrier()  # or one that is still listening would hear the line go dead
    except BaseException:
        if backend == "gloo":  # whose threads must end before Python does; NCCL would wait for the others
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def shard_batch(n: int) -> Iterator[slice]:
    """Inside, this process works on its rows of a batch of n, which are yielded; alone, on all of them.

    Raises RunError for fewer rows than processes.
    """
    if world_size() == 1:
        yield slice(0, n)
        return
    if n < world_size():
        raise RunError(
            f"torchrun (given {world_size()} processes)", f"a batch of {n} has no row for each", "Use fewer."
        )
    share = BatchShard(n, slice(rank() * n // world_size(), (rank() + 1) * n // world_size()))
    token = _CURRENT.set(share)
    try:
        with ExitStack() as stack:
            stack.enter_context(patched_random(_draw_for_shard(share)))
            stack.enter_context(mock.patch.object(torch.nn.functional, "batch_norm", _batch_norm))
            yield share.rows
    finally:
        _CURRENT.reset(token)


def gather_batch(values: Tensor) -> Tensor:
    """[b, ...] of this process's rows -> [B, ...] of the whole batch, without a gradient."""
    share = _CURRENT.get()
    if share is None:
        return values
    whole = values.new_zeros(share.n, *values.shape[1:], dtype=_reducible_dtype(values.dtype))
    whole[share.rows] = values.detach().to(whole.dtype)
    return all_reduce_sum(whole)[0].to(values.dtype)


def local_rows(values: Tensor) -> Tensor:
    """[B, ...] of the whole batch -> [b, ...] of this process's rows."""
    share = _CURRENT.get()
    return values if share is None else values[share.rows]


def global_mean(values: Tensor) -> Tensor:
    """This process's part of the mean over the whole batch: the parts, and their gradients, are summed later."""
    share = _CURRENT.get()
    return values.mean() if share is None else values.sum() / share.n


def all_reduce_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of tensors over all processes, the same bits in each; a perturbation of the weights needs it for its
    gradient. Alone, the tensors themselves."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([t.detach().flatten() for t in tensors])
    with _peer_errors():
        dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))


def all_gather_lists(values: list[T]) -> list[T]:
    """The lists of all processes, one after the other."""
    if world_size() == 1:
        return values
    found: list[list[T]] = [[] for _ in range(world_size())]
    with _peer_errors():
        dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def from_main_process(work: Callable[[], T]) -> T:
    """What the first process finds, for all of them; nobody goes on before. Its RobustmailError is raised in all."""
    answer: T = _shared(lambda: work() if is_main_process() else None)[0]
    return answer


def alike(work: Callable[[], T]) -> T:
    """What each process finds by itself; where one raises a RobustmailError, all do, and the first one says it."""
    found: list[T] = []
    _shared(lambda: found.append(work()))
    return found[0]


def _shared(work: Callable[[], Any]) -> list[Any]:
    """What all processes find, or the RobustmailError of one of them."""
    said: tuple[Any, RobustmailError | None]
    try:
        said = (work(), None)
    except RobustmailError as error:
        said = (None, error)
    every = all_gather_lists([said])
    if wrong := next((error for _, error in every if error is not None), None):
        wrong.is_reported_by_peer = not is_main_process()
        raise wrong
    return [answer for answer, _ in every]


@contextmanager
def main_process_first() -> Iterator[None]:
    """The first process goes through the block before the others do: for what only one may download."""
    if world_size() > 1 and not is_main_process():
        from_main_process(lambda: None)
    yield
    if world_size() > 1 and is_main_process():
        from_main_process(lambda: None)


def process_label() -> str:
    """ "process 1 of 2", as torchrun has it, or nothing."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f"process {int(os.environ.get('RANK', '0')) + 1} of {processes}" if processes > 1 else ""


class _AllReduceSum(torch.autograd.Function):
    """The sum over all processes; the gradient of a sum that all use is the sum of what each makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total: Tensor = all_reduce_sum(gradients[0])[0]
        return total


def _batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """BatchNorm by the mean and variance of all processes' rows. torch's own SyncBatchNorm is for GPUs only."""
    if not training:
        return _BATCH_NORM(x, running_mean, running_var, weight, bias, training, momentum, eps)
    z = x if x.dtype == torch.float64 else x.float()
    axes, column = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    sums = _AllReduceSum.apply(torch.cat([z.sum(axes), z.new_tensor([z.numel() / z.shape[1]])]))
    count = sums[-1].detach()
    average = sums[:-1] / count
    centred = z - average.view(column)
    variance = _AllReduceSum.apply((centred * centred).sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(average.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), momentum)
    scale = (variance + eps).rsqrt()
    out: Tensor = centred * (scale if weight is None else scale * weight).view(column)
    return (out if bias is None else out + bias.view(column)).to(x.dtype)


def _draw_for_shard(share: BatchShard) -> Callable[..., Tensor]:
    """Noise for a share is drawn for the whole batch; other shapes are drawn alike in all processes."""
    rows = share.rows.stop - share.rows.start

    def draw(how: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor | None, **options: Any) -> Tensor:
        if "generator" in options or not shape or shape[0] != rows:
            return how(shape, **(options if like is None else {"device": like.device, "dtype": like.dtype}))
        if like is None:
            return how((share.n, *shape[1:]), **options)[share.rows]
        # torch fills memory in order, so the whole batch must lie there as these rows do: channels last, often.
        whole = torch.empty_strided((share.n, *shape[1:]), like.stride(), dtype=like.dtype, device=like.device)
        return how(whole.shape, out=whole)[share.rows]

    return draw


def _reducible_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.int64


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's, by no other name
        raise RunError(
            process_label(), f"another process of this run does not answer ({in_brief(error)})",
            "Look for its own message. What was saved last stays; the same command goes on from there.",
        ) from error  # fmt: skip
