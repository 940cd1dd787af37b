"""Projected gradient ascent that keeps a trace: what LPS and PM_dif read, and what no library returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.functional import ce, gap, kl, true_class
from robustmail.norms import Norm, check_budget, check_counts
from robustmail.step import Adversarial, Trace

__all__ = ["PGD"]

Going = slice | Tensor


@dataclass(frozen=True, kw_only=True)
class PGD:
    """x <- clip(x + alpha * sign(gradient)), `steps` times, clipped to the eps-ball and to [0, 1] (Madry et al. 2018).

    eps, alpha: in pixels of [0, 1]; norm "l2" steps along gradient / ||gradient|| instead of its sign.
    loss: "ce" (AT), "kl" from the natural prediction (TRADES; ignores labels), or "margin" = max_{j != y} z_j - z_y
    (the CW loss of robustness papers).
    start: "uniform" in the ball (in l2, of images of d numbers, eps U(0, 1)^(1/d) away in a random direction);
    "gaussian", x + 0.001 N(0, 1), which "kl" needs, its gradient being zero at x; "unit", x + U(0, 1), which is MAIL's
    Algorithm 1 to the letter; "none".
    patience: None takes every step. A number tau makes it FAT's friendly attack (Zhang et al. 2020): an example stops
    at the iterate at which it is wrong for the tau-plus-first time; tau >= steps never stops one.
    noise: omega of FAT's code: omega N(0, 1) is added at each step.
    The last iterate is returned, as in all training code, with a trace of iterates 0 ... steps - 1, in which an
    example that has stopped stays where it is.
    """

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    norm: Norm = "linf"
    loss: Literal["ce", "kl", "margin"] = "ce"
    start: Literal["uniform", "gaussian", "unit", "none"] = "uniform"
    patience: int | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("PGD", self.norm, eps=self.eps, alpha=self.alpha, noise=self.noise)
        check_counts("PGD", steps=self.steps, patience=1 if self.patience == 0 else self.patience)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("PGD", x)
        with model_view(model) as view:
            loss, x_adv = self._loss(view, x, y), self._start(x)
            correct = torch.zeros(self.steps, len(y), dtype=torch.bool, device=x.device)
            p_true = torch.zeros(self.steps, len(y), dtype=x.dtype, device=x.device)
            going: Going = slice(None)  # all of them, or the indices of those that have not stopped
            left = torch.full_like(y, self.steps if self.patience is None else self.patience)
            for k in range(self.steps):
                if k:
                    correct[k], p_true[k] = correct[k - 1], p_true[k - 1]  # those that have stopped
                iterate = x_adv[going].detach().requires_grad_()
                logits = view(iterate)
                (gradient,) = torch.autograd.grad(loss(logits, going), iterate)
                correct[k, going] = logits.detach().argmax(1) == y[going]
                p_true[k, going] = true_class(logits.detach().softmax(1), y[going]).to(x.dtype)
                moved = self._move(x[going], iterate.detach(), gradient)
                if self.patience is None:
                    x_adv = moved
                    continue
                going, keep = _patient(going, correct[k], left)
                if not len(going):
                    correct[k + 1 :], p_true[k + 1 :] = correct[k], p_true[k]
                    break
                x_adv[going] = moved[keep]
            return Adversarial(check_result("PGD", view, x, x_adv, self.eps, self.norm), Trace(correct, p_true))

    def _loss(self, view: ModelView, x: Tensor, y: Tensor) -> Callable[[Tensor, Going], Tensor]:
        # Sums, not means: a mean over the batch underflows in half precision, and the step does not see the scale.
        if self.loss == "kl":
            with torch.no_grad():
                natural = view(x)
            return lambda logits, going: kl(natural[going], logits).sum()
        if self.loss == "margin":
            return lambda logits, going: -gap(logits, y[going]).sum()
        return lambda logits, going: ce(logits, y[going]).sum()

    def _move(self, x: Tensor, iterate: Tensor, gradient: Tensor) -> Tensor:
        step = self.alpha * self._direction(gradient)
        if self.noise:
            step = step + self.noise * torch.randn_like(step)
        return self._project(x, iterate + step)

    def _start(self, x: Tensor) -> Tensor:
        if self.start == "none":
            return x.clone()
        if self.start == "gaussian":
            return self._project(x, x + 0.001 * torch.randn_like(x))
        if self.start == "unit":
            return self._project(x, x + torch.rand_like(x))
        if self.norm == "linf":
            return (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)
        noise = torch.randn_like(x)
        share = torch.rand_like(x).flatten(1)[:, 0]  # drawn as an image, so that it can be the image's own
        radius = self.eps * share ** (1 / x[0].numel())  # most of a ball's volume lies near its surface
        return (x + noise * _per_image(radius / _length(noise))).clamp(0, 1)

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


def _patient(going: Going, correct: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """(indices that go on, which of `going` they are); an example that is wrong uses up one unit of its patience."""
    indices = torch.arange(len(correct), device=correct.device)[going]
    wrong = ~correct[indices]
    keep = ~(wrong & (left[indices] == 0))
    left[indices] -= wrong.long()
    return indices[keep], keep


def _length(images: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
