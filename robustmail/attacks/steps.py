"""What attacks that follow a gradient share: the gradient, a step along it, and the ball around the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustmail.attacks.view import ModelView
from robustmail.functional import ce, gap, precise
from robustmail.norms import Norm

__all__ = [
    "Lowest",
    "ScaledCE",
    "gradient_and_logits",
    "lengths",
    "likeliest_wrong",
    "per_image",
    "project",
    "steepest",
    "sums",
    "uniform_start",
]


def gradient_and_logits(
    view: ModelView, x: Tensor, loss: Callable[[Tensor], Tensor], draws: int = 1
) -> tuple[Tensor, Tensor]:
    """(gradient of the loss at x, [B, C, H, W]; logits there, [B, classes]).

    loss: logits [B, classes] -> [B].
    draws: passes over which both are averaged, for a model that answers at random (expectation over transformation,
        Athalye et al. 2018).
    """
    gradients, logits = [], []
    for _ in range(draws):
        leaf = x.detach().requires_grad_()
        z = view(leaf)
        # A sum, not a mean: a mean over the batch underflows in half precision, and no step sees the scale.
        gradients.append(torch.autograd.grad(loss(z).sum(), leaf)[0])
        logits.append(z.detach())
    if draws == 1:
        return gradients[0], logits[0]
    return torch.stack(gradients).mean(0), torch.stack(logits).mean(0)


def likeliest_wrong(logits: Tensor, y: Tensor, k: int) -> Tensor:
    """The k classes other than y with the largest logits, largest first, [B, min(k, classes - 1)]."""
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.topk(min(k, logits.shape[1] - 1), dim=1).indices


def uniform_start(x: Tensor, eps: float, norm: Norm) -> Tensor:
    """A random image in the ball around each image, clipped to [0, 1]; in l2, for images of d numbers, in a random
    direction at the distance eps U(0, 1)^(1/d)."""
    if norm == "linf":
        return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    noise = torch.randn_like(x)
    share = torch.rand_like(x).flatten(1)[:, 0]  # drawn as an image, so that it can be the image's own
    radius = eps * share ** (1 / x[0].numel())  # most of a ball's volume lies near its surface
    return (x + noise * per_image(radius / lengths(noise))).clamp(0, 1)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of a step of length 1: sign(g) in linf, g / ||g|| in l2."""
    if norm == "linf":
        return gradient.sign()
    return gradient / per_image(lengths(gradient).clamp(min=1e-20))


def project(x: Tensor, x_adv: Tensor, eps: float, norm: Norm) -> Tensor:
    """x_adv, clipped to the ball of radius eps around x and to [0, 1]."""
    delta = x_adv - x
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        delta = delta * per_image((eps / lengths(delta).clamp(min=1e-20)).clamp(max=1))
    return (x + delta).clamp(0, 1)


def lengths(images: Tensor) -> Tensor:
    """Euclidean length of each image, [B]."""
    found: Tensor = torch.linalg.vector_norm(_rows(images), dim=1)
    return found[: len(images)]


def sums(images: Tensor) -> Tensor:
    """Sum over each image, or row, [B]."""
    return _rows(images).sum(1)[: len(images)]


def _rows(images: Tensor) -> Tensor:
    """[B, ...] -> [B, D], a single one twice: torch splits one long row among threads, and then it rounds otherwise."""
    rows = images.flatten(1)
    return rows.expand(2, -1) if len(rows) == 1 else rows


def per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return values.view(-1, 1, 1, 1)


@dataclass(frozen=True)
class ScaledCE:
    """CE(scale z, y), a loss for PGD: the logit scaling attack of Hitaj et al. 2021.

    A factor changes no prediction, so a sound model does not depend on it. scale: above 0.
    (logits [B, classes], labels [B]) -> [B].
    """

    scale: float

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return ce(self.scale * precise(logits), y)


class Lowest:
    """Of each of B images the iterate with the lowest margin z_y - max_{j != y} z_j so far; at first the image itself.

    x: [B, C, H, W]. margin: [B], at first infinite; negative where the iterate is misclassified.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x.clone()
        self.margin = torch.full_like(x[:, 0, 0, 0], float("inf"))

    def offer(self, which: Tensor, x_adv: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """Take the iterates of the images at positions `which` [K] that are lower; return the margins of all K."""
        margin = gap(logits, y).to(self.margin)
        better = margin < self.margin[which]
        self.x[which[better]], self.margin[which[better]] = x_adv[better], margin[better]
        return margin

    def standing(self, which: Tensor) -> Tensor:
        """Those of the positions `which` at which no iterate was misclassified."""
        return which[self.margin[which] >= 0]
