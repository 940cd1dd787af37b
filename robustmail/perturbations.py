"""Perturbations of the weights: contexts around the loss's backward pass and the optimiser's step."""

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

    Inside the context the weights are perturbed; on leaving it the perturbation is subtracted again, and what the
    optimiser did in between stays. BatchNorm parameters and biases are not perturbed; BatchNorm statistics do not see
    the ascent pass. gamma: at least 0; 0.01 for AT, 0.005 for TRADES in the authors' scripts; 0 switches it off, so a
    warm-up is `gamma=Stairs({0: 0.0, 10: 0.005})`. Raises RecipeError for a gamma that is no such number.
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
        params = [p for name, p in model.named_parameters() if p.ndim > 1 and "weight" in name and p.requires_grad]
        if not params:  # all of them are frozen
            yield
            return
        gradients = _ascent(model, loss, params)
        original = [p.detach().clone() for p in params]
        with torch.no_grad():  # no weight changes before all memory is there
            steps = [g * (self.gamma * p.norm() / (g.norm() + 1e-20)) for p, g in zip(params, gradients, strict=True)]
            perturbed = [p + step for p, step in zip(params, steps, strict=True)]
            for p, shifted in zip(params, perturbed, strict=True):
                p.copy_(shifted)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, before, shifted in zip(params, original, perturbed, strict=True):
                    # Exactly `before` where the optimiser changed nothing, also if the ascent's gradient was NaN.
                    is_unchanged = (p == shifted) | shifted.isnan()
                    p.copy_(before.where(is_unchanged, before + (p - shifted)))


def _ascent(model: nn.Module, loss: Callable[[], Tensor], params: list[nn.Parameter]) -> tuple[Tensor, ...]:
    with restored(model.buffers()):
        return all_reduce_sum(*torch.autograd.grad(loss(), params, allow_unused=True, materialize_grads=True))
