"""Data-parallel training: several processes compute together what one process would compute.

torchrun starts the processes; each holds the whole data set and the whole model. Each process attacks its rows of every
batch (its shard) and computes their loss, and the gradients are summed. Operations on a whole batch see all its rows:
the mean of the loss, weights with mean one, BatchNorm's statistics, and the noise of an attack, which is drawn for the
whole batch and then sliced. A process may work on its rows in several micro-batches, so that less memory is needed; to
these operations each micro-batch is a shard too, except that BatchNorm's statistics are its own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from robustmail.errors import DeviceError, RobustmailError, RunError, in_brief
from robustmail.runtime.devices import pick_device
from robustmail.runtime.rng import patched, patched_random

__all__ = [
    "alike",
    "gather_batch",
    "agree",
    "main_process_first",
    "process_group",
    "is_main_process",
    "launched_processes",
    "global_mean",
    "local_rows",
    "micro_batch",
    "micro_batch_rows",
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
_CONTROL: Any = None  # the same processes, for `agree`
_N_SUMS = 0
_BATCH_NORM = torch.nn.functional.batch_norm  # torch's own, which is replaced for a while


class BatchShard(NamedTuple):
    """The rows of a batch of `n` that this process works on."""

    n: int
    parts: tuple[slice, ...]
    """of the whole batch's rows, one for each micro-batch"""

    @property
    def rows(self) -> slice | Tensor:
        """The same rows as one index."""
        if len(self.parts) == 1 or world_size() == 1:
            return slice(self.parts[0].start, self.parts[-1].stop)
        return torch.cat([torch.arange(part.start, part.stop) for part in self.parts])

    @property
    def n_rows(self) -> int:
        """Their number."""
        return sum(part.stop - part.start for part in self.parts)


_CURRENT: ContextVar[BatchShard | None] = ContextVar("shard", default=None)


def world_size() -> int:
    """Number of processes in the group; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the group, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """True on rank 0, the process that writes files and prints."""
    return rank() == 0


def speaks() -> bool:
    """True on torchrun's rank 0; unlike `is_main_process`, also before and after the process group exists."""
    return int(os.environ.get("RANK", "0")) == 0


def launched_processes() -> int:
    """Number of processes that torchrun started; unlike `world_size`, also before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: str = "auto", patience: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join torchrun's process group inside the block: NCCL with one GPU each, or gloo on the CPU; else do nothing.

    patience: timeout for a process that lives but does not answer.

    Raises DeviceError where there are fewer GPUs than processes, RunError where the other processes do not answer.
    """
    global _CONTROL
    if launched_processes() == 1 or world_size() > 1:
        yield
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        local_world_size, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if chosen.index is not None or local_world_size > gpus:
            wrong = f"{local_world_size} processes on this machine, one GPU each, but {gpus} GPUs"
            raise DeviceError(f"device={device!r}", wrong, "Use device=cuda and as many processes, or device=cpu.")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    with _peer_errors():
        dist.init_process_group(backend, timeout=patience)
        _CONTROL = dist.new_group(backend="gloo", timeout=timedelta(minutes=1))
    try:
        yield
        with _peer_errors():
            dist.barrier()  # a process that is still receiving must not see the connection close
    except BaseException:
        if backend == "gloo":  # whose threads must end before Python does; NCCL would wait for the others
            dist.destroy_process_group()
        raise
    finally:
        _CONTROL = None
    dist.destroy_process_group()


