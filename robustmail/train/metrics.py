"""What a step looked like: accuracies, the margins as a histogram, and what the weights did. Never touches training."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robustmail.functional import gap, precise
from robustmail.plugin_calls import plugin_name
from robustmail.recipe import Loss, Recipe
from robustmail.records import StepFinished, WeightStats
from robustmail.runtime.distributed import all_reduce_sum, gather_batch
from robustmail.step import Step

__all__ = ["BINS", "StepMetrics", "step_metrics", "weight_stats"]

BINS = 18  # an even number: zero is an edge
HEAVY = 0.03  # the share of examples whose part of the loss is watched
NATURAL_EVERY = 10  # every so many steps, where the loss does not anyway


class StepMetrics(NamedTuple):
    """What there is to tell of a step: numbers that lie on the device still, and what is known without them."""

    values: Tensor
    """[n] float64: loss, weighted, plain, adv, nat, four of the weights, the histogram's span and its BINS counts; NaN
    where there is nothing to tell"""
    images: int
    margin: str
    weighs: bool

    def read(self, values: list[float], where: tuple[int, int], rate: float, seconds: float) -> StepFinished:
        """The record, from the numbers."""
        loss, weighted, plain, adv, nat, ess, top, right, wrong, low, high = values[:-BINS]
        return StepFinished(
            epoch=where[0], step=where[1] + 1, images=self.images, lr=rate, loss=loss, weighted=weighted, plain=plain,
            adv=adv, nat=_known(nat), margin=self.margin, histogram=tuple(map(int, values[-BINS:])), span=(low, high),
            weights=WeightStats(ess, top, _known(right), _known(wrong)) if self.weighs else None, seconds=seconds,
        )  # fmt: skip


@torch.no_grad()
def step_metrics(now: Recipe, step: Step, loss: Loss, number: int) -> StepMetrics:
    """Gauge the step of that number in its epoch, from what it has computed already."""
    view = step.detached()
    y = step.y
    nothing = torch.full((), math.nan, dtype=torch.float64, device=y.device)
    nat = nothing
    if step.has("nat") or number % NATURAL_EVERY == 0:
        nat = gather_batch(view.logits_nat.argmax(1) == y).double().mean()
    right = gather_batch(view.logits_adv.argmax(1) == y)
    margin = gather_batch(precise(gap(view.probs_adv, y) if loss.margin is None else loss.margin))
    plain, weighted = loss.terms.plain, gather_batch(precise(loss.terms.weighted))
    weights = None if loss.weights is None else gather_batch(loss.weights)
    values = [
        all_reduce_sum(loss.total.detach())[0],
        (weighted if weights is None else weights * weighted).mean(),
        gather_batch(plain).mean() if isinstance(plain, Tensor) else torch.full_like(nothing, plain),
        right.double().mean(),
        nat,
        *([nothing] * 4 if weights is None else weight_stats(weights, weighted, right)),
        *_histogram(margin),
    ]
    name = "pm_adv" if loss.margin is None else plugin_name(now.margin)
    return StepMetrics(torch.cat([v.double().view(-1) for v in values]), len(right), name, weights is not None)


def weight_stats(weights: Tensor, weighted: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Effective sample size, share of the heaviest, mean weight of right and wrong (NaN for none); all inputs [B]."""
    w = weights.double()
    heaviest = w.argsort(descending=True)[: max(1, math.ceil(HEAVY * len(w)))]
    parts = w * weighted.double()
    ess = (w.sum() ** 2 / (w**2).sum() / len(w)).nan_to_num(0.0)  # all weights zero
    carried = parts.sum()
    top = torch.where(carried > 0, parts[heaviest].sum() / carried, 0.0)
    of_right, of_wrong = ((w * which).sum() / which.sum() for which in (right, ~right))
    return ess, top, of_right, of_wrong


def _histogram(margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lower end, upper end, counts): -1 ... 1 where that holds them all, else the next whole numbers."""
    low, high = margin.aminmax()
    inside = (low >= -1) & (high <= 1)
    low = torch.where(inside, -1.0, low.floor())
    high = torch.where(inside, 1.0, high.ceil())
    high = torch.where(low == high, high + 1, high)
    # Not torch.histc, whose ends are the host's: it would wait for them.
    bins = ((margin - low) / (high - low) * BINS).floor().clamp(0, BINS - 1)
    return low, high, (bins[:, None] == torch.arange(BINS, device=bins.device)).sum(0)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
