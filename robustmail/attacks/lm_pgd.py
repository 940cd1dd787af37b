"""LM-PGD: PGD with line search and momentum, which gets out of corners in which plain PGD sits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.functional import ce, true_class
from robustmail.norms import check_budget, check_counts
from robustmail.step import Adversarial, Trace

__all__ = ["LMPGD"]

HALVINGS = 7  # of the largest step, 2 eps, which crosses the whole ball


@dataclass(frozen=True, kw_only=True)
class LMPGD:
    """PGD whose step length is searched for each example, with Nesterov's momentum; L-inf, on the cross-entropy.

    At each step, from the look-ahead u = x_t + (a_t - 1) / a_{t+1} (x_t - x_{t-1}), the best u + alpha sign(gradient)
    over alpha in {2 eps / 2^j, j = 0 ... 6} and `alpha` is taken; a_{t+1} = (1 + sqrt(1 + 4 a_t^2)) / 2, and momentum
    starts anew for an example whose loss did not rise. Every iterate is clipped to the ball and to [0, 1].

    This is derived, not transcribed: the MAIL paper (Fig. 1a) names a line-searched rate and Nesterov's momentum, and
    keeps the details in an appendix that is not public. Eight forward passes and one backward a step, besides the
    gradient's own forward. start: as in PGD. Keeps a trace like PGD.
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
            now = x.clone()
            if self.start == "uniform":
                now = self._clip(x, x + torch.empty_like(x).uniform_(-self.eps, self.eps))
            before, a = now, torch.ones_like(y, dtype=x.dtype)
            loss, right, p = _look(view, now, y)
            correct, p_true = [], []
            for _ in range(self.steps):
                correct.append(right)
                p_true.append(p)
                grown = (1 + (1 + 4 * a * a).sqrt()) / 2
                ahead = self._clip(x, now + _per_image((a - 1) / grown) * (now - before))
                before, risen = now, loss
                now, loss, right, p = self._search(view, x, y, ahead)
                a = grown.where(loss > risen, torch.ones_like(a))
            trace = Trace(torch.stack(correct), torch.stack(p_true))
            return Adversarial(check_result("LMPGD", view, x, now, self.eps, "linf"), trace)

    def _search(self, view: ModelView, x: Tensor, y: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The candidate of the largest loss for each example, with what the model says of it."""
        ahead = ahead.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(ce(view(ahead), y).sum(), ahead)
        ahead, direction = ahead.detach(), gradient.sign()
        best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        for alpha in (*(2 * self.eps / 2**j for j in range(HALVINGS)), self.alpha):
            tried = self._clip(x, ahead + alpha * direction)
            found = (tried, *_look(view, tried, y))
            if best is None:
                best = found
                continue
            better = found[1] > best[1]
            best = (
                tried.where(_per_image(better), best[0]), found[1].where(better, best[1]),
                found[2].where(better, best[2]), found[3].where(better, best[3]),
            )  # fmt: skip
        assert best is not None
        return best

    def _clip(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return (x + (x_adv - x).clamp(-self.eps, self.eps)).clamp(0, 1)


@torch.no_grad()
def _look(view: ModelView, images: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, correct, p_y) of images, [B] each."""
    logits = view(images)
    return ce(logits, y), logits.argmax(1) == y, true_class(logits.softmax(1), y)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
