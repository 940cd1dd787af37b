"""Accuracies in quantiles of the images: by clean margin, and by the weight that a run's method would give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.results import Check
from robustmail.evaluation.statistics import wilson

__all__ = ["QUANTILES", "by_margin", "by_weight", "weight_check"]

QUANTILES = 5


def by_margin(ledger: Ledger) -> list[dict[str, Any]]:
    """Accuracies in quantiles of the clean margin, smallest first."""
    return [_row(ledger, ledger.margin, positions) for positions in _quantiles(ledger.margin)]


def by_weight(weights: list[float], ledger: Ledger) -> list[dict[str, Any]]:
    """Accuracies in quantiles of the weight, smallest first, with Wilson intervals of the robust one; nothing where all
    weights are equal, or none are known.

    weights: of the first images of the data set. ledger: of all images, or of a shard's.
    """
    known = (ledger.index < len(weights)).nonzero().flatten()
    values = torch.tensor(weights)[ledger.index[known]]
    if not len(values) or bool((values == values[0]).all()):
        return []
    weighed, rows = ledger.take(known), []
    for positions in _quantiles(values):
        row = _row(weighed, values, positions)
        low, high = wilson(round(row["robust"] * row["n"]), row["n"])
        rows.append(row | {"robust_low": low, "robust_high": high})
    return rows


def weight_check(rows: list[dict[str, Any]]) -> Iterator[Check]:
    """Judge what `by_weight` returned; nothing where it has no rows."""
    if not rows:
        return
    light, heavier = rows[0], max(rows[1:], key=lambda row: float(row["robust_low"]), default=rows[0])
    shares = ", ".join(f"{100 * row['robust']:.1f}" for row in rows)
    yield Check(
        "robust-accuracy-by-weight",
        "yellow" if light["robust_high"] < heavier["robust_low"] else "green",
        f"robust accuracy from the images of smallest weight to those of largest: {shares} %",
        "images that the method counted as safe, and hardly trained on, break more than others",
    )


def _quantiles(values: Tensor) -> tuple[Tensor, ...]:
    """Positions of the values in each quantile, smallest first."""
    return values.argsort(stable=True).tensor_split(min(QUANTILES, len(values)))


def _row(ledger: Ledger, values: Tensor, positions: Tensor) -> dict[str, Any]:
    inside, n = values[positions], len(positions)
    natural, robust = (int(mask[positions].sum()) / n for mask in (ledger.right, ledger.stands))
    low, high = (round(float(v), 6) for v in (inside.min(), inside.max()))
    return {"low": low, "high": high, "n": n, "natural": natural, "robust": robust}
