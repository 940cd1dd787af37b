"""Per-example maths on logits: cross-entropy, divergence, gaps. [B, classes] in, [B] out, float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ce", "gap", "kl", "precise", "true_class"]


def precise(values: Tensor) -> Tensor:
    """The same numbers in float32 at least: losses and weights are never computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy -log p_y, [B]."""
    return F.cross_entropy(precise(logits), y, reduction="none")


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k), [B].

    Both logarithms come from log_softmax, so value and gradient stay finite where a probability underflows: the usual
    xlogy form has a gradient of 0 * inf there, the NaN that TRADES code meets on recent torch.
    """
    log_p, log_q = precise(logits_p).log_softmax(1), precise(logits_q).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def true_class(scores: Tensor, y: Tensor) -> Tensor:
    """The score of the true class, [B]."""
    return scores.gather(1, y[:, None]).squeeze(1)


def gap(scores: Tensor, y: Tensor) -> Tensor:
    """s_y - max_{j != y} s_j, [B]: the probabilistic margin on probabilities (Eq. 4), the logit margin on logits."""
    rival = scores.scatter(1, y[:, None], float("-inf")).amax(1)
    return true_class(scores, y) - rival
