"""Metrics of a training step: accuracies, a histogram of margins, statistics of the weights. Training is unaffected."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robustmail.functional import gap, precise
from robustmail.plugin_calls import plugin_name
from robustmail.recipe import Loss, Recipe
from robustmail.records import StepFinished, WeightStats
from robustmail.runtime.devices import wide
from robustmail.runtime.distributed import all_reduce_sum, gather_batch
from robustmail.step import Step
from robustmail.train.accumulate import each_micro_batch

__all__ = ["BINS", "StepMetrics", "step_metrics", "weight_stats"]

BINS = 18  # an even number: zero is an edge
HEAVY = 0.03  # share of examples, the heaviest ones, whose part of the loss is reported
NATURAL_EVERY = 10  # steps between two natural accuracies, where the loss does not need the natural logits


class StepMetrics(NamedTuple):
    """Metrics of a step, as numbers on the device, with what is known without reading them."""

    values: Tensor
    """[n] float64: loss, weighted, plain, adv, nat, four statistics of the weights (`weight_stats`), low and high end
    of the histogram and its BINS counts; NaN where there is no value"""
    images: int
    """size of the whole batch"""
    margin: str
    """name of the margin in the histogram"""
    is_weighted: bool

    def read(self, values: list[float], position: tuple[int, int], lr: float, seconds: float) -> StepFinished:
        """The step's record, from `values` on the host; position: (epoch, step), both from 0."""
        loss, weighted, plain, adv, nat, ess, top, right, wrong, low, high = values[:-BINS]
        return StepFinished(
            epoch=position[0], step=position[1] + 1, images=self.images, lr=lr, loss=loss, weighted=weighted,
            plain=plain, adv=adv, nat=_known(nat), margin=self.margin, histogram=tuple(map(int, values[-BINS:])),
            span=(low, high), weights=WeightStats(ess, top, _known(right), _known(wrong)) if self.is_weighted else None,
            seconds=seconds,
        )  # fmt: skip


@torch.no_grad()
def step_metrics(recipe: Recipe, step: Step, loss: Loss, number: int) -> StepMetrics:
    """Metrics from what a step has computed; number: of the step within its epoch, from 0."""
    view = step.detached()
    y = step.y
    no_value = wide(torch.full((), math.nan, device=y.device))
    nat = no_value
    if step.has("nat") or number % NATURAL_EVERY == 0:
        natural = torch.cat(each_micro_batch(len(y), lambda rows: view.part(rows).logits_nat))
        nat = wide(gather_batch(natural.argmax(1) == y)).mean()
    right = gather_batch(view.logits_adv.argmax(1) == y)
    margin = gather_batch(precise(gap(view.probs_adv, y) if loss.margin is None else loss.margin))
    plain, weighted = loss.terms.plain, gather_batch(precise(loss.terms.weighted))
    weights = None if loss.weights is None else gather_batch(loss.weights)
    values = [
        all_reduce_sum(loss.total.detach())[0],
        (weighted if weights is None else weights * weighted).mean(),
        gather_batch(plain).mean() if isinstance(plain, Tensor) else torch.full_like(no_value, plain),
        wide(right).mean(),
        nat,
        *([no_value] * 4 if weights is None else weight_stats(weights, weighted, right)),
        *_histogram(margin),
    ]
    name = "pm_adv" if loss.margin is None else plugin_name(recipe.margin)
    return StepMetrics(torch.cat([wide(v).view(-1) for v in values]), len(right), name, weights is not None)


def weight_stats(weights: Tensor, weighted: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the weights of a batch; all inputs [B], `right` is bool.

    Returns the effective sample size (sum w)^2 / sum w^2 / B in [0, 1], the heaviest 3 %'s share of the weighted loss,
    and the mean weight of images classified right and wrong under attack (NaN for none).
    """
    w = wide(weights)
    heaviest = w.argsort(descending=True)[: max(1, math.ceil(HEAVY * len(w)))]
    parts = w * wide(weighted)
    ess = (w.sum() ** 2 / (w**2).sum() / len(w)).nan_to_num(0.0)  # all weights zero
    carried = parts.sum()
    top = torch.where(carried > 0, parts[heaviest].sum() / carried, 0.0)
    of_right, of_wrong = ((w * which).sum() / which.sum() for which in (right, ~right))
    return ess, top, of_right, of_wrong


def _histogram(margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(low end, high end, [BINS] counts); the ends are -1 and 1 if all margins lie between, else whole numbers."""
    low, high = margin.aminmax()
    inside = (low >= -1) & (high <= 1)
    low = torch.where(inside, -1.0, low.floor())
    high = torch.where(inside, 1.0, high.ceil())
    high = torch.where(low == high, high + 1, high)
    # Not torch.histc: it takes its ends as numbers on the host, which would wait for the device.
    bins = ((margin - low) / (high - low) * BINS).floor().clamp(0, BINS - 1)
    return low, high, (bins[:, None] == torch.arange(BINS, device=bins.device)).sum(0)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
