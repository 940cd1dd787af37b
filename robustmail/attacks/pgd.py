"""Projected gradient descent that keeps the trace which the margins `lps` and `pm_dif` read; no library returns one."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class PGD:
    """x <- clip(x + alpha * sign(gradient)), `steps` times, clipped to the eps-ball and to [0, 1] (Madry et al. 2018).

    eps: radius of the ball, in pixels of [0, 1].
    alpha: length of a step, in pixels of [0, 1].
    steps: number of gradient steps, at least 1.
    norm: "linf", or "l2", which steps along gradient / ||gradient|| instead of its sign.
    loss: "ce" (AT); "kl", the divergence from the natural prediction, which ignores the labels (TRADES); or "margin",
        max_{j != y} z_j - z_y (the CW loss of robustness papers).
    start: "uniform" in the ball (in l2, for images of d numbers: eps U(0, 1)^(1/d) in a random direction); "gaussian",
        x + 0.001 N(0, 1), which "kl" needs because its gradient is zero at x; "unit", x + U(0, 1), as MAIL's
        Algorithm 1 is printed; or "none", x itself.
    patience: None takes every step. A number tau >= 0 makes it FAT's friendly attack (Zhang et al. 2020): an example
        stops at its (tau + 1)-th misclassified iterate; with tau >= steps none ever stops.
    noise: omega of FAT's code: omega N(0, 1) is added at each step.

    Returns the last iterate, as all training code does, with a trace of iterates 0 ... steps - 1. In the trace, an
    example that has stopped keeps the values of its last iterate.
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`.
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
        check_counts("PGD", steps=self.steps)
        check_counts("PGD", minimum=0, patience=self.patience)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("PGD", x)
        with model_view(model) as view:
            target = self._target(view, x, y)
            run = self._run if self.patience is None else self._run_with_patience
            x_adv, trace = run(view, x, y, target, self._start(x))
            return Adversarial(check_result("PGD", view, x, x_adv, self.eps, self.norm), trace)

    def _run(self, view: ModelView, x: Tensor, y: Tensor, target: Tensor, x_adv: Tensor) -> tuple[Tensor, Trace]:
        correct, p_true = [], []
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = view(x_adv)
            (gradient,) = torch.autograd.grad(self._loss(logits, target), x_adv)
            correct.append(_is_correct(logits, y))
            p_true.append(_p_true(logits, y, x.dtype))
            x_adv = self._move(x, x_adv.detach(), gradient)
        return x_adv, Trace(torch.stack(correct), torch.stack(p_true))

    def _run_with_patience(
        self, view: ModelView, x: Tensor, y: Tensor, target: Tensor, x_adv: Tensor
    ) -> tuple[Tensor, Trace]:
        assert self.patience is not None
        correct = torch.zeros(self.steps, len(y), dtype=torch.bool, device=x.device)
        p_true = torch.zeros(self.steps, len(y), dtype=x.dtype, device=x.device)
        active = torch.arange(len(y), device=x.device)  # indices of the examples that have not stopped
        patience = torch.full_like(y, self.patience)
        for k in range(self.steps):
            if k:
                correct[k], p_true[k] = correct[k - 1], p_true[k - 1]  # stays so for examples that have stopped
            iterate = x_adv[active].detach().requires_grad_()
            logits = view(iterate)
            (gradient,) = torch.autograd.grad(self._loss(logits, target[active]), iterate)
            correct[k, active] = _is_correct(logits, y[active])
            p_true[k, active] = _p_true(logits, y[active], x.dtype)
            moved = self._move(x[active], iterate.detach(), gradient)
            goes_on = correct[k, active] | (patience[active] > 0)
            patience[active] -= (~correct[k, active]).long()
            active = active[goes_on]
            if not len(active):
                correct[k + 1 :], p_true[k + 1 :] = correct[k], p_true[k]
                break
            x_adv[active] = moved[goes_on]
        return x_adv, Trace(correct, p_true)

    def _target(self, view: ModelView, x: Tensor, y: Tensor) -> Tensor:
        """What `_loss` compares logits with: the natural logits [B, classes] for "kl", else the labels [B]."""
        if self.loss != "kl":
            return y
        with torch.no_grad():
            logits_nat: Tensor = view(x)
        return logits_nat

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        # A sum, not a mean: a mean over the batch underflows in half precision, and the step does not see the scale.
        if self.loss == "kl":
            return kl(target, logits).sum()
        if self.loss == "margin":
            return -gap(logits, target).sum()
        return ce(logits, target).sum()

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


def _is_correct(logits: Tensor, y: Tensor) -> Tensor:
    return logits.detach().argmax(1) == y


def _p_true(logits: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return true_class(logits.detach().softmax(1), y).to(dtype)


def _length(images: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return lengths


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
