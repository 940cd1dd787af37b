"""Augmentations that move an image: crops and mirror images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustmail.augmentations.draws import (
    Pair,
    shifted,
    up_to,
    window,
)
from robustmail.errors import RecipeError
from robustmail.fields import check_range, check_types
from robustmail.runtime.deferred import to_device

__all__ = ["Crop", "CropShift", "Flip"]


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
        return shifted(x, top - self.pad, left - self.pad), targets


@dataclass(frozen=True)
class Flip:
    """The mirror image, left for right, with probability 1/2."""

    def __call__(self, x: Tensor, targets: Tensor, rng: torch.Generator) -> Pair:
        mirrored = to_device(x.device, torch.rand(len(x), 1, 1, 1, generator=rng) < 0.5)
        return x.flip(3).where(mirrored, x), targets


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
        columns = up_to(lines, rng)
        rows, columns = (lines - columns).clamp(max=height - 1), columns.clamp(max=width - 1)
        top, left, down, right = (up_to(lost, rng) for lost in (rows, columns, rows, columns))
        moved = shifted(x, top - down, left - right)
        inside = window(x, down, down + height - rows, right, right + width - columns)
        return torch.where(inside, moved, 0.0), targets
