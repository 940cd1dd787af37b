"""Augmentations that choose among operations for each image: RandAugment, AutoAugment, IDBH."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustmail.augmentations.draws import (
    Pair,
    random_signs,
    up_to,
    window,
)
from robustmail.augmentations.geometry import CropShift, Flip
from robustmail.augmentations.image_operations import apply_chosen
from robustmail.augmentations.policy_tables import CIFAR10, RAND_AUGMENT, SVHN, policy_strength
from robustmail.errors import RecipeError
from robustmail.fields import check_range, check_types

__all__ = ["AutoAugment", "IDBH", "RandAugment"]


@dataclass(frozen=True)
class RandAugment:
    """n operations in turn, each drawn from 14 and of strength m (Cubuk et al. 2020; torchvision's operations).

    n: operations, at least 0. m: strength, a whole number from 0 to 30. (2, 14) in the code of Wang et al. 2023.
    Raises RecipeError for a field of the wrong type or range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, n=self.n, m=self.m)
        if isinstance(self.m, int) and self.m > 30:
            raise RecipeError(f"RandAugment (given m={self.m})", "m must be at most 30")

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        size = x.shape[2], x.shape[3]
        for _ in range(self.n):
            chosen = [RAND_AUGMENT[i] for i in torch.randint(len(RAND_AUGMENT), (len(x),), generator=rng).tolist()]
            signs = random_signs(len(x), rng).tolist()
            strength = [policy_strength(name, self.m / 30, s, size) for name, s in zip(chosen, signs, strict=True)]
            x = apply_chosen(x, chosen, torch.tensor(strength))
        return x, targets


@dataclass(frozen=True)
class AutoAugment:
    """One of 25 pairs of operations, each with its own probability and strength (Cubuk et al. 2019).

    policy: "cifar10" or "svhn", the data set on which the pairs were searched. Raises RecipeError for another one.
    """

    policy: Literal["cifar10", "svhn"]

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        size, policy = (x.shape[2], x.shape[3]), {"cifar10": CIFAR10, "svhn": SVHN}[self.policy]
        pairs = [policy[i] for i in torch.randint(len(policy), (len(x),), generator=rng).tolist()]
        for turn in range(2):
            draws = torch.rand(len(x), generator=rng, dtype=torch.float64).tolist()
            signs = random_signs(len(x), rng).tolist()
            chosen = [p[turn].name if u < p[turn].p else "identity" for p, u in zip(pairs, draws, strict=True)]
            levels = [p[turn].level for p in pairs]
            strength = [policy_strength(*each, size) for each in zip(chosen, levels, signs, strict=True)]
            x = apply_chosen(x, chosen, torch.tensor(strength))
        return x, targets


@dataclass(frozen=True)
class IDBH:
    """Flip, CropShift(0, 11), one of eight changes of colour or shape, random erasing (Li and Spratling 2023).

    From "Data augmentation alone can improve adversarial training"; the constants are those of the authors' code for
    CIFAR-10. version: "weak" erases a box in every second image, "strong" in every one. Raises RecipeError for another.
    """

    version: Literal["weak", "strong"]

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        x, _ = Flip()(x, targets, rng)
        x, _ = CropShift(0, 11)(x, targets, rng)
        return _erased(_recoloured(x, rng), 0.5 if self.version == "weak" else 1.0, rng), targets


RECOLOUR = (
    ("color", 0.1, 1.9), ("brightness", 0.5, 1.9), ("contrast", 0.5, 1.9), ("sharpness", 0.1, 1.9),
    ("autocontrast", 0.0, 0.0), ("equalize", 0.0, 0.0), ("centred_shear_x", 0.05, 0.15), ("rotate", 1.0, 11.0),
)  # fmt: skip


def _recoloured(x: Tensor, rng: torch.Generator) -> Tensor:
    """One of RECOLOUR for each image; a shear is along either axis, and goes either way, as a rotation does."""
    which = torch.randint(len(RECOLOUR), (len(x),), generator=rng).tolist()
    draws = torch.rand(len(x), generator=rng, dtype=torch.float64).tolist()
    signs, axes = random_signs(len(x), rng).tolist(), random_signs(len(x), rng).tolist()
    chosen, strength = [], []
    for i, u, sign, axis in zip(which, draws, signs, axes, strict=True):
        name, low, high = RECOLOUR[i]
        value = low + u * (high - low)
        if name == "rotate":
            value = sign * math.floor(value)  # whole degrees, 1 ... 10
        if name == "centred_shear_x":
            name, value = name if axis > 0 else "centred_shear_y", sign * math.tan(value)
        chosen.append(name)
        strength.append(value)
    return apply_chosen(x, chosen, torch.tensor(strength))


def _erased(x: Tensor, p: float, rng: torch.Generator) -> Tensor:
    """torchvision's RandomErasing with its defaults, for each image: a box of 2 to 33 % of the image becomes 0.

    p: probability. Of ten boxes with log-uniform aspect ratios from 0.3 to 3.3, the first that fits; else none.
    """
    n, _, height, width = x.shape
    area = height * width * (0.02 + 0.31 * torch.rand(n, 10, generator=rng))
    ratio = torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * torch.rand(n, 10, generator=rng))
    rows, columns = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (rows < height) & (columns < width)
    first = fits.long().argmax(1, keepdim=True)
    drawn = fits.gather(1, first) & (torch.rand(n, 1, generator=rng) < p)
    rows, columns = rows.gather(1, first) * drawn, columns.gather(1, first) * drawn
    top, left = up_to((height - rows).clamp(min=0), rng), up_to((width - columns).clamp(min=0), rng)
    return torch.where(window(x, top, top + rows, left, left + columns), 0.0, x)
