"""The training loop: a generator of plain records. Whoever iterates, shows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from robustmail.checkpoints import load_saved
from robustmail.data.images import augment, batches, to_float
from robustmail.devices import pick_device
from robustmail.distributed import one_batch, summed, world
from robustmail.errors import NonFiniteError
from robustmail.evaluation.plans import cost, plan
from robustmail.evaluation.statistics import wilson
from robustmail.evaluation.suite import trial
from robustmail.later import Later, look, looking_later, onto
from robustmail.models.classifier import build
from robustmail.precision import Decision, Forms, backends, forms
from robustmail.randomness import forked, generator, reseed
from robustmail.recipe import Loss, Recipe
from robustmail.records import Attacked, Begun, EpochDone, Forecast, Record, StepDone, so_many
from robustmail.rehearsal import ask, attacked, perturbed, rehearse
from robustmail.step import Step
from robustmail.train.gauges import Gauges, gauge
from robustmail.train.knobs import changing, turn
from robustmail.train.state import State
from robustmail.values import describe, label

__all__ = ["fit", "reproduce", "updater", "work_through", "worse"]

WARM_UP = 5  # steps before a forecast


def fit(recipe: Recipe, state: State | None = None, name: str = "recipe") -> Iterator[Record]:
    """Train, yielding a record after each step and each epoch; the state is saved on the way.

    for record in fit(recipe): print(record)

    Raises NonFiniteError at a loss that is not finite; the model is then as it was before that step.
    """
    state = state or State.fresh(recipe)
    yield _begun(recipe, state, name)
    clock, parameters = _Clock(recipe, state), state.model.parameters
    knobs = changing(recipe.optimizer, lambda made: ask("optimizer", made, parameters()), recipe.epochs, state.steps)
    while state.epoch < recipe.epochs:
        now = recipe.at(state.epoch)
        order = batches(len(state.train.y), recipe.batch, generator(recipe.seed, "order", state.epoch))
        for indices in order[state.step :]:
            turn(knobs, state.optimizer, state.epoch + state.step / state.steps)  # within an epoch, too
            state.unread.append(_launch(now, state, indices))
            last = state.step == len(order)
            for done in _read(state, 0 if last else state.ahead):
                yield done
                if (forecast := clock.tick(done)) is not None:
                    yield forecast
        yield _end_epoch(recipe, now, state)


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


def reproduce(dump: str | Path, recipe: Recipe) -> float:
    """The loss of the batch in a run's nonfinite.pt, reckoned again with the recipe that it stopped.

    On the recipe's device; bits depend on it, and on a CPU's number of threads. Raises NonFiniteError where it was
    already the attack that met NaN; a loss that is finite after all had a gradient that was not.
    """
    device = pick_device(recipe.device)
    content = load_saved(Path(dump), device)
    x, y, epoch, step = (content[name] for name in ("x", "y", "epoch", "step"))
    model = build(recipe.model, content["classes"], x.shape[1], recipe.normalize).to(device)
    model.load_state_dict(content["model"])
    made = forms(model, Decision(content["precision"], "as it was"), recipe.attack_mode, x)
    with forked(), backends():
        _, loss = work_through(recipe.at(epoch), model, x, y, (epoch, step), lambda _: None, made)
    return loss.total.item()


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


def _read(state: State, ahead: int) -> list[StepDone]:
    """What is known of the steps, but for the last `ahead`; then save, if it is time to."""
    due = state.due
    done = state.settle(0 if due else ahead)
    if due:
        state.save()
    return done


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


def _end_epoch(recipe: Recipe, now: Recipe, state: State) -> EpochDone:
    means = {name: total / count for name, (total, count) in state.sums.items() if count}
    scores = _validate(recipe, state, state.kept)
    live = _validate(recipe, state, state.model) if state.average is not None else {}
    columns = ("loss", "weighted", "plain", "nat", "adv", "ess", "top", "right", "wrong")
    row = {
        "epoch": state.epoch, "lr": now.optimizer.lr, "weights": "on" if now.weight else "off",
        **{f"train_{name}": means.get(name, "") for name in columns}, **scores,
        **{f"{name}_live": score for name, score in live.items()},
    }  # fmt: skip
    better = scores["val_rob"] > state.best
    if better:
        state.best, state.best_epoch = scores["val_rob"], state.epoch
        state.write_weights("best")  # before the state: a kill in between repeats the epoch, and the file with it
    state.history.append(row)
    state.write_weights("last")
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    state.save()
    return EpochDone(row, better, worse(row, len(state.validation.y)))


def worse(row: Mapping[str, Any], n: int) -> str:
    """A sentence where the average of the weights, which is what is kept, is clearly worse on n held-out images than
    the live weights: the two 95 % intervals lie apart. Empty otherwise, and for a run without an average."""
    pairs = [(row[name], row[f"{name}_live"]) for name in ("val_nat", "val_rob") if f"{name}_live" in row]
    apart = [wilson(round(kept * n), n)[1] < wilson(round(live * n), n)[0] for kept, live in pairs]
    if not any(apart):
        return ""
    (nat, nat_live), (rob, rob_live) = pairs
    return (
        f"the average of the weights (ema), which is kept, is worse than the live weights: validation natural "
        f"{nat:.1%} against {nat_live:.1%}, robust {rob:.1%} against {rob_live:.1%}. Lower ema".replace("%", " %")
    )


def _validate(recipe: Recipe, state: State, model: nn.Module) -> dict[str, float]:
    """Natural and robust accuracy of a model on the held-out images, the same noise at each epoch."""
    scores = {}
    for name, attack in {"val_nat": "nat", "val_rob": recipe.validate}.items():
        what = plan(attack, recipe.budget, state.images.classes, recipe.norm)
        verdict = [r for r in trial(model, state.validation, what, recipe.seed) if isinstance(r, Attacked)]
        scores[name] = verdict[0].accuracy
    return scores


def _begun(recipe: Recipe, state: State, name: str) -> Begun:
    sizes = len(state.train.y), len(state.validation.y), len(state.images.test.first(recipe.test_size).y)
    return Begun(
        name=name, formula=recipe.formula, model=describe(recipe.model).strip("'"),
        parameters=sum(p.numel() for p in state.model.parameters()), data=state.images.name, sizes=sizes,
        device=_device_name(state.device), epochs=recipe.epochs, steps=state.steps, burn_in=recipe.burn_in,
        epoch=state.epoch, step=state.step, note=state.note,
        precision=state.forms.said,
    )  # fmt: skip


def _device_name(device: torch.device) -> str:
    each = f", {world()} processes" if world() > 1 else ""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}){each}"
    return f"cpu ({so_many(torch.get_num_threads(), 'thread')}){each}"


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


class _Clock:
    """Makes one forecast, from the first steps after the very first."""

    def __init__(self, recipe: Recipe, state: State) -> None:
        self.recipe, self.state = recipe, state
        self.seen: list[float] = []
        self.told = False

    def tick(self, done: StepDone) -> Forecast | None:
        """A forecast when there is enough to make one from, once."""
        self.seen.append(done.seconds * self.recipe.batch / done.images)
        if self.told or len(self.seen) < min(WARM_UP + 1, self.state.steps):
            return None
        self.told = True
        recipe, state = self.recipe, self.state
        per_step = median(self.seen[1:] or self.seen)
        # One step is so many passes of a batch; an evaluation is so many passes of its images.
        forward, backward = rehearse(recipe.at(recipe.epochs - 1), state.images.classes, state.images.shape).total
        per_pass = per_step / (forward + 2 * backward) / recipe.batch
        left = (recipe.epochs - state.epoch) * state.steps - state.step
        models = 1 if state.average is None else 2  # the live weights are validated, too
        validation = per_pass * cost(recipe.validate) * len(state.validation.y) * (recipe.epochs - state.epoch) * models
        n = len(state.images.test.first(recipe.test_size).y)
        evaluation = per_pass * n * sum(map(cost, recipe.evaluate))
        return Forecast(left * per_step + validation, evaluation, per_step, state.device.type == "cpu")
