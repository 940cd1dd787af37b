"""Losses and margins of single examples: logits or probabilities [B, classes] -> [B], in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ce", "gap", "kl", "one_hot", "pm_ascent", "precise", "true_class"]


def precise(values: Tensor) -> Tensor:
    """Cast half precision to float32, keep float32 and float64: losses and weights need at least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, [B]: -log p_y of labels [B] int64, -sum_k t_k log p_k of soft labels [B, classes].

    logits: [B, classes].
    """
    logits = precise(logits)
    return F.cross_entropy(logits, labels if labels.ndim == 1 else labels.to(logits.dtype), reduction="none")


def one_hot(y: Tensor, classes: int) -> Tensor:
    """1 at the class and 0 elsewhere, [B, classes] float32; y: [B] int64."""
    return torch.zeros(len(y), classes, device=y.device).scatter_(1, y[:, None], 1.0)


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k), [B]; both logits: [B, classes].

    Both logarithms come from log_softmax, so value and gradient stay finite where a probability underflows. The usual
    form with xlogy has a gradient of 0 * inf there: the NaN of TRADES code on recent torch.
    """
    log_p, log_q = precise(logits_p).log_softmax(1), precise(logits_q).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def true_class(scores: Tensor, y: Tensor) -> Tensor:
    """s_y, the score of the true class, [B]; scores: [B, classes], y: [B] int64."""
    return scores.gather(1, y[:, None]).squeeze(1)


def gap(scores: Tensor, y: Tensor) -> Tensor:
    """s_y - max_{j != y} s_j, [B]; scores: [B, classes], y: [B] int64.

    On probabilities it is the probabilistic margin (MAIL, Eq. 4), on logits the logit margin.
    """
    rival = scores.scatter(1, y[:, None], float("-inf")).amax(1)
    return true_class(scores, y) - rival


def pm_ascent(logits: Tensor, y: Tensor, rival: Tensor | None = None) -> Tensor:
    """Values [B] whose gradient is that of p_r - p_y, divided by the constant 1 - p_y of each example.

    In float32 p_y is 1 where the logits differ by more than 17; the gradient of p_r - p_y itself is 0 there, and an
    attack stands still. The division is done on paper, so that the direction stays exact.
    logits: [B, classes]. y: true classes, [B] int64. rival: the class r, [B] int64; by default the likeliest one other
    than y, and then p_r - p_y is minus the probabilistic margin.
    """
    logits = precise(logits)
    with torch.no_grad():
        p, others = logits.softmax(1), logits.scatter(1, y[:, None], float("-inf")).softmax(1)  # p_j / (1 - p_y)
        r = (others.argmax(1) if rival is None else rival)[:, None]
        p_y, p_r, others_r = p.gather(1, y[:, None]), p.gather(1, r), others.gather(1, r)
        slope = others * (p_y - p_r)
        slope = slope.scatter(1, r, others_r * (1 - p_r + p_y)).scatter(1, y[:, None], -p_y * (1 + others_r))
    return (slope * logits).sum(1)
