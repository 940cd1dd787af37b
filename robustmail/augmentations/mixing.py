"""Augmentations that cut out or mix: Cutout, CutMix, Mixup."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustmail.augmentations.draws import (
    Pair,
    beta,
    boxes,
    centres,
    check_positive,
    check_probability,
)
from robustmail.fields import check_range, check_types
from robustmail.runtime.deferred import to_device

__all__ = ["CutMix", "Cutout", "Mixup"]


@dataclass(frozen=True)
class Cutout:
    """A square of the image becomes 0 (black); its centre is any pixel, so that it may be cut by the border.

    DeVries and Taylor 2017. size: side of the square in pixels, at least 1; for CIFAR-10 16 in the paper, 18 in the
    code of Wang et al. 2023. Raises RecipeError for less.
    """

    size: int

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, low=1, size=self.size)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        side = torch.full((len(x), 1), self.size)
        return torch.where(boxes(x, side, side, *centres(x, rng))[0], 0.0, x), targets


@dataclass(frozen=True)
class CutMix:
    """A box of another image of the batch is pasted; the label is mixed by the share of pixels (Yun et al. 2019).

    x = (1 - M) x + M x', t = (1 - s) t + s t', where s = mean(M) is the exact share of the box M, which has the sides
    sqrt(1 - lam) H and sqrt(1 - lam) W, lam ~ Beta(alpha, alpha), around any pixel, cut by the border.

    alpha: more than 0; 1 is the uniform distribution. p: probability that an image is mixed, in [0, 1].
    Raises RecipeError for a field of the wrong type or range.
    """

    alpha: float = 1.0
    p: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "alpha", self.alpha)
        check_probability(self, self.p)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        n, _, height, width = x.shape
        other = to_device(x.device, torch.randperm(n, generator=rng))
        side = (1 - beta(self.alpha, n, rng)).sqrt() * (torch.rand(n, 1, generator=rng) < self.p)
        sides = (side * height).round().long(), (side * width).round().long()
        box, pixels = boxes(x, *sides, *centres(x, rng))
        pasted = to_device(x.device, pixels.to(targets.dtype))
        share, kept = pasted / (height * width), (height * width - pasted) / (height * width)
        return torch.where(box, x[other], x), kept * targets + share * targets[other]


@dataclass(frozen=True)
class Mixup:
    """A convex combination with another image of the batch, and of their labels (Zhang et al. 2018).

    x = lam x + (1 - lam) x', t = lam t + (1 - lam) t', lam ~ Beta(alpha, alpha), drawn for each image.

    alpha: more than 0; 1 is the uniform distribution. Raises RecipeError for another value.
    """

    alpha: float

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "alpha", self.alpha)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        other = to_device(x.device, torch.randperm(len(x), generator=rng))
        lam = to_device(x.device, beta(self.alpha, len(x), rng).to(targets.dtype))
        mixed = lam[:, :, None, None] * x + (1 - lam[:, :, None, None]) * x[other]
        return mixed.clamp(0, 1), lam * targets + (1 - lam) * targets[other]
