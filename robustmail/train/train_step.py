"""One training step: attack, loss, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustmail.attacks.view import model_view
from robustmail.data.dataset import augment, to_float
from robustmail.errors import NonFiniteError
from robustmail.models.precision import ComputeModels, backends
from robustmail.plugin_calls import call_plugin, plugin_error, plugin_name
from robustmail.recipe import Loss, Recipe
from robustmail.records import StepFinished
from robustmail.runtime.deferred import DeferredReads, defer_reads, read_later, to_device
from robustmail.runtime.distributed import all_reduce_sum, shard_batch
from robustmail.runtime.rng import fork_rng, generator, seed_all
from robustmail.step import Adversarial, Step
from robustmail.train.metrics import StepMetrics, step_metrics
from robustmail.train.state import State

__all__ = ["run_attack", "weight_perturbation", "train_step", "make_update"]


def run_attack(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
    """Run the recipe's attack on a batch through a safe view of the model, and give its result one shape."""
    with model_view(model, recipe.attack_mode) as view:
        found = call_plugin("attack", recipe.attack, view, x.clone(), y.clone())  # it may write into them
    found = Adversarial(found) if isinstance(found, Tensor) else found
    if not isinstance(found, Adversarial) or (found.x.shape, found.x.dtype) != (x.shape, x.dtype):
        got = (
            f"{str(found.x.dtype)[6:]} {list(found.x.shape)}"
            if isinstance(found, Adversarial)
            else type(found).__name__
        )
        wrong = f"returned {got}, expected images as it was given, {str(x.dtype)[6:]} {list(x.shape)}"
        raise plugin_error("attack", recipe.attack, wrong)
    for name, values in found.trace._asdict().items() if found.trace else ():
        if values.ndim != 2 or values.shape[1] != len(x):
            wrong = f"its trace.{name} is {list(values.shape)}, expected [steps, {len(x)}]"
            raise plugin_error("attack", recipe.attack, wrong)
    return Adversarial(found.x.detach(), found.trace)


def weight_perturbation(now: Recipe, model: nn.Module, step: Step) -> AbstractContextManager[object]:
    """The context in which the loss of a step is reckoned: at perturbed weights, or as they are."""
    if now.perturbation is None:
        return nullcontext()
    around = call_plugin("perturbation", now.perturbation, model, lambda: now.loss(step.again()))
    if not isinstance(around, AbstractContextManager):
        raise plugin_error(
            "perturbation", now.perturbation, f"returned {type(around).__name__}, not a context", "Use contextmanager."
        )
    return around


def train_step(
    now: Recipe, model: nn.Module, x: Tensor, y: Tensor, where: tuple[int, int], update: Callable[[Loss], None],
    forms: ComputeModels | None = None,
) -> tuple[Step, Loss]:  # fmt: skip
    """The batch of (epoch, step): attack it, reckon its loss, and hand that to `update`, inside the perturbation of
    the weights. Attack and loss call the model in its `forms`, or as it is.
    Attack and update draw from generators of their own; the caller has forked them and cleared gradients.
    """
    attackable, trainable = (forms.attack, forms.loss) if forms else (model, model)
    seed_all(now.seed, "attack", *where)
    found = run_attack(now, attackable, x, y)
    seed_all(now.seed, "update", *where)
    step = Step(trainable, x, y, found.x, found.trace)
    model.train()
    with weight_perturbation(now, model, step):  # the optimiser steps inside: the order of AWP's authors
        loss = now.compute_loss(step)
        update(loss)
    return step, loss


@dataclass
class QueuedStep:
    """A step that the host has queued: how to read it, or, where it met a number that is not finite, to undo it."""

    state: State
    indices: Tensor
    x: Tensor
    y: Tensor
    where: tuple[int, int]
    rate: float
    began: float
    before: list[tuple[Tensor, Tensor]]
    later: DeferredReads | None
    gauges: StepMetrics | None = None
    values: list[float] = field(default_factory=list)

    def read(self) -> StepFinished:
        """What the step looked like, once the device has done it.

        Raises NonFiniteError; the model is then as it was before the step.
        """
        if self.later is not None:
            with self.undone():
                self.later.read()
        assert self.gauges is not None
        now = time.perf_counter()
        seconds, self.state.read_at = now - max(self.began, self.state.read_at), now
        return self.gauges.read(self.values, self.where, self.rate, seconds)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """A number in the block that is not finite leaves no trace in the model, and an error that says where."""
        try:
            yield
        except NonFiniteError as error:
            with torch.no_grad():
                for tensor, before in self.before:
                    tensor.copy_(before)
            self.state.epoch, self.state.step = self.where
            raise _nonfinite_error(error, self.state, self.indices, self.x, self.y) from error


