"""Training steps that the host has launched and whose metrics it has not read yet.

A GPU works through a queue that the host fills, and reading a value waits until that queue is empty. So the host
launches step t + 1 first, and reads loss and metrics of step t while the device works. On a CPU, and with an optimiser
that cannot skip an update on the device, each step is read at once, and the queue is always empty.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from robustmail.errors import NonFiniteError, RunError, in_brief
from robustmail.evaluation.exact_inference import is_out_of_memory
from robustmail.models.precision import backends
from robustmail.recipe import Recipe
from robustmail.records import MemoryExceeded, StepFinished
from robustmail.runtime.deferred import DeferredReads, defer_reads, read_later
from robustmail.runtime.distributed import agree, shard_batch, world_size
from robustmail.runtime.rng import fork_rng
from robustmail.text import plural
from robustmail.train.batches import Batch, draw_batch, name_places
from robustmail.train.memory import Overwritten
from robustmail.train.metrics import StepMetrics, step_metrics
from robustmail.train.state import State
from robustmail.train.train_step import train_step

__all__ = ["LaunchedStep", "StepQueue", "max_queued"]


def max_queued(state: State) -> int:
    """How many steps may wait to be read: 1 on a GPU whose optimiser can skip an update on the device, else 0."""
    return int(state.device.type == "cuda" and getattr(state.optimizer, "_step_supports_amp_scaling", False))


@dataclass
class LaunchedStep:
    """A step on the device: what to read of it, and what undoes it where it met a number that is not finite."""

    indices: Tensor
    """[B], as `epoch_batches` has them, on the host"""
    batch: Batch
    position: tuple[int, int]
    """(epoch, step), both from 0"""
    lr: float
    started: float
    """time.perf_counter() at the launch"""
    before: list[tuple[Tensor, Tensor]]
    """tensors that change even in a step that fails, with copies from before it"""
    reads: DeferredReads | None
    """None: the step has been read as it was launched"""
    metrics: StepMetrics | None = None
    values: list[float] = field(default_factory=list)
    overwritten: list[Overwritten] = field(default_factory=list)
    """rows of the memory before this step"""


class StepQueue:
    """Launches the steps of a state, and reads them late or at once; `max_queued` says which."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.max_queued = max_queued(state)
        self._launched: list[LaunchedStep] = []
        self._last_read = 0.0  # time.perf_counter()

    def launch(self, recipe: Recipe, indices: Tensor) -> list[MemoryExceeded]:
        """Start the state's next step, on the training images of these indices [B]; recipe: `Recipe.at(epoch)`.

        Where memory runs out, the step is undone and begun again with twice the micro-batches; returns a record of each
        such time. Raises RunError if there are no smaller ones; PluginError; and NonFiniteError, with the model as it
        was before the step, where it is read at once.
        """
        records = []
        while (wrong := self._out_of_memory(recipe, indices)) is not None:
            records.append(self._use_less_memory(len(indices), wrong))
        return records

    def _out_of_memory(self, recipe: Recipe, indices: Tensor) -> str | None:
        """Try to launch the step; returns torch's words where memory ran out."""
        step = self.state.step
        try:
            self._launch(recipe, indices)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            wrong = in_brief(error.__cause__ or error)
            if self.state.step == step:
                return wrong
            where = f"epoch {self.state.epoch + 1}, step {step + 1}"
            todo = f"Use accumulate={2 * self.state.accumulate}."
            raise RunError(where, f"out of memory after the update ({wrong})", todo) from None
        return None

    def _use_less_memory(self, n: int, wrong: str) -> MemoryExceeded:
        """Double the micro-batches of a batch of n images, in all processes."""
        state, processes = self.state, world_size()
        before, most = state.micro_batches(n), max(1, state.recipe.batch // processes)
        agree("memory ran out", f"Use accumulate={min(2 * state.accumulate, most)}.")
        images = ceil(ceil(n / before) / processes)
        while state.micro_batches(n) == before:
            if state.accumulate == most:
                where = f"epoch {state.epoch + 1}, step {state.step + 1}"
                wrong = f"out of memory, also with {plural(images, 'image')} at once ({wrong})"
                raise RunError(where, wrong, "Use a smaller model, precision=bf16, or a device with more memory.")
            state.accumulate = min(2 * state.accumulate, most)
        state.__dict__.pop("compute_models", None)  # its CUDA graphs hold memory for larger micro-batches
        gc.collect()
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        return MemoryExceeded(state.epoch, state.step, images, state.accumulate, state.memory_note)

    def _launch(self, recipe: Recipe, indices: Tensor) -> None:
        state, model = self.state, self.state.model
        started, position = time.perf_counter(), (state.epoch, state.step)
        previous = self._launched[-1].reads if self._launched else None
        reads = DeferredReads(previous) if self.max_queued else None
        # BatchNorm's statistics change before the loss is known; the average of the weights, where that is read late;
        # perturbed weights are restored by the perturbation, which may need memory to do so.
        changes = [*model.buffers(), *(state.averages.changed_by_step() if reads else ()),
                   *(model.parameters() if recipe.perturbation else ())]  # fmt: skip
        batch = draw_batch(recipe, state.images, state.train, indices, position)
        launched = LaunchedStep(
            indices, batch, position, float(state.optimizer.param_groups[0]["lr"]), started,
            [(tensor, tensor.clone()) for tensor in changes], reads,
        )  # fmt: skip
        with (
            self._undone_if_it_fails(launched),
            defer_reads(reads),
            fork_rng(),
            torch.enable_grad(),
            backends(),
            shard_batch(len(indices), state.micro_batches(len(indices))) as rows,
        ):
            x, y = batch.x[rows], batch.y[rows]
            targets = None if batch.targets is None else batch.targets[rows]
            context = state.context(indices, batch.y).part(rows)
            step, loss = train_step(
                recipe, model, x, y, position, state.optimizer, state.compute_models, targets, context
            )
            launched.overwritten = state.memory.write(indices, batch.y, context.written)
            state.advance()
            launched.metrics = step_metrics(recipe, step, loss, position[1])
            read_later(launched.metrics.values, launched.values.extend)
        if reads is not None:
            reads.send()
        self._launched.append(launched)

    def drain(self, keep: int = 0) -> list[StepFinished]:
        """Read the launched steps, all but the last `keep`, and add their metrics to the epoch's sums.

        Raises NonFiniteError, with the model as it was before that step; the steps launched after it are dropped.
        """
        records = []
        while len(self._launched) > keep:
            try:
                records.append(self._read(self._launched.pop(0)))
            except NonFiniteError:
                self._launched.clear()
                raise
            self.state.add_metrics(records[-1])
        return records

    def _read(self, launched: LaunchedStep) -> StepFinished:
        if launched.reads is not None:
            with self._undone_if_it_fails(launched):
                launched.reads.read()
        assert launched.metrics is not None
        finished = time.perf_counter()
        seconds, self._last_read = finished - max(launched.started, self._last_read), finished
        return launched.metrics.read(launched.values, launched.position, launched.lr, seconds)

    @contextmanager
    def _undone_if_it_fails(self, launched: LaunchedStep) -> Iterator[None]:
        """On NonFiniteError: restore the model, dump the batch, and say in the error which step it was.

        Where memory runs out, restore the model.
        """
        try:
            yield
        except Exception as error:
            if not (isinstance(error, NonFiniteError) or is_out_of_memory(error)):
                raise
            with torch.no_grad():
                for tensor, before in launched.before:
                    tensor.copy_(before)
                # A step that was launched later may have written the same rows.
                for overwritten in (o for step in (*self._launched[::-1], launched) for o in step.overwritten):
                    overwritten.restore()
            if not isinstance(error, NonFiniteError):
                raise
            self.state.epoch, self.state.step = launched.position
            raise self._located(error, launched) from error

    def _located(self, error: NonFiniteError, launched: LaunchedStep) -> NonFiniteError:
        state, indices = self.state, launched.indices
        path = state.dump(indices, launched.batch)
        where = f"The batch is in {path} (robustmail.reproduce reads it); the last saved state stays." if path else ""
        return NonFiniteError(
            f"epoch {state.epoch + 1}, step {state.step + 1} ({name_places(indices, len(state.train.y))})",
            f"{error.who} {error.wrong}", f"{where} {error.todo or 'Lower optimizer.lr.'}",
        )  # fmt: skip
