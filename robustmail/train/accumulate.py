"""A batch in micro-batches: attack and loss of the whole batch, with the activations of one micro-batch in memory.

The weights need the margins of the whole batch, so the forward passes of all micro-batches come before any backward
pass. torch.utils.checkpoint forgets their activations, and the backward pass computes them again. The loss is one
tensor with a graph, so a perturbation of the weights may take its gradient as of any other loss.

Outside `shard_batch`, or with one micro-batch, all is as without this module.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from robustmail.errors import PluginError
from robustmail.plugin_calls import plugin_error
from robustmail.recipe import Loss, Recipe
from robustmail.runtime.distributed import micro_batch, micro_batch_rows
from robustmail.step import Adversarial, Step, Terms, Trace

__all__ = ["batch_loss", "each_micro_batch", "joined"]

T = TypeVar("T")


def each_micro_batch(n: int, work: Callable[[slice], T]) -> list[T]:
    """The results of `work(rows)` for each micro-batch of this process's n rows, in order."""
    results = []
    for number, rows in enumerate(micro_batch_rows(n)):
        with micro_batch(number):
            results.append(work(rows))
    return results


def joined(recipe: Recipe, parts: Sequence[Adversarial]) -> Adversarial:
    """The adversarial images and traces of micro-batches as those of the batch.

    Raises PluginError where the traces have different numbers of steps.
    """
    if len(parts) == 1:
        return parts[0]
    traces = [part.trace for part in parts if part.trace is not None]
    lengths = {len(trace.correct) for trace in traces}
    if len(lengths) > 1 or len(traces) not in (0, len(parts)):
        raise _differing_traces(recipe, lengths)
    trace = Trace(*(torch.cat(values, 1) for values in zip(*traces, strict=True))) if traces else None
    return Adversarial(torch.cat([part.x for part in parts]), trace)


def batch_loss(recipe: Recipe, step: Step) -> Loss:
    """`Recipe.compute_loss`, with the activations of one micro-batch at a time. Its gradient may be taken once."""
    if len(micro_batch_rows(len(step.y))) == 1:
        return recipe.compute_loss(step)

    def forward(rows: slice) -> tuple[Step, Terms, Tensor | None]:
        part = step.part(rows)
        with set_checkpoint_early_stop(False):  # it stops by an exception, which a plugin could catch
            terms = checkpoint(_Twice(recipe, part), part.x, use_reentrant=False)
        return part, terms, recipe.compute_margin(part)

    steps, terms, margins = zip(*each_micro_batch(len(step.y), forward), strict=True)
    for which in ("nat", "adv"):
        if all(part.has(which) for part in steps):
            step.know(which, torch.cat([getattr(part, f"logits_{which}").detach() for part in steps]))
    if step.context is not None:
        parts = [part.context.written for part in steps if part.context is not None]
        step.context.written.update({name: torch.cat([written[name] for written in parts]) for name in parts[0]})
    margin = None if margins[0] is None else torch.cat(margins)
    return recipe.weighted_loss(_joined_terms(terms), margin)


class _Twice:
    """The terms of a micro-batch, computed once and, in the backward pass, again in the same way.

    The second time sees BatchNorm's statistics, and the generators of numpy and Python, as the first did, and changes
    them no more. checkpoint itself does so for torch's generators.
    """

    def __init__(self, recipe: Recipe, step: Step) -> None:
        self.recipe, self.step = recipe, step
        self.is_first = True
        self.context = copy_context()  # the backward pass on a GPU runs in a thread of its own
        self.buffers = [(buffer, buffer.clone()) for buffer in step.model.buffers()]
        self.generators = random.getstate(), np.random.get_state()

    def __call__(self, _: Tensor) -> Terms:
        if self.is_first:
            self.is_first = False
            return self.recipe.compute_terms(self.step)
        return self.context.run(self._again)

    def _again(self) -> Terms:
        with self._as_before():
            return self.recipe.compute_terms(self.step.again())

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        after = [buffer.clone() for buffer, _ in self.buffers]
        generators = random.getstate(), np.random.get_state()
        self._set([before for _, before in self.buffers], *self.generators)
        try:
            yield
        finally:
            self._set(after, *generators)

    def _set(self, buffers: Sequence[Tensor], python: object, numpy: object) -> None:
        for (buffer, _), value in zip(self.buffers, buffers, strict=True):
            buffer.data.copy_(value)  # .data: what the graph keeps of BatchNorm's statistics is not used in train mode
        random.setstate(python)  # type: ignore[arg-type]
        np.random.set_state(numpy)  # type: ignore[arg-type]


def _joined_terms(parts: Sequence[Terms]) -> Terms:
    plain = [p.plain if isinstance(p.plain, Tensor) else torch.full_like(p.weighted, p.plain) for p in parts]
    return Terms(torch.cat([part.weighted for part in parts]), torch.cat(plain))


def _differing_traces(recipe: Recipe, lengths: set[int]) -> PluginError:
    wrong = f"kept traces of different numbers of steps in the micro-batches ({sorted(lengths)})"
    return plugin_error("attack", recipe.attack, wrong, "Keep one row for each step that it may take.")
