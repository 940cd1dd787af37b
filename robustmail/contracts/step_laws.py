"""The laws of margins and objectives, which both take a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustmail.contracts.samples import (
    SIZE,
    Law,
    all_finite,
    changes_of_generators,
    changes_of_model,
    difference,
    in_training,
    random_images,
    random_logits,
    random_trace,
    sample_model,
    step_with_logits,
)
from robustmail.functional import one_hot
from robustmail.step import Step, Terms, Trace, range_of

__all__ = ["MARGIN_LAWS", "OBJECTIVE_LAWS"]


class _StepLaws:
    """Laws of a plugin that takes a step, by its values [B]; evaluate: (plugin, step) -> values."""

    def __init__(self, evaluate: Callable[[Any, Step], Tensor]) -> None:
        self.evaluate = evaluate

    def values(
        self, plugin: Any, change: Callable[[Tensor], Tensor] = lambda z: z, n: int = SIZE, classes: int = 10
    ) -> Tensor:
        """The values for n images with random logits; change: applied to the logits."""
        nat, adv = random_logits(n, classes)
        step = step_with_logits((change(nat), change(adv)), torch.arange(n) % classes, random_trace(n))
        return self.evaluate(plugin, step)

    def shape(self, plugin: Any) -> str | None:
        value = self.values(plugin)
        if not isinstance(value, Tensor):
            return f"returned {type(value).__name__}"
        return None if value.shape == (SIZE,) else f"returned shape {list(value.shape)} for a batch of {SIZE}"

    def finite(self, plugin: Any) -> str | None:
        return all_finite(self.values(plugin))

    def huge_logits(self, plugin: Any) -> str | None:
        return all_finite(self.values(plugin, lambda z: z.sign() * 1e4)) or all_finite(
            self.values(plugin, lambda z: z * 1e4 / 3)
        )

    def half_precision(self, plugin: Any) -> str | None:
        exact = self.values(plugin, lambda z: z.bfloat16().float())
        torch.manual_seed(0)
        value = self.values(plugin, lambda z: z.bfloat16())
        return all_finite(value) or difference(exact, value.float(), 0.05, "in float32 and bfloat16")

    def any_classes(self, plugin: Any) -> str | None:
        for classes in (2, 3, 100):
            value = self.values(plugin, classes=classes)
            if value.shape != (SIZE,) or not value.isfinite().all():
                return f"returned {value.tolist()} with {classes} classes"
        return None

    def batch_of_one(self, plugin: Any) -> str | None:
        value = self.values(plugin, n=1)
        return None if value.shape == (1,) and value.isfinite().all() else f"returned {value} for a batch of one"

    def order(self, plugin: Any) -> str | None:
        logits, y, trace, x = random_logits(), torch.arange(SIZE), random_trace(SIZE), torch.rand(SIZE, 3, 8, 8)
        value = self.evaluate(plugin, step_with_logits(logits, y, trace, x))
        to = torch.tensor([3, 1, 5, 0, 2, 4])
        shuffled = Trace(trace.correct[:, to], trace.p_true[:, to])
        moved = self.evaluate(plugin, step_with_logits((logits[0][to], logits[1][to]), y[to], shuffled, x[to]))
        return difference(value[to], moved, 1e-5, "when the batch is put in another order")

    def batch_mates(self, plugin: Any) -> str | None:
        logits, y, trace, x = random_logits(), torch.arange(SIZE), random_trace(SIZE), torch.rand(SIZE, 3, 8, 8)
        value = self.evaluate(plugin, step_with_logits(logits, y, trace, x))
        first_two = Trace(trace.correct[:, :2], trace.p_true[:, :2])
        alone = self.evaluate(plugin, step_with_logits((logits[0][:2], logits[1][:2]), y[:2], first_two, x[:2]))
        return difference(value[:2], alone, 1e-5, "in the company of other examples")

    def memory(self, plugin: Any) -> str | None:
        """What is remembered of an example depends on it alone: not on its place in the batch, nor on the others."""
        logits, y, trace, x = random_logits(), torch.arange(SIZE), random_trace(SIZE), torch.rand(SIZE, 3, 8, 8)
        whole = self._written(plugin, logits, y, trace, x, torch.arange(SIZE))
        for when, to in (("in another order", [3, 1, 5, 0, 2, 4]), ("in the company of others", [4, 2])):
            rows = torch.tensor(to)
            for name, values in self._written(plugin, logits, y, trace, x, rows).items():
                wrong = all_finite(values) or difference(whole[name][rows], values, 1e-5, when)
                if wrong:
                    return f"memory {name} {wrong}"
        return None

    def _written(
        self, plugin: Any, logits: tuple[Tensor, Tensor], y: Tensor, trace: Trace, x: Tensor, rows: Tensor
    ) -> dict[str, Tensor]:
        path = Trace(trace.correct[:, rows], trace.p_true[:, rows])
        step = step_with_logits((logits[0][rows], logits[1][rows]), y[rows], path, x[rows])
        self.evaluate(plugin, step)
        return step.context.written if step.context else {}

    def model_unchanged(self, plugin: Any) -> str | None:
        model, (x, y) = sample_model(), random_images()
        step = Step(model, x, y, x.clone(), random_trace(SIZE))
        return changes_of_model(model, lambda: self.evaluate(plugin, step))

    def generators_unchanged(self, plugin: Any) -> str | None:
        step = step_with_logits(random_logits(), torch.arange(SIZE), random_trace(SIZE))
        return changes_of_generators(lambda: self.evaluate(plugin, step))

    def repeatable(self, plugin: Any) -> str | None:
        step = step_with_logits(random_logits(), torch.arange(SIZE), random_trace(SIZE))
        return difference(self.evaluate(plugin, step), self.evaluate(plugin, step), 0.0, "when it is asked again")

    def inputs_unchanged(self, plugin: Any) -> str | None:
        logits = random_logits()
        step = step_with_logits(logits, torch.arange(SIZE), random_trace(SIZE))
        before = [t.clone() for t in (*logits, step.x, step.y)]
        self.evaluate(plugin, step)
        return (
            None if all(map(torch.equal, (*logits, step.x, step.y), before)) else "wrote into the tensors it was given"
        )


def _total(objective: Any, step: Step) -> Tensor:
    terms = objective(in_training(objective, step))
    total: Tensor = terms.weighted + terms.plain
    return total


def _margin_detached(margin: Any) -> str | None:
    model, (x, y) = sample_model(), random_images()
    value = margin(in_training(margin, Step(model, x, y, x, random_trace(SIZE))).detached())
    return "carries a graph: its gradient would reach the weights" if value.requires_grad else None


def _margin_in_range(margin: Any) -> str | None:
    if (declared := range_of(margin)) is None:
        return None
    for scale in (1.0, 100.0):
        values = _MARGIN.values(margin, lambda z, scale=scale: z * scale)  # type: ignore[misc]
        low, high = values.min().item(), values.max().item()
        slack = 1e-5 * max(1.0, abs(low), abs(high))
        if low < declared[0] - slack or high > declared[1] + slack:
            return f"declares the range {list(declared)}, returned values from {low:.4g} to {high:.4g}"
    return None


def _objective_terms(objective: Any) -> str | None:
    step = step_with_logits(random_logits(), torch.arange(SIZE), random_trace(SIZE))
    terms = objective(in_training(objective, step))
    if not isinstance(terms, Terms):
        return f"returned {type(terms).__name__}"
    plain = terms.plain
    if isinstance(plain, Tensor) and plain.shape != (SIZE,):
        return f"plain has shape {list(plain.shape)} for a batch of {SIZE}"
    return None if terms.weighted.shape == (SIZE,) else f"weighted has shape {list(terms.weighted.shape)}"


def _objective_gradient(objective: Any) -> str | None:
    nat, adv = (z.sign() * 1e4 for z in random_logits())
    for scale in (1.0, 1e-4):
        logits = (nat * scale).requires_grad_(), (adv * scale).requires_grad_()
        step = step_with_logits(logits, torch.arange(SIZE), random_trace(SIZE))
        terms = objective(in_training(objective, step))
        (terms.weighted + terms.plain).sum().backward()
        if logits[1].grad is None and logits[0].grad is None:
            return "no gradient reaches the logits"
        if any(z.grad is not None and not z.grad.isfinite().all() for z in logits):
            return f"NaN or infinite gradient at logits of {1e4 * scale:g}"
    return None


def _soft_finite(objective: Any) -> str | None:
    for change in (1.0, 1e4):
        logits, targets = tuple(z * change for z in random_logits()), _soft_labels()
        value = _total(objective, _soft_step((logits[0], logits[1]), targets))
        if wrong := all_finite(value):
            return wrong
    return None


def _soft_batch_mates(objective: Any) -> str | None:
    logits, targets = random_logits(), _soft_labels()
    value = _total(objective, _soft_step(logits, targets))
    alone = _total(objective, _soft_step((logits[0][:2], logits[1][:2]), targets[:2]))
    return difference(value[:2], alone, 1e-5, "in the company of other examples with soft labels")


def _soft_one_hot(objective: Any) -> str | None:
    logits = random_logits()
    y, trace, x = torch.arange(SIZE), random_trace(SIZE), torch.rand(SIZE, 3, 8, 8)
    soft = step_with_logits(logits, y, trace, x, one_hot(y, 10))
    hard = step_with_logits(logits, y, trace, x)
    return difference(_total(objective, hard), _total(objective, soft), 1e-5, "with one-hot targets in place of y")


def _soft_labels() -> Tensor:
    """Labels [SIZE, 10] that are mixed and smoothed."""
    y = torch.arange(SIZE)
    return 0.9 * (0.7 * one_hot(y, 10) + 0.3 * one_hot(y + 1, 10)) + 0.1 / 10


def _soft_step(logits: tuple[Tensor, Tensor], targets: Tensor) -> Step:
    """A step with soft labels, whose trace and images are the same for every batch."""
    n = len(targets)
    trace = Trace(torch.arange(10)[:, None] < torch.arange(n) + 2, torch.full((10, n), 0.5))
    return step_with_logits(logits, torch.arange(n), trace, torch.full((n, 3, 8, 8), 0.5), targets)


_MARGIN = _StepLaws(lambda margin, step: margin(in_training(margin, step).detached()))
_OBJECTIVE = _StepLaws(_total)

MARGIN_LAWS: dict[str, Law] = {
    "one number per example": _MARGIN.shape,
    "finite": _MARGIN.finite,
    "detached": _margin_detached,
    "independent of the order of examples": _MARGIN.order,
    "independent of batch mates": _MARGIN.batch_mates,
    "remembers of an example what is its own": _MARGIN.memory,
    "finite at huge logits": _MARGIN.huge_logits,
    "the same in bfloat16": _MARGIN.half_precision,
    "any number of classes": _MARGIN.any_classes,
    "a batch of one": _MARGIN.batch_of_one,
    "within the range that it declares": _margin_in_range,
    "leaves modes, gradients, BatchNorm statistics and weights alone": _MARGIN.model_unchanged,
    "leaves the generators alone": _MARGIN.generators_unchanged,
    "the same when asked again": _MARGIN.repeatable,
    "does not write into its input": _MARGIN.inputs_unchanged,
}

OBJECTIVE_LAWS: dict[str, Law] = {
    "two terms, one number per example": _objective_terms,
    "finite": _OBJECTIVE.finite,
    "finite at huge logits": _OBJECTIVE.huge_logits,
    "a finite gradient": _objective_gradient,
    "independent of the order of examples": _OBJECTIVE.order,
    "independent of batch mates": _OBJECTIVE.batch_mates,
    "remembers of an example what is its own": _OBJECTIVE.memory,
    "finite with soft labels": _soft_finite,
    "independent of batch mates with soft labels": _soft_batch_mates,
    "the same for labels and for one-hot targets": _soft_one_hot,
    "any number of classes": _OBJECTIVE.any_classes,
    "leaves the generators alone": _OBJECTIVE.generators_unchanged,
    "does not write into its input": _OBJECTIVE.inputs_unchanged,
}
