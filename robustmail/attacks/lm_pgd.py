"""LM-PGD: PGD with line search and momentum, which leaves corners of the ball in which plain PGD stays."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.functional import ce, true_class
from robustmail.norms import check_budget, check_counts
from robustmail.step import Adversarial, Trace

__all__ = ["LMPGD"]

HALVINGS = 7  # step sizes tried: 2 eps, which crosses the whole ball, and its halves


@dataclass(frozen=True, kw_only=True)
class LMPGD:
    """PGD with a line search for the step size of each example, and Nesterov's momentum; L-inf, cross-entropy.

    u = x_t + (a_t - 1) / a_{t+1} (x_t - x_{t-1}), with a_{t+1} = (1 + sqrt(1 + 4 a_t^2)) / 2; x_{t+1} is the
    u + s sign(gradient at u) of the largest loss over s in {2 eps / 2^j, j = 0 ... 6} and s = alpha. Every iterate is
    clipped to the eps-ball and to [0, 1]. The momentum of an example restarts (a = 1) where its loss did not rise.

    eps: radius of the ball, in pixels of [0, 1].
    alpha: one more step size that the line search tries, in pixels of [0, 1].
    steps: number of steps, at least 1; each takes nine forward passes and one backward pass.
    start: "uniform" in the ball, or "none", x itself.

    Returns the last iterate, with a trace as PGD's. The MAIL paper (Fig. 1a) mentions a line-searched rate and
    Nesterov's momentum; its details are in an appendix that is not public, so this form is our own derivation.
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`.
    """

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    start: Literal["uniform", "none"] = "uniform"

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("LMPGD", eps=self.eps, alpha=self.alpha)
        check_counts("LMPGD", steps=self.steps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("LMPGD", x)
        with model_view(model) as view:
            x_adv = x.clone()
            if self.start == "uniform":
                x_adv = self._clip(x, x + torch.empty_like(x).uniform_(-self.eps, self.eps))
            point, x_before = _Point.at(view, x_adv, y), x_adv
            a = torch.ones_like(y, dtype=x.dtype)
            correct, p_true = [], []
            for _ in range(self.steps):
                correct.append(point.correct)
                p_true.append(point.p_true)
                a_next = (1 + (1 + 4 * a * a).sqrt()) / 2
                momentum = _per_image((a - 1) / a_next) * (point.x - x_before)
                x_before, loss_before = point.x, point.loss
                point = self._search(view, x, y, self._clip(x, point.x + momentum))
                a = a_next.where(point.loss > loss_before, torch.ones_like(a))
            trace = Trace(torch.stack(correct), torch.stack(p_true))
            return Adversarial(check_result("LMPGD", view, x, point.x, self.eps, "linf"), trace)

    def _search(self, view: ModelView, x: Tensor, y: Tensor, u: Tensor) -> _Point:
        """The candidate u + s sign(gradient) of the largest loss, for each example."""
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ce(view(u), y).sum(), u)
        u, direction = u.detach(), gradient.sign()
        step_sizes = [*(2 * self.eps / 2**j for j in range(HALVINGS)), self.alpha]
        candidates = (_Point.at(view, self._clip(x, u + s * direction), y) for s in step_sizes)
        return functools.reduce(_Point.best, candidates)

    def _clip(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return (x + (x_adv - x).clamp(-self.eps, self.eps)).clamp(0, 1)


class _Point(NamedTuple):
    """Images [B, C, H, W], and what the model returns for them, [B] each."""

    x: Tensor
    loss: Tensor
    correct: Tensor
    p_true: Tensor

    @classmethod
    @torch.no_grad()
    def at(cls, view: ModelView, x: Tensor, y: Tensor) -> _Point:
        logits = view(x)
        return cls(x, ce(logits, y), logits.argmax(1) == y, true_class(logits.softmax(1), y))

    def best(self, other: _Point) -> _Point:
        """Of each example the one with the larger loss; `self` where they are equal."""
        better = other.loss > self.loss
        return _Point(
            other.x.where(_per_image(better), self.x),
            other.loss.where(better, self.loss),
            other.correct.where(better, self.correct),
            other.p_true.where(better, self.p_true),
        )


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
