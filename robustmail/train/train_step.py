"""One training step: attack, loss, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustmail.attacks.view import viewed
from robustmail.data.dataset import augment, to_float
from robustmail.errors import NonFiniteError
from robustmail.models.precision import Forms, backends
from robustmail.plugin_calls import ask, broken, label
from robustmail.recipe import Loss, Recipe
from robustmail.records import StepDone
from robustmail.runtime.deferred import Later, look, looking_later, onto
from robustmail.runtime.distributed import one_batch, summed
from robustmail.runtime.rng import forked, generator, reseed
from robustmail.step import Adversarial, Step
from robustmail.train.metrics import Gauges, gauge
from robustmail.train.state import State

__all__ = ["attacked", "perturbed", "work_through", "updater"]


def attacked(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
    """Run the recipe's attack on a batch through a safe view of the model, and give its result one shape."""
    with viewed(model, recipe.attack_mode) as view:
        found = ask("attack", recipe.attack, view, x.clone(), y.clone())  # it may write into them
    found = Adversarial(found) if isinstance(found, Tensor) else found
    if not isinstance(found, Adversarial) or (found.x.shape, found.x.dtype) != (x.shape, x.dtype):
        got = (
            f"{str(found.x.dtype)[6:]} {list(found.x.shape)}"
            if isinstance(found, Adversarial)
            else type(found).__name__
        )
        wrong = f"returned {got}, expected images as it was given, {str(x.dtype)[6:]} {list(x.shape)}"
        raise broken("attack", recipe.attack, wrong)
    for name, values in found.trace._asdict().items() if found.trace else ():
        if values.ndim != 2 or values.shape[1] != len(x):
            wrong = f"its trace.{name} is {list(values.shape)}, expected [steps, {len(x)}]"
            raise broken("attack", recipe.attack, wrong)
    return Adversarial(found.x.detach(), found.trace)


def perturbed(now: Recipe, model: nn.Module, step: Step) -> AbstractContextManager[object]:
    """The context in which the loss of a step is reckoned: at perturbed weights, or as they are."""
    if now.perturb is None:
        return nullcontext()
    around = ask("perturb", now.perturb, model, lambda: now.loss(step.again()))
    if not isinstance(around, AbstractContextManager):
        raise broken("perturb", now.perturb, f"returned {type(around).__name__}, not a context", "Use contextmanager.")
    return around


def work_through(
    now: Recipe, model: nn.Module, x: Tensor, y: Tensor, where: tuple[int, int], update: Callable[[Loss], None],
    forms: Forms | None = None,
) -> tuple[Step, Loss]:  # fmt: skip
    """The batch of (epoch, step): attack it, reckon its loss, and hand that to `update`, inside the perturbation of
    the weights. Attack and loss call the model in its `forms`, or as it is.
    Attack and update draw from generators of their own; the caller has forked them and cleared gradients.
    """
    attackable, trainable = (forms.attack, forms.loss) if forms else (model, model)
    reseed(now.seed, "attack", *where)
    found = attacked(now, attackable, x, y)
    reseed(now.seed, "update", *where)
    step = Step(trainable, x, y, found.x, found.trace)
    model.train()
    with perturbed(now, model, step):  # the optimiser steps inside: the order of AWP's authors
        loss = now.reckon(step)
        update(loss)
    return step, loss


@dataclass
class _Launched:
    """A step that the host has queued: how to read it, or, where it met a number that is not finite, to undo it."""

    state: State
    indices: Tensor
    x: Tensor
    y: Tensor
    where: tuple[int, int]
    rate: float
    began: float
    before: list[tuple[Tensor, Tensor]]
    later: Later | None
    gauges: Gauges | None = None
    values: list[float] = field(default_factory=list)

    def read(self) -> StepDone:
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
            raise _stopped(error, self.state, self.indices, self.x, self.y) from error


def _launch(now: Recipe, state: State, indices: Tensor) -> _Launched:
    """Do the next step, or, where the host may run ahead of the device, queue it."""
    began, where, part, model = time.perf_counter(), (state.epoch, state.step), state.train, state.model
    later = Later(state.unread[-1].later if state.unread else None) if state.ahead else None
    there = onto(state.device, indices)
    # What moves though not all be well: the statistics and, where that is read late, the average of the weights.
    moved = [*model.buffers(), *(state.kept.state_dict().values() if later is not None and state.average else ())]
    rng = generator(now.seed, "augment", *where)
    x = to_float(augment(part.x[there], state.images.pad, state.images.flip, rng))
    step = _Launched(
        state, indices, x, part.y[there], where, float(state.optimizer.param_groups[0]["lr"]), began,
        [(tensor, tensor.clone()) for tensor in moved], later,
    )  # fmt: skip
    state.optimizer.zero_grad(set_to_none=True)
    with (
        step.undone(), looking_later(later), forked(), torch.enable_grad(), backends(), one_batch(len(indices)) as rows,
    ):  # fmt: skip
        update = updater(now, state.optimizer)
        seen, loss = work_through(now, model, step.x[rows], step.y[rows], where, update, state.forms)
        state.advance()
        step.gauges = gauge(now, seen, loss, where[1])
        look(step.gauges.values, step.values.extend)
    if later is not None:
        later.send()
    return step


def updater(now: Recipe, optimizer: torch.optim.Optimizer) -> Callable[[Loss], None]:
    """loss -> nothing: the gradients of all processes and the optimiser's step, unless a number is not finite."""

    def update(loss: Loss) -> None:
        loss.total.backward()  # type: ignore[no-untyped-call]
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total, *gradients = summed(loss.total.detach(), *(p.grad for p in trained))
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        length = nn.utils.get_total_norm(gradients) if gradients else total

        def judge(facts: list[float]) -> None:
            if not math.isfinite(facts[0]):
                where, todo = _culprit(now, loss)
                raise NonFiniteError("the loss", f"is {facts[0]}{where}", todo)
            if not math.isfinite(facts[1]):
                raise NonFiniteError("the gradient", "is not finite")

        facts = torch.stack([total.double(), length.double()])
        broken = look(facts, judge, facts.isfinite().all())
        if broken is None:
            optimizer.step()
            return
        optimizer.found_inf = broken  # type: ignore[attr-defined]  # as torch's GradScaler tells it
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]

    return update


def _culprit(now: Recipe, loss: Loss) -> tuple[str, str]:
    """Which ingredient of the loss is to blame, and what to do where that alone is."""
    sound = bool(loss.terms.weighted.isfinite().all())
    todo = "Look for a division or a logarithm of zero in it." if sound else ""
    for what, value in {f"margin {label(now.margin)}": loss.margin, "weights": loss.weights,
                        "weighted term": loss.terms.weighted, "plain term": loss.terms.plain}.items():  # fmt: skip
        if isinstance(value, Tensor) and not value.isfinite().all():
            return f" (first in the {what})", todo
    return "", ""


def _stopped(error: NonFiniteError, state: State, indices: Tensor, x: Tensor, y: Tensor) -> NonFiniteError:
    path = state.dump(indices, x, y)
    batch = ", ".join(map(str, indices[:8].tolist())) + (", ..." if len(indices) > 8 else "")
    kept = f"The batch is in {path} (robustmail.reproduce reads it); the last saved state stays." if path else ""
    return NonFiniteError(
        f"epoch {state.epoch + 1}, step {state.step + 1} (training images {batch})",
        f"{error.who} {error.wrong}", f"{kept} {error.todo or 'Lower optimizer.lr.'}",
    )  # fmt: skip
