"""Losses and margins of single examples: logits or probabilities [B, classes] -> [B], in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ce", "gap", "kl", "one_hot", "precise", "true_class"]


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
