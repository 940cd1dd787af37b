"""Attacks on the weights, as contexts around the loss's backward pass and the optimiser's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustmail.fields import check_range, check_types
from robustmail.runtime.distributed import all_reduce_sum
from robustmail.step import restored

__all__ = ["AWP"]


@dataclass(frozen=True, kw_only=True)
class AWP:
    """Adversarial weight perturbation: theta_l + gamma * (||theta_l|| / ||g_l||) * g_l for each conv and linear
    weight l, where g is the gradient of the loss (Wu et al. 2020).

    Inside the context the weights are perturbed; on leaving it the perturbation is taken off again, and what the
    optimiser did in between stays. BatchNorm parameters and biases are left alone, BatchNorm statistics do not see
    the ascent pass. gamma: 0.01 for AT, 0.005 for TRADES in the authors' scripts; 0 switches it off, so a warm-up
    is `gamma=Stairs({0: 0.0, 10: 0.005})`.
    """

    gamma: float = 0.005

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, gamma=self.gamma)

    @contextmanager
    def __call__(self, model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[None]:
        if self.gamma == 0:
            yield
            return
        weights = [p for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name and p.requires_grad]
        gradients = _ascent(model, loss, weights)
        original = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w.add_(g * (self.gamma * w.norm() / (g.norm() + 1e-20)))
        perturbed = [w.detach().clone() for w in weights]
        try:
            yield
        finally:
            with torch.no_grad():
                for w, before, shifted in zip(weights, original, perturbed, strict=True):
                    # Exactly `before` where nothing stepped, also if the ascent's gradient was NaN.
                    untouched = (w == shifted) | shifted.isnan()
                    w.copy_(before.where(untouched, before + (w - shifted)))


def _ascent(model: nn.Module, loss: Callable[[], Tensor], weights: list[nn.Parameter]) -> tuple[Tensor, ...]:
    with restored(model.buffers()):
        return all_reduce_sum(*torch.autograd.grad(loss(), weights, allow_unused=True, materialize_grads=True))