def queue_step(now: Recipe, state: State, indices: Tensor) -> QueuedStep:
    """Do the next step, or, where the host may run ahead of the device, queue it."""
    began, where, part, model = time.perf_counter(), (state.epoch, state.step), state.train, state.model
    later = DeferredReads(state.queue[-1].later if state.queue else None) if state.ahead else None
    there = to_device(state.device, indices)
    # What moves though not all be well: the statistics and, where that is read late, the average of the weights.
    moved = [*model.buffers(), *(state.eval_model.state_dict().values() if later is not None and state.average else ())]
    rng = generator(now.seed, "augment", *where)
    x = to_float(augment(part.x[there], state.images.pad, state.images.flip, rng))
    step = QueuedStep(
        state, indices, x, part.y[there], where, float(state.optimizer.param_groups[0]["lr"]), began,
        [(tensor, tensor.clone()) for tensor in moved], later,
    )  # fmt: skip
    state.optimizer.zero_grad(set_to_none=True)
    with (
        step.undone(),
        defer_reads(later),
        fork_rng(),
        torch.enable_grad(),
        backends(),
        shard_batch(len(indices)) as rows,
    ):
        update = make_update(now, state.optimizer)
        seen, loss = train_step(now, model, step.x[rows], step.y[rows], where, update, state.forms)
        state.advance()
        step.gauges = step_metrics(now, seen, loss, where[1])
        read_later(step.gauges.values, step.values.extend)
    if later is not None:
        later.send()
    return step


def make_update(now: Recipe, optimizer: torch.optim.Optimizer) -> Callable[[Loss], None]:
    """loss -> nothing: the gradients of all processes and the optimiser's step, unless a number is not finite."""

    def update(loss: Loss) -> None:
        loss.total.backward()  # type: ignore[no-untyped-call]
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total, *gradients = all_reduce_sum(loss.total.detach(), *(p.grad for p in trained))
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        length = nn.utils.get_total_norm(gradients) if gradients else total

        def judge(facts: list[float]) -> None:
            if not math.isfinite(facts[0]):
                where, todo = _nonfinite_source(now, loss)
                raise NonFiniteError("the loss", f"is {facts[0]}{where}", todo)
            if not math.isfinite(facts[1]):
                raise NonFiniteError("the gradient", "is not finite")

        facts = torch.stack([total.double(), length.double()])
        broken = read_later(facts, judge, facts.isfinite().all())
        if broken is None:
            optimizer.step()
            return
        optimizer.found_inf = broken  # type: ignore[attr-defined]  # as torch's GradScaler tells it
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]

    return update


def _nonfinite_source(now: Recipe, loss: Loss) -> tuple[str, str]:
    """Which ingredient of the loss is to blame, and what to do where that alone is."""
    sound = bool(loss.terms.weighted.isfinite().all())
    todo = "Look for a division or a logarithm of zero in it." if sound else ""
    for what, value in {f"margin {plugin_name(now.margin)}": loss.margin, "weights": loss.weights,
                        "weighted term": loss.terms.weighted, "plain term": loss.terms.plain}.items():  # fmt: skip
        if isinstance(value, Tensor) and not value.isfinite().all():
            return f" (first in the {what})", todo
    return "", ""


def _nonfinite_error(error: NonFiniteError, state: State, indices: Tensor, x: Tensor, y: Tensor) -> NonFiniteError:
    path = state.dump(indices, x, y)
    batch = ", ".join(map(str, indices[:8].tolist())) + (", ..." if len(indices) > 8 else "")
    kept = f"The batch is in {path} (robustmail.reproduce reads it); the last saved state stays." if path else ""
    return NonFiniteError(
        f"epoch {state.epoch + 1}, step {state.step + 1} (training images {batch})",
        f"{error.who} {error.wrong}", f"{kept} {error.todo or 'Lower optimizer.lr.'}",
    )  # fmt: skip
