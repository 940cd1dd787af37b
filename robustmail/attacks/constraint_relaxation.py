"""The constraint relaxation attack, for quick looks and for the choice of an epoch; never in place of AutoAttack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from robustmail.attacks.pgd import PGD
from robustmail.attacks.steps import Lowest, gradient_and_logits, likeliest_wrong, project, uniform_start
from robustmail.attacks.view import ModelView, check_images, check_result, model_view
from robustmail.fields import check_types
from robustmail.functional import true_class
from robustmail.norms import check_budget, check_counts
from robustmail.step import Adversarial

__all__ = ["CR"]

CYCLE = 30  # steps
NEAR = 0.05  # difference of logits: a target that never came so near is not tried again
SMALLEST = 0.05  # of the relaxation s


@dataclass(frozen=True, kw_only=True)
class CR:
    """Ascends z_t - z_y towards the likeliest wrong classes t, in a ball that is now larger, now smaller than its own;
    L-inf (constraint relaxation, AAAI 2025).

    PGD-10 on the cross-entropy with steps of eps / 2 breaks what is easy and finds the likeliest classes. Towards each
    of them: a uniform start, then cycles of 30 steps of length s eps, with s = 1/2, 1/4, ..., at least 0.05. Of a
    cycle, 10 steps are in the ball of radius (1 + s) eps, and each iterate is judged after clipping to the ball; 10 are
    in the ball; then the image is clipped to the radius (1 - s) eps, moved by uniform noise of size s eps, and takes 10
    steps in the ball. An image with z_y - z_t > s after the second phase is given up for this class. Further restarts
    try the classes that came within 0.05.

    eps: radius of the ball, in pixels of [0, 1].
    steps: number of steps towards a class, at least 30; whole cycles are run.
    targets: number of classes, at least 1.
    restarts: number of rounds over the classes, at least 1.

    Returns of each image the iterate with the lowest z_y - max_{j != y} z_j; an image stops when it is misclassified.
    It depends on the scale of the logits, and has no part that works without gradients.
    Raises RecipeError for an invalid field; AttackError and NonFiniteError as `check_images` and `check_result`.
    """

    eps: float = 8 / 255
    steps: int = 150
    targets: int = 3
    restarts: int = 5

    def __post_init__(self) -> None:
        check_types(self)
        check_budget("CR", eps=self.eps)
        check_counts("CR", minimum=CYCLE, steps=self.steps)
        check_counts("CR", targets=self.targets, restarts=self.restarts)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Adversarial:
        check_images("CR", x)
        with model_view(model) as view:
            lowest = Lowest(x)
            targets = self._easy(view, x, y, lowest)
            worth_trying = torch.ones_like(targets, dtype=torch.bool)
            for _ in range(self.restarts):
                near = [
                    _Round(view, x, y, targets[:, t], lowest).run(self.eps, self.steps, worth_trying[:, t])
                    for t in range(targets.shape[1])
                ]
                worth_trying = torch.stack(near, 1)
            return Adversarial(check_result("CR", view, x, lowest.x, self.eps, "linf"))

    def _easy(self, view: ModelView, x: Tensor, y: Tensor, lowest: Lowest) -> Tensor:
        """Break what PGD-10 breaks; return the likeliest wrong classes of its iterates, [B, targets]."""
        x_adv = PGD(eps=self.eps, alpha=self.eps / 2, steps=10, patience=0)(view, x, y).x
        with torch.no_grad():
            logits = view(x_adv)
        lowest.offer(torch.arange(len(y), device=x.device), x_adv, logits, y)
        return likeliest_wrong(logits, y, self.targets)


class _Round:
    """The ascent of a batch towards one class for each image.

    near: [B] bool, whether z_y - z_t came below NEAR. margin: [B], z_y - z_t at the last step. active: positions of the
    images that are still attacked.
    """

    def __init__(self, view: ModelView, x: Tensor, y: Tensor, target: Tensor, lowest: Lowest) -> None:
        self.view, self.x, self.y, self.target, self.lowest = view, x, y, target, lowest
        self.near = torch.zeros_like(y, dtype=torch.bool)
        self.margin = torch.zeros_like(lowest.margin)

    def run(self, eps: float, steps: int, worth_trying: Tensor) -> Tensor:
        """Attack the images that are worth it; return which came near."""
        self.eps, self.x_adv = eps, uniform_start(self.x, eps, "linf")
        self.active = self.lowest.standing(worth_trying.nonzero().flatten())
        s = 1.0
        for _ in range(steps // CYCLE):
            s = max(s / 2, SMALLEST)
            noise = torch.empty_like(self.x).uniform_(-s * eps, s * eps)  # of all images, whichever are active
            self._climb((1 + s) * eps, s * eps)
            self.x_adv = project(self.x, self.x_adv, eps, "linf")
            self._climb(eps, s * eps)
            self.active = self.active[self.margin[self.active] <= s]
            self.x_adv = (project(self.x, self.x_adv, (1 - s) * eps, "linf") + noise).clamp(0, 1)
            self._climb(eps, s * eps)
        return self.near

    def _climb(self, radius: float, step: float) -> None:
        """A third of a cycle of steps in the ball of this radius."""
        for _ in range(CYCLE // 3):
            if not len(self.active):
                return
            at = self.active
            x, y, target, iterate = self.x[at], self.y[at], self.target[at], self.x_adv[at]
            gradient, logits = gradient_and_logits(self.view, iterate, partial(_ascent, target=target, y=y))
            self.margin[at] = -_ascent(logits, target, y).to(self.margin)
            self.x_adv[at] = moved = project(x, iterate + step * gradient.sign(), radius, "linf")
            if radius > self.eps:
                iterate = project(x, moved, self.eps, "linf")
                with torch.no_grad():
                    logits = self.view(iterate)
            margin = self.lowest.offer(at, iterate, logits, y)
            self.near[at] |= margin < NEAR
            self.active = self.lowest.standing(at)


def _ascent(logits: Tensor, target: Tensor, y: Tensor) -> Tensor:
    return true_class(logits, target) - true_class(logits, y)
