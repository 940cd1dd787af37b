"""The margin decomposition attack, for models whose margin has one term that hides the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustmail.attacks.steps import Lowest, gradient_and_logits, project, steepest, uniform_start
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.functional import gap, true_class
from robustmail.norms import Norm, check_budget, check_counts
from robustmail.step import Adversarial

__all__ = ["MD"]

Term = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class MD:
    """Ascends -z_y alone, then max_{j != y} z_j - z_y; from another start max_{j != y} z_j alone, then the same
    (Ma et al. 2023).

    In the first half of the steps only one term of the margin is ascended, except at the first step, which ascends z_y;
    in the second half the margin itself. Step i of the n steps of a half has the length eps (1 + cos(pi i / n)). Where
    the gradient of one term is much larger than the other's (imbalanced gradients), this finds what PGD does not.

    eps: radius of the ball, in pixels of [0, 1].
    steps: number of steps of each of the two runs, at least 2.
    norm: "linf" or "l2".
    eot: passes over which each gradient is averaged, for a model that answers at random.

    Returns of each image the iterate with the lowest z_y - max_{j != y} z_j; an image stops when it is misclassified.
    The authors' code restarts the cosine one step later.
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`.
    """

    eps: float = 8 / 255
    steps: int = 50
    norm: Norm = "linf"
    eot: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("MD", self.norm, eps=self.eps)
        check_counts("MD", minimum=2, steps=self.steps)
        check_counts("MD", eot=self.eot)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("MD", x)
        with model_view(model) as view:
            lowest = Lowest(x)
            for term in (_minus_true, _rival):
                start = uniform_start(x, self.eps, self.norm)  # of all images: what one draws depends on no other
                self._run(view, x, y, start, term, lowest)
            return Adversarial(check_result("MD", view, x, lowest.x, self.eps, self.norm))

    def _run(self, view: ModelView, x: Tensor, y: Tensor, x_adv: Tensor, term: Term, lowest: Lowest) -> None:
        active = torch.arange(len(y), device=x.device)
        half = self.steps // 2
        for k in range(self.steps):
            active = lowest.standing(active)
            if not len(active):
                return
            loss = true_class if k == 0 else term if k < half else _margin
            labels, iterate = y[active], x_adv[active]
            gradient, logits = gradient_and_logits(view, iterate, partial(loss, y=labels), self.eot)
            lowest.offer(active, iterate, logits, labels)
            i, n = (k, half) if k < half else (k - half, self.steps - half)
            step = self.eps * (1 + math.cos(math.pi * i / n)) * steepest(gradient, self.norm)
            x_adv[active] = project(x[active], iterate + step, self.eps, self.norm)
        active = lowest.standing(active)
        if len(active):
            with torch.no_grad():
                lowest.offer(active, x_adv[active], view(x_adv[active]), y[active])


def _minus_true(logits: Tensor, y: Tensor) -> Tensor:
    return -true_class(logits, y)


def _rival(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], float("-inf")).amax(1)


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    return -gap(logits, y)
