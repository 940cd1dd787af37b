"""The laws of weighters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustmail.contracts.samples import MARGINS, Law, all_finite, changes_of_generators, difference
from robustmail.step import counted_steps, means_one

__all__ = ["WEIGHTER_LAWS"]


def _counted_margins(weighter: Any) -> list[Tensor]:
    """The margins 0 ... K, for a weighter that declares that it counts steps; other weighters need only [-1, 1]."""
    steps = counted_steps(weighter)
    return [] if steps is None else [torch.arange(steps + 1.0)]


def _shape(weighter: Any) -> str | None:
    for n in (1, 2, 7):
        value = weighter(torch.linspace(-1, 1, n))
        if not isinstance(value, Tensor) or value.shape != (n,):
            return f"returned {getattr(value, 'shape', type(value).__name__)} for a batch of {n}"
    return None


def _finite(weighter: Any) -> str | None:
    for margin in (MARGINS, torch.ones(4), -torch.ones(4), torch.zeros(1), *_counted_margins(weighter)):
        value = weighter(margin)
        if wrong := all_finite(value):
            return f"{wrong} at margins {margin.tolist()}"
        if value.min() < 0:
            return f"returned {value.min().item():.3g} at margins {margin.tolist()}"
    return None


def _mean_one(weighter: Any) -> str | None:
    if not means_one(weighter):
        return None
    for n in (1, 5, 128):
        mean = weighter(torch.rand(n) * 2 - 1).mean().item()
        if abs(mean - 1) > 1e-4:
            todo = "divide by the mean, or, if it is meant, give the weight `mean_one = False`"
            return f"the mean over a batch of {n} is {mean:.4g}; {todo}"
    return None


def _monotone(weighter: Any) -> str | None:
    for margin in (torch.linspace(-1, 1, 33), *_counted_margins(weighter)):
        if (weighter(margin).diff() > 1e-6).any():
            return "grows with the margin, so it listens to the easy examples"
    return None


def _order(weighter: Any) -> str | None:
    to = torch.tensor([3, 1, 5, 0, 6, 2, 4])
    return difference(weighter(MARGINS)[to], weighter(MARGINS[to]), 1e-5, "in another order")


def _detached(weighter: Any) -> str | None:
    with torch.no_grad():
        value = weighter(MARGINS)
    return "carries a graph" if value.requires_grad else None


def _generators_unchanged(weighter: Any) -> str | None:
    return changes_of_generators(lambda: weighter(MARGINS))


WEIGHTER_LAWS: dict[str, Law] = {
    "one number per example": _shape,
    "finite and not negative": _finite,
    "mean one over the batch": _mean_one,
    "falls with the margin": _monotone,
    "independent of the order of examples": _order,
    "detached": _detached,
    "leaves the generators alone": _generators_unchanged,
}
