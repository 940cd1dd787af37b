"""Projected gradient descent that keeps the trace which the margins `lps` and `pm_dif` read; no library returns one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustmail.attacks.steps import Lowest, gradient_and_logits, likeliest_wrong, project, steepest, uniform_start
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.errors import RecipeError
from robustmail.fields import check_types, describe
from robustmail.functional import ce, gap, kl, pm_ascent, true_class
from robustmail.norms import Norm, check_budget, check_counts
from robustmail.plugin_calls import call_plugin, expect_batch
from robustmail.step import Adversarial, Trace

__all__ = ["PGD"]


@dataclass(frozen=True, kw_only=True)
class PGD:
    """x <- clip(x + alpha * sign(gradient)), `steps` times, clipped to the eps-ball and to [0, 1] (Madry et al. 2018).

    eps: radius of the ball, in pixels of [0, 1].
    alpha: length of a step, in pixels of [0, 1].
    steps: number of gradient steps, at least 1.
    norm: "linf", or "l2", which steps along gradient / ||gradient|| instead of its sign.
    loss: what is ascended. "ce" (AT); "kl", the divergence from the natural prediction, which ignores the labels
        (TRADES); "margin", max_{j != y} z_j - z_y (the CW loss of robustness papers); "pm", max_{j != y} p_j - p_y,
        minus the probabilistic margin (PMA); or a function of yours, (logits [B, classes], y [B]) -> [B].
    start: "uniform" in the ball (in l2, for images of d numbers: eps U(0, 1)^(1/d) in a random direction); "gaussian",
        x + 0.001 N(0, 1), which "kl" needs because its gradient is zero at x; "unit", x + U(0, 1), as MAIL's
        Algorithm 1 is printed; or "none", x itself.
    patience: None takes every step. A number tau >= 0 makes it FAT's friendly attack (Zhang et al. 2020): an example
        stops at its (tau + 1)-th misclassified iterate; with tau >= steps none ever stops.
    noise: omega of FAT's code: omega N(0, 1) is added at each step.
    decay: "none", or "cosine": step k = 0 ... steps - 1 has the length alpha (1 + cos(pi k / steps)) / 2.
    targets: 0 attacks without a target. K runs once towards each of the K likeliest wrong classes t of the clean image:
        it ascends -CE(z, t), z_t - z_y or p_t - p_y. Of each image the last iterate of the run with the smallest
        z_y - max_{j != y} z_j is returned, without a trace (MultiTargeted, Gowal et al. 2019).
    eot: passes over which each gradient is averaged, for a model that answers at random.

    Returns the last iterate, as all training code does, with a trace of iterates 0 ... steps - 1. In the trace, an
    example that has stopped keeps the values of its last iterate.
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`;
    PluginError for a loss that fails or does not return [B].
    """

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    norm: Norm = "linf"
    loss: Literal["ce", "kl", "margin", "pm"] | Callable[[Tensor, Tensor], Tensor] = "ce"
    start: Literal["uniform", "gaussian", "unit", "none"] = "uniform"
    patience: int | None = None
    noise: float = 0.0
    decay: Literal["none", "cosine"] = "none"
    targets: int = 0
    eot: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("PGD", self.norm, eps=self.eps, alpha=self.alpha, noise=self.noise)
        check_counts("PGD", steps=self.steps, eot=self.eot)
        check_counts("PGD", minimum=0, patience=self.patience, targets=self.targets)
        if self.targets and self.loss not in ("ce", "margin", "pm"):
            raise RecipeError(
                f"PGD (given targets={self.targets}, loss={describe(self.loss)})", "this loss has no target",
                'Take loss="ce", "margin" or "pm".',
            )  # fmt: skip

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("PGD", x)
        with model_view(model) as view:
            x_adv, trace = self._attack(view, x, y) if not self.targets else (self._attack_targets(view, x, y), None)
            return Adversarial(check_result("PGD", view, x, x_adv, self.eps, self.norm), trace)

    def _attack(self, view: ModelView, x: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Trace]:
        run = self._run if self.patience is None else self._run_with_patience
        return run(view, x, y, self._reference(view, x, y), target, self._start(x))

    def _attack_targets(self, view: ModelView, x: Tensor, y: Tensor) -> Tensor:
        """The last iterate of the run that brought the margin of an image lowest."""
        with torch.no_grad():
            targets = likeliest_wrong(view(x), y, self.targets)
        lowest, all_images = Lowest(x), torch.arange(len(y), device=x.device)
        for target in targets.T:
            x_adv, _ = self._attack(view, x, y, target)
            with torch.no_grad():
                lowest.offer(all_images, x_adv, view(x_adv), y)
        return lowest.x

    def _run(
        self, view: ModelView, x: Tensor, y: Tensor, reference: Tensor, target: Tensor | None, x_adv: Tensor
    ) -> tuple[Tensor, Trace]:
        correct, p_true = [], []
        for k in range(self.steps):
            x_adv = x_adv.detach()
            gradient, logits = gradient_and_logits(view, x_adv, self._loss(reference, target), self.eot)
            correct.append(_is_correct(logits, y))
            p_true.append(_p_true(logits, y, x.dtype))
            x_adv = self._move(x, x_adv, gradient, k)
        return x_adv, Trace(torch.stack(correct), torch.stack(p_true))

    def _run_with_patience(
        self, view: ModelView, x: Tensor, y: Tensor, reference: Tensor, target: Tensor | None, x_adv: Tensor
    ) -> tuple[Tensor, Trace]:
        assert self.patience is not None
        correct = torch.zeros(self.steps, len(y), dtype=torch.bool, device=x.device)
        p_true = torch.zeros(self.steps, len(y), dtype=x.dtype, device=x.device)
        active = torch.arange(len(y), device=x.device)  # indices of the examples that have not stopped
        patience = torch.full_like(y, self.patience)
        for k in range(self.steps):
            if k:
                correct[k], p_true[k] = correct[k - 1], p_true[k - 1]  # stays so for examples that have stopped
            iterate = x_adv[active].detach()
            loss = self._loss(reference[active], target if target is None else target[active])
            gradient, logits = gradient_and_logits(view, iterate, loss, self.eot)
            correct[k, active] = _is_correct(logits, y[active])
            p_true[k, active] = _p_true(logits, y[active], x.dtype)
            moved = self._move(x[active], iterate, gradient, k)
            goes_on = correct[k, active] | (patience[active] > 0)
            patience[active] -= (~correct[k, active]).long()
            active = active[goes_on]
            if not len(active):
                correct[k + 1 :], p_true[k + 1 :] = correct[k], p_true[k]
                break
            x_adv[active] = moved[goes_on]
        return x_adv, Trace(correct, p_true)

    def _reference(self, view: ModelView, x: Tensor, y: Tensor) -> Tensor:
        """What the loss compares logits with: the natural logits [B, classes] for "kl", else the labels [B]."""
        if self.loss != "kl":
            return y
        with torch.no_grad():
            logits_nat: Tensor = view(x)
        return logits_nat

    def _loss(self, reference: Tensor, target: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The loss of logits [B, classes] as a function of them; target: the classes t, [B], if there are any."""
        own = self.loss
        if not isinstance(own, str):
            return lambda logits: _own_loss(own, logits, reference)
        if own == "kl":
            return lambda logits: kl(reference, logits)
        if own == "pm":
            return lambda logits: pm_ascent(logits, reference, target)
        if own == "margin":
            if target is None:
                return lambda logits: -gap(logits, reference)
            return lambda logits: true_class(logits, target) - true_class(logits, reference)
        return lambda logits: ce(logits, reference) if target is None else -ce(logits, target)

    def _move(self, x: Tensor, iterate: Tensor, gradient: Tensor, k: int) -> Tensor:
        alpha = self.alpha if self.decay == "none" else self.alpha * (1 + math.cos(math.pi * k / self.steps)) / 2
        step = alpha * steepest(gradient, self.norm)
        if self.noise:
            step = step + self.noise * torch.randn_like(step)
        return project(x, iterate + step, self.eps, self.norm)

    def _start(self, x: Tensor) -> Tensor:
        if self.start == "none":
            return x.clone()
        if self.start == "gaussian":
            return project(x, x + 0.001 * torch.randn_like(x), self.eps, self.norm)
        if self.start == "unit":
            return project(x, x + torch.rand_like(x), self.eps, self.norm)
        return uniform_start(x, self.eps, self.norm)


def _own_loss(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    values = call_plugin("loss", loss, logits, y)
    expect_batch("loss", loss, values, len(y))
    return values


def _is_correct(logits: Tensor, y: Tensor) -> Tensor:
    return logits.argmax(1) == y


def _p_true(logits: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    return true_class(logits.softmax(1), y).to(dtype)
