"""What is done to training images and their targets: (x, targets, rng) -> (x, targets), drawn for each image by itself.

x: [B, C, H, W] in [0, 1], on any device. targets: [B, classes] float32, probabilities. rng: a generator on the host,
from which everything is drawn, so that the draws are the same on every device. Neither x nor targets is written into,
and an augmentation that mixes no labels returns the very targets that it was given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robustmail.autoaugment_policies import CIFAR10, RAND_AUGMENT, SVHN, policy_strength
from robustmail.errors import RecipeError
from robustmail.fields import check_range, check_types, describe, describe_head
from robustmail.image_operations import apply_chosen, take_pixels
from robustmail.runtime.deferred import to_device

__all__ = ["AutoAugment", "Crop", "CropShift", "CutMix", "Cutout", "Flip", "IDBH", "Mixup", "RandAugment"]

Pair = tuple[Tensor, Tensor]
"""(x, targets)"""


@dataclass(frozen=True)
class Crop:
    """A random crop of the image padded with zeros: moved by -pad ... pad pixels in each direction.

    pad: pixels, at least 0; 4 for images of 32x32. Raises RecipeError for less.
    """

    pad: int

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, pad=self.pad)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        top, left = (torch.randint(2 * self.pad + 1, (len(x), 1), generator=rng) for _ in range(2))
        return _moved(x, top - self.pad, left - self.pad), targets


@dataclass(frozen=True)
class Flip:
    """The mirror image, left for right, with probability 1/2."""

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        mirrored = to_device(x.device, torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5)
        return x.flip(3).where(mirrored, x), targets


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
        return torch.where(_boxes(x, side, side, *_centres(x, rng))[0], 0.0, x), targets


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
        _check_positive(self, "alpha", self.alpha)
        _check_probability(self, self.p)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        n, _, height, width = x.shape
        other = to_device(x.device, torch.randperm(n, generator=rng))
        side = (1 - _beta(self.alpha, n, rng)).sqrt() * (torch.rand(n, 1, generator=rng) < self.p)
        sides = (side * height).round().long(), (side * width).round().long()
        box, pixels = _boxes(x, *sides, *_centres(x, rng))
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
        _check_positive(self, "alpha", self.alpha)

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        other = to_device(x.device, torch.randperm(len(x), generator=rng))
        lam = to_device(x.device, _beta(self.alpha, len(x), rng).to(targets.dtype))
        mixed = lam[:, :, None, None] * x + (1 - lam[:, :, None, None]) * x[other]
        return mixed.clamp(0, 1), lam * targets + (1 - lam) * targets[other]


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
            signs = _signs(len(x), rng).tolist()
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
            signs = _signs(len(x), rng).tolist()
            chosen = [p[turn].name if u < p[turn].p else "identity" for p, u in zip(pairs, draws, strict=True)]
            levels = [p[turn].level for p in pairs]
            strength = [policy_strength(*each, size) for each in zip(chosen, levels, signs, strict=True)]
            x = apply_chosen(x, chosen, torch.tensor(strength))
        return x, targets


@dataclass(frozen=True)
class CropShift:
    """Lines are cropped from the image's sides, and what remains is moved within a black frame (Li and Spratling 2023).

    Of k cropped lines, some are columns and the others rows; what remains lies anywhere in the old size.

    low, high: k is drawn from low ... high - 1, as in the authors' code; 0 and 11 for CIFAR-10. 0 <= low < high. At
    least one row and one column of a small image remain. Raises RecipeError for a field of the wrong type or range.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        check_types(self)
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int) and not 0 <= low < high:
            raise RecipeError(f"CropShift (given low={low}, high={high})", "low must be at least 0 and less than high")

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        n, _, height, width = x.shape
        lines = torch.randint(self.low, self.high, (n, 1), generator=rng)
        columns = _up_to(lines, rng)
        rows, columns = (lines - columns).clamp(max=height - 1), columns.clamp(max=width - 1)
        top, left, down, right = (_up_to(lost, rng) for lost in (rows, columns, rows, columns))
        moved = _moved(x, top - down, left - right)
        inside = _window(x, down, down + height - rows, right, right + width - columns)
        return torch.where(inside, moved, 0.0), targets


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
"""IDBH's changes of colour or shape, with the range of their strength; each has the probability 1/8"""


def _recoloured(x: Tensor, rng: torch.Generator) -> Tensor:
    """One of RECOLOUR for each image; a shear is along either axis, and goes either way, as a rotation does."""
    which = torch.randint(len(RECOLOUR), (len(x),), generator=rng).tolist()
    draws = torch.rand(len(x), generator=rng, dtype=torch.float64).tolist()
    signs, axes = _signs(len(x), rng).tolist(), _signs(len(x), rng).tolist()
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
    top, left = _up_to((height - rows).clamp(min=0), rng), _up_to((width - columns).clamp(min=0), rng)
    return torch.where(_window(x, top, top + rows, left, left + columns), 0.0, x)


def _moved(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The image seen through a window that was moved by whole pixels, [B, 1] each, on the host; 0 outside."""
    _, _, height, width = x.shape
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return take_pixels(x, to_device(x.device, rows)[:, :, None], to_device(x.device, columns)[:, None, :])


def _window(x: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[B, 1, H, W] bool on the device of x: rows top ... bottom - 1 and columns left ... right - 1; [B, 1] each."""
    _, _, height, width = x.shape
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = to_device(x.device, (rows >= top) & (rows < bottom))
    inside_columns = to_device(x.device, (columns >= left) & (columns < right))
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def _boxes(x: Tensor, height: Tensor, width: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes around a pixel, cut by the border: ([B, 1, H, W] bool, [B, 1] pixels in it, on the host); [B, 1] each."""
    top, left = row - height // 2, column - width // 2
    ends = [(low.clamp(0, side), (low + size).clamp(0, side))
            for low, size, side in ((top, height, x.shape[2]), (left, width, x.shape[3]))]  # fmt: skip
    (top, bottom), (left, right) = ends
    return _window(x, top, bottom, left, right), (bottom - top) * (right - left)


def _centres(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pixel of each image: rows [B, 1] and columns [B, 1], on the host."""
    return torch.randint(x.shape[2], (len(x), 1), generator=rng), torch.randint(x.shape[3], (len(x), 1), generator=rng)


def _up_to(most: Tensor, rng: torch.Generator) -> Tensor:
    """A whole number from 0 to each of `most`, both included."""
    return (torch.rand(most.shape, generator=rng, dtype=torch.float64) * (most + 1)).long()


def _signs(n: int, rng: torch.Generator) -> Tensor:
    """n times 1 or -1, int64."""
    return 1 - 2 * torch.randint(2, (n,), generator=rng)


def _beta(alpha: float, n: int, rng: torch.Generator) -> Tensor:
    """n draws of Beta(alpha, alpha), [n, 1] float64, by the inverse of its distribution: torch's takes no generator."""
    from scipy.special import betaincinv

    uniform = torch.rand(n, 1, generator=rng, dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))


def _check_positive(plugin: Any, name: str, value: Any) -> None:
    check_range(plugin, **{name: value})
    if value == 0:
        raise RecipeError(f"{describe_head(plugin)} (given {name}={describe(value)})", f"{name} must be more than 0")


def _check_probability(plugin: Any, p: Any) -> None:
    check_range(plugin, p=p)
    if isinstance(p, (int, float)) and p > 1:
        raise RecipeError(f"{describe_head(plugin)} (given p={describe(p)})", "p must be at most 1, a probability")
