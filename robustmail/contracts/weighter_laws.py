"""The laws of weighters, on the range of the margin that they are used with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustmail.contracts.samples import Law, all_finite, changes_of_generators, difference
from robustmail.step import counted_steps, means_one, range_of

__all__ = ["tried_range", "weighter_laws"]

FAR = 20.0
"""Stands for an infinite end of a range: losses, energies and logits of trained networks are smaller"""


def tried_range(weighter: Any, margin: Any = None) -> tuple[float, float]:
    """The margins on which a weighter is tried: (low, high).

    They are the range that `margin` declares, an infinite end cut at 20, and no more than the K steps that the weighter
    counts. Without a margin, or where it declares none: [0, K] for a weighter that counts steps, else [-1, 1].
    """
    steps, declared = counted_steps(weighter), range_of(margin)
    if declared is None:
        return (-1.0, 1.0) if steps is None else (0.0, float(steps))
    low, high = max(declared[0], -FAR), min(declared[1], FAR)
    return (low, high) if steps is None else (max(low, 0.0), float(steps))


def weighter_laws(margin: Any = None) -> dict[str, Law]:
    """The laws by their sentence; margin: the one that the weighter is used with, None where none is known."""
    return {sentence: _on_range(law, margin) for sentence, law in LAWS.items()}


def _on_range(law: Callable[[Any, tuple[float, float]], str | None], margin: Any) -> Law:
    return lambda weighter: law(weighter, tried_range(weighter, margin))


def _margins(tried: tuple[float, float], n: int = 7) -> Tensor:
    return torch.linspace(*tried, n)


def _shape(weighter: Any, tried: tuple[float, float]) -> str | None:
    for n in (1, 2, 7):
        value = weighter(_margins(tried, n))
        if not isinstance(value, Tensor) or value.shape != (n,):
            return f"returned {getattr(value, 'shape', type(value).__name__)} for a batch of {n}"
    return None


def _finite(weighter: Any, tried: tuple[float, float]) -> str | None:
    low, high = tried
    for margin in (_margins(tried), torch.full((4,), low), torch.full((4,), high), torch.full((1,), (low + high) / 2)):
        value = weighter(margin)
        if wrong := all_finite(value):
            return f"{wrong} at margins {margin.tolist()}"
        if value.min() < 0:
            return f"returned {value.min().item():.3g} at margins {margin.tolist()}"
    return None


def _mean_one(weighter: Any, tried: tuple[float, float]) -> str | None:
    if not means_one(weighter):
        return None
    low, high = tried
    for n in (1, 5, 128):
        mean = weighter(low + (high - low) * torch.rand(n)).mean().item()
        if abs(mean - 1) > 1e-4:
            todo = "divide by the mean, or, if it is meant, give the weighter `normalize = False`"
            return f"the mean over a batch of {n} is {mean:.4g}; {todo}"
    return None


def _monotone(weighter: Any, tried: tuple[float, float]) -> str | None:
    value = weighter(_margins(tried, 33))
    if (value.diff() > 1e-6 * max(1.0, value.abs().max().item())).any():
        return "grows with the margin, so it listens to the easy examples"
    return None


def _order(weighter: Any, tried: tuple[float, float]) -> str | None:
    to, margins = torch.tensor([3, 1, 5, 0, 6, 2, 4]), _margins(tried)
    return difference(weighter(margins)[to], weighter(margins[to]), 1e-5, "in another order")


def _detached(weighter: Any, tried: tuple[float, float]) -> str | None:
    with torch.no_grad():
        value = weighter(_margins(tried))
    return "carries a graph" if value.requires_grad else None


def _generators_unchanged(weighter: Any, tried: tuple[float, float]) -> str | None:
    return changes_of_generators(lambda: weighter(_margins(tried)))


LAWS: dict[str, Callable[[Any, tuple[float, float]], str | None]] = {
    "one number per example": _shape,
    "finite and not negative": _finite,
    "mean one over the batch": _mean_one,
    "falls with the margin": _monotone,
    "independent of the order of examples": _order,
    "detached": _detached,
    "leaves the generators alone": _generators_unchanged,
}
