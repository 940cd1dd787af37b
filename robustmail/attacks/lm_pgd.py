"""LM-PGD: PGD with line search and momentum, which leaves corners of the ball in which plain PGD stays."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustmail.attacks.steps import sums
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.functional import ce, true_class
from robustmail.norms import check_budget, check_counts
from robustmail.step import Adversarial, Trace

__all__ = ["LMPGD"]

HALVINGS = 7  # step sizes tried: 2 eps, which crosses the whole ball, and its halves
ARMIJO = 1e-4  # the share of the rise that the gradient promises, from which a step is accepted


@dataclass(frozen=True, kw_only=True)
class LMPGD:
    """PGD with a line search for the step size of each example, and Nesterov's momentum; L-inf, cross-entropy.

    u = x_t + (a_t - 1) / a_{t+1} (x_t - x_{t-1}), with a_{t+1} = (1 + sqrt(1 + 4 a_t^2)) / 2; x_{t+1} is the
    u + s sign(gradient at u) of the largest loss over s in {2 eps / 2^j, j = 0 ... 6} and s = alpha (search="best"),
    or the first one, from the longest, that has loss > loss(u) + 1e-4 gradient(u) · (x_{t+1} - u), else u itself
    (search="first"; Armijo). Every iterate is clipped to the eps-ball and to [0, 1]. The momentum of an example
    restarts (a = 1) where its loss did not rise.

    eps: radius of the ball, in pixels of [0, 1].
    alpha: one more step size that the line search tries, in pixels of [0, 1].
    steps: number of steps, at least 1; each takes nine forward passes and one backward pass.
    start: "uniform" in the ball, or "none", x itself.
    search: "best" or "first", as above.

    Returns the last iterate, with a trace as PGD's. The MAIL paper (Fig. 1a) mentions a line-searched rate and
    Nesterov's momentum; its details are in an appendix that is not public, so both forms are our own derivation.
    Either breaks a few images that PGD does not, and is not clearly stronger (docs/measurements.md).
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`.
    """

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    start: Literal["uniform", "none"] = "uniform"
    search: Literal["best", "first"] = "best"

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
        """The next iterate of each example, from u."""
        u = u.detach().requires_grad_()
        logits = view(u)
        (gradient,) = torch.autograd.grad(ce(logits, y).sum(), u)
        here, direction = _Point.of(u.detach(), logits.detach(), y), gradient.sign()
        step_sizes = [*(2 * self.eps / 2**j for j in range(HALVINGS)), self.alpha]
        if self.search == "first":
            step_sizes.sort(reverse=True)
        candidates = (_Point.at(view, self._clip(x, here.x + s * direction), y) for s in step_sizes)
        if self.search == "best":
            return functools.reduce(lambda best, other: best.where(~(other.loss > best.loss), other), candidates)
        found, open_ = here, torch.ones_like(here.correct)
        for candidate in candidates:
            promised = sums(gradient * (candidate.x - here.x))
            accepted = open_ & (candidate.loss > here.loss + ARMIJO * promised)
            found, open_ = found.where(~accepted, candidate), open_ & ~accepted
        return found

    def _clip(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return (x + (x_adv - x).clamp(-self.eps, self.eps)).clamp(0, 1)


class _Point(NamedTuple):
    """Images [B, C, H, W], and what the model returns for them, [B] each."""

    x: Tensor
    loss: Tensor
    correct: Tensor
    p_true: Tensor

    @classmethod
    def of(cls, x: Tensor, logits: Tensor, y: Tensor) -> _Point:
        return cls(x, ce(logits, y), logits.argmax(1) == y, true_class(logits.softmax(1), y))

    @classmethod
    @torch.no_grad()
    def at(cls, view: ModelView, x: Tensor, y: Tensor) -> _Point:
        return cls.of(x, view(x), y)

    def where(self, kept: Tensor, other: _Point) -> _Point:
        """Of each example `self` where it is kept, else `other`."""
        masks = (_per_image(kept), kept, kept, kept)
        return _Point(*(mine.where(mask, its) for mine, mask, its in zip(self, masks, other, strict=True)))


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
