"""What a step looked like: accuracies, the margins as a histogram, and what the weights did. Never touches training."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from robustmail.distributed import everyone, summed
from robustmail.recipe import Loss, Recipe
from robustmail.records import StepDone, WeightStats
from robustmail.scores import gap, precise
from robustmail.step import Step
from robustmail.values import label

__all__ = ["BINS", "gauge", "weight_stats"]

BINS = 18  # an even number: zero is an edge
HEAVY = 0.03  # the share of examples whose part of the loss is watched
LOOK_AT_NATURAL = 10  # every so many steps, where the loss does not anyway


@torch.no_grad()
def gauge(now: Recipe, step: Step, loss: Loss, where: tuple[int, int], rate: float, began: float) -> StepDone:
    """The record of one step, read from what the step has computed already."""
    view = step.detached()
    y = step.y
    natural = None
    if step.has("nat") or where[1] % LOOK_AT_NATURAL == 0:
        natural = everyone(view.logits_nat.argmax(1) == y).float().mean().item()
    right = everyone(view.logits_adv.argmax(1) == y)
    margin = everyone(precise(gap(view.probs_adv, y) if loss.margin is None else loss.margin))
    histogram, span = _histogram(margin)
    plain, weighted = loss.terms.plain, everyone(precise(loss.terms.weighted))
    weights = None if loss.weights is None else everyone(loss.weights)
    return StepDone(
        epoch=where[0], step=where[1] + 1, images=len(right), lr=rate, loss=summed(loss.total.detach())[0].item(),
        weighted=(weighted if weights is None else weights * weighted).mean().item(),
        plain=everyone(plain).mean().item() if isinstance(plain, Tensor) else float(plain),
        adv=right.float().mean().item(), nat=natural,
        margin="pm_adv" if loss.margin is None else label(now.margin), histogram=histogram, span=span,
        weights=None if weights is None else weight_stats(weights, weighted, right),
        seconds=time.perf_counter() - began,
    )  # fmt: skip


def weight_stats(weights: Tensor, weighted: Tensor, right: Tensor) -> WeightStats:
    """Effective sample size, share of the heaviest, mean weight of right and wrong; all inputs [B]."""
    w, total = weights.double(), weights.double().sum()
    heaviest = w.argsort(descending=True)[: max(1, math.ceil(HEAVY * len(w)))]
    parts = w * weighted.double()
    carried = parts.sum()
    return WeightStats(
        ess=(total**2 / (w**2).sum() / len(w)).item() if total > 0 else 0.0,
        top=(parts[heaviest].sum() / carried).item() if carried > 0 else 0.0,
        right=w[right].mean().item() if right.any() else None,
        wrong=w[~right].mean().item() if not right.all() else None,
    )


def _histogram(margin: Tensor) -> tuple[tuple[int, ...], tuple[float, float]]:
    low, high = margin.min().item(), margin.max().item()
    span = (-1.0, 1.0) if low >= -1 and high <= 1 else (math.floor(low), math.ceil(high))
    if span[0] == span[1]:
        span = (span[0], span[0] + 1)
    counts = torch.histc(margin.float().cpu(), bins=BINS, min=span[0], max=span[1])
    return tuple(int(c) for c in counts), span