@contextmanager
def shard_batch(n: int, micro_batches: int = 1) -> Iterator[slice | Tensor]:
    """Inside, this process works on its rows of a batch of n images; yields their index (all with one process).

    micro_batches: in how many parts, 1 ... n. The batch is cut into these first, and each of them into the rows of the
    processes, so that a micro-batch has the same images in any number of processes.

    Random tensors and BatchNorm statistics are then those of the whole batch. Raises RunError for fewer rows than
    processes.
    """
    if world_size() == 1 and micro_batches == 1:
        yield slice(0, n)
        return
    if n < world_size() * micro_batches:
        of = f"a batch of {n}" + (f" in {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise RunError(f"torchrun (given {world_size()} processes)", f"{of} has no row for each", "Use fewer.")
    shard = BatchShard(n, tuple(_own_rows(slice(i * n // micro_batches, (i + 1) * n // micro_batches))
                                for i in range(micro_batches)))  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(_sharded(shard))
        stack.enter_context(patched_random(_draw_for_shard))
        if world_size() > 1:
            stack.enter_context(patched(torch.nn.functional, batch_norm=_batch_norm))
        yield shard.rows


def _own_rows(part: slice) -> slice:
    n = part.stop - part.start
    return slice(part.start + rank() * n // world_size(), part.start + (rank() + 1) * n // world_size())


def micro_batch_rows(n: int) -> list[slice]:
    """The micro-batches of this process's n rows, as slices of these; one with all of them outside `shard_batch`."""
    shard = _CURRENT.get()
    if shard is None:
        return [slice(0, n)]
    ends = list(itertools.accumulate(part.stop - part.start for part in shard.parts))
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def micro_batch(number: int) -> AbstractContextManager[None]:
    """The context in which this process works on one micro-batch of its rows, counted from 0.

    Made where `shard_batch` is in force, it may be entered elsewhere, such as in a thread of the backward pass.
    """
    shard = _CURRENT.get()
    return _sharded(None if shard is None else BatchShard(shard.n, (shard.parts[number],)))


@contextmanager
def _sharded(shard: BatchShard | None) -> Iterator[None]:
    token = _CURRENT.set(shard)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def gather_batch(values: Tensor) -> Tensor:
    """Gather the rows of all processes: [b, ...] of this process's shard -> [B, ...], without gradient."""
    shard = _CURRENT.get()
    if shard is None:
        return values
    whole = values.new_zeros(shard.n, *values.shape[1:], dtype=_reducible_dtype(values.dtype))
    whole[shard.rows] = values.detach().to(whole.dtype)
    return all_reduce_sum(whole)[0].to(values.dtype)


def local_rows(values: Tensor) -> Tensor:
    """The rows of this process's shard: [B, ...] -> [b, ...]."""
    shard = _CURRENT.get()
    return values if shard is None else values[shard.rows]


def global_mean(values: Tensor) -> Tensor:
    """sum of values [b] / B: this process's part of the batch mean. The parts and their gradients are summed later."""
    shard = _CURRENT.get()
    return values.mean() if shard is None else values.sum() / shard.n


def all_reduce_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All-reduce (sum) the tensors over all processes, to the same bits in each; with one, return them unchanged.

    A perturbation of the weights calls it for its gradients.
    """
    global _N_SUMS
    if world_size() == 1:
        return tensors
    _N_SUMS += 1
    flat = torch.cat([t.detach().flatten() for t in tensors])
    with _peer_errors():
        dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))


def agree(what: str, todo: str) -> None:
    """Wait until all processes have come here, after as many sums. Raises RunError if one has not within a minute.

    For what may happen to one process alone, while the others wait for its part of a sum.
    """
    if _CONTROL is None:
        return
    counts: list[int] = [0] * world_size()
    try:
        dist.all_gather_object(counts, _N_SUMS, group=_CONTROL)
    except RuntimeError:
        counts = [0, 1]
    if len(set(counts)) > 1:
        raise RunError(process_label(), f"{what}, but not in every process at the same place", todo)


def all_gather_lists(values: list[T]) -> list[T]:
    """Concatenate the lists of all processes, in the order of their ranks."""
    if world_size() == 1:
        return values
    gathered: list[list[T]] = [[] for _ in range(world_size())]
    with _peer_errors():
        dist.all_gather_object(gathered, values)
    return [value for part in gathered for value in part]


def from_main_process(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and broadcast its result; a RobustmailError that it raises is raised in all processes."""
    result: T = _results(lambda: work() if is_main_process() else None)[0]
    return result


def alike(work: Callable[[], T]) -> T:
    """Run `work` in each process and return its own result; a RobustmailError of one is raised in all processes."""
    own: list[T] = []
    _results(lambda: own.append(work()))
    return own[0]


def _results(work: Callable[[], Any]) -> list[Any]:
    """The result of every process, or the first RobustmailError of one."""
    outcome: tuple[Any, RobustmailError | None]
    try:
        outcome = (work(), None)
    except RobustmailError as error:
        outcome = (None, error)
    outcomes = all_gather_lists([outcome])
    if failure := next((error for _, error in outcomes if error is not None), None):
        failure.is_reported_by_peer = not is_main_process()
        raise failure
    return [result for result, _ in outcomes]


@contextmanager
def main_process_first() -> Iterator[None]:
    """Rank 0 runs the block before the other processes do, so that only one downloads a data set."""
    if world_size() > 1 and not is_main_process():
        from_main_process(lambda: None)
    yield
    if world_size() > 1 and is_main_process():
        from_main_process(lambda: None)


def process_label() -> str:
    """Label such as "process 1 of 2"; empty without torchrun."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return f"process {int(os.environ.get('RANK', '0')) + 1} of {processes}" if processes > 1 else ""


class _AllReduceSum(torch.autograd.Function):
    """Differentiable all-reduce (sum): every process uses the sum, so its gradient is the sum of theirs."""

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
    """torch's batch_norm with mean and variance over the rows of all processes; SyncBatchNorm is for GPUs only."""
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


def _draw_for_shard(
    sampler: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor | None, **options: Any
) -> Tensor:
    """For `patched_random`: noise with a row per image is drawn for the whole batch, other shapes alike everywhere."""
    shard = _CURRENT.get()
    if shard is None or "generator" in options or not shape or shape[0] != shard.n_rows:
        return sampler(shape, **(options if like is None else {"device": like.device, "dtype": like.dtype}))
    if like is None:
        return sampler((shard.n, *shape[1:]), **options)[shard.rows]
    # torch fills memory in order, so the whole batch needs the memory format of these rows, often channels last.
    whole = torch.empty_strided((shard.n, *shape[1:]), like.stride(), dtype=like.dtype, device=like.device)
    return sampler(whole.shape, out=whole)[shard.rows]


def _reducible_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.int64


@contextmanager
def _peer_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise no more specific one
        raise RunError(
            process_label(), f"another process of this run does not answer ({in_brief(error)})",
            "Look for its own message. What was saved last stays; the same command goes on from there.",
        ) from error  # fmt: skip
