"""Projected gradient ascent that keeps a trace: what LPS and PM_dif read, and what no library returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustmail.attacks.view import Norm, View, check_budget, check_counts, check_images, settle, viewed
from robustmail.scores import ce, gap, kl, true_class
from robustmail.step import Adversarial, Trace
from robustmail.values import check

__all__ = ["PGD"]


@dataclass(frozen=True, kw_only=True)
class PGD:
    """x <- clip(x + alpha * sign(gradient)), `steps` times, clipped to the eps-ball and to [0, 1] (Madry et al. 2018).

    eps, alpha: in pixels of [0, 1]; norm "l2" steps along gradient / ||gradient|| instead of its sign.
    loss: "ce" (AT), "kl" from the natural prediction (TRADES; ignores labels), or "margin" = max_{j != y} z_j - z_y
    (the CW loss of robustness papers).
    start: "uniform" in the ball, "gaussian" x + 0.001 N(0, 1) (which "kl" needs, its gradient being zero at x), "none".
    The last iterate is returned, as in all training code, with a trace of iterates 0 ... steps - 1.
    """

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    norm: Norm = "linf"
    loss: Literal["ce", "kl", "margin"] = "ce"
    start: Literal["uniform", "gaussian", "none"] = "uniform"

    def __post_init__(self) -> None:
        check(self)
        check_budget("PGD", self.norm, eps=self.eps, alpha=self.alpha)
        check_counts("PGD", steps=self.steps)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("PGD", x)
        with viewed(model) as view:
            loss = self._loss(view, x, y)
            x_adv, correct, p_true = self._start(x), [], []
            for _ in range(self.steps):
                x_adv = x_adv.detach().requires_grad_()
                logits = view(x_adv)
                (gradient,) = torch.autograd.grad(loss(logits), x_adv)
                correct.append(logits.detach().argmax(1) == y)
                p_true.append(true_class(logits.detach().softmax(1), y))
                x_adv = self._project(x, x_adv.detach() + self.alpha * self._direction(gradient))
            trace = Trace(torch.stack(correct), torch.stack(p_true))
            return Adversarial(settle("PGD", view, x, x_adv, self.eps, self.norm), trace)

    def _loss(self, view: View, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        # Sums, not means: a mean over the batch underflows in half precision, and the step does not see the scale.
        if self.loss == "kl":
            with torch.no_grad():
                natural = view(x)
            return lambda logits: kl(natural, logits).sum()
        if self.loss == "margin":
            return lambda logits: -gap(logits, y).sum()
        return lambda logits: ce(logits, y).sum()

    def _start(self, x: Tensor) -> Tensor:
        if self.start == "none":
            return x.clone()
        if self.start == "gaussian":
            return self._project(x, x + 0.001 * torch.randn_like(x))
        if self.norm == "linf":
            return (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)
        noise = torch.randn_like(x)
        radius = torch.rand(len(x), device=x.device, dtype=x.dtype)
        return (x + noise * _per_image(self.eps * radius / _length(noise))).clamp(0, 1)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self.norm == "linf":
            return gradient.sign()
        return gradient / _per_image(_length(gradient).clamp(min=1e-20))

    def _project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        delta = x_adv - x
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * _per_image((self.eps / _length(delta).clamp(min=1e-20)).clamp(max=1))
        return (x + delta).clamp(0, 1)


def _length(images: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
