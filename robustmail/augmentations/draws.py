"""What augmentations share: random numbers for each image from a generator on the host, boxes, and checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustmail.augmentations.image_operations import take_pixels
from robustmail.errors import RecipeError
from robustmail.fields import check_range, describe, describe_head
from robustmail.runtime.deferred import to_device

__all__ = [
    "Pair",
    "beta",
    "boxes",
    "centres",
    "check_positive",
    "check_probability",
    "shifted",
    "random_signs",
    "up_to",
    "window",
]

Pair = tuple[Tensor, Tensor]
"""(x, targets)"""


def shifted(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The image seen through a window that was moved by whole pixels, [B, 1] each, on the host; 0 outside."""
    _, _, height, width = x.shape
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return take_pixels(x, to_device(x.device, rows)[:, :, None], to_device(x.device, columns)[:, None, :])


def window(x: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[B, 1, H, W] bool on the device of x: rows top ... bottom - 1 and columns left ... right - 1; [B, 1] each."""
    _, _, height, width = x.shape
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = to_device(x.device, (rows >= top) & (rows < bottom))
    inside_columns = to_device(x.device, (columns >= left) & (columns < right))
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def boxes(x: Tensor, height: Tensor, width: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes around a pixel, cut by the border: ([B, 1, H, W] bool, [B, 1] pixels in it, on the host); [B, 1] each."""
    top, left = row - height // 2, column - width // 2
    ends = [(low.clamp(0, side), (low + size).clamp(0, side))
            for low, size, side in ((top, height, x.shape[2]), (left, width, x.shape[3]))]  # fmt: skip
    (top, bottom), (left, right) = ends
    return window(x, top, bottom, left, right), (bottom - top) * (right - left)


def centres(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A pixel of each image: rows [B, 1] and columns [B, 1], on the host."""
    return torch.randint(x.shape[2], (len(x), 1), generator=rng), torch.randint(x.shape[3], (len(x), 1), generator=rng)


def up_to(most: Tensor, rng: torch.Generator) -> Tensor:
    """A whole number from 0 to each of `most`, both included."""
    return (torch.rand(most.shape, generator=rng, dtype=torch.float64) * (most + 1)).long()


def random_signs(n: int, rng: torch.Generator) -> Tensor:
    """n times 1 or -1, int64."""
    return 1 - 2 * torch.randint(2, (n,), generator=rng)


def beta(alpha: float, n: int, rng: torch.Generator) -> Tensor:
    """n draws of Beta(alpha, alpha), [n, 1] float64, by the inverse of its distribution: torch's takes no generator."""
    from scipy.special import betaincinv

    uniform = torch.rand(n, 1, generator=rng, dtype=torch.float64)
    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))


def check_positive(plugin: Any, name: str, value: Any) -> None:
    """Raise RecipeError where a number is not finite and above 0."""
    check_range(plugin, **{name: value})
    if value == 0:
        raise RecipeError(f"{describe_head(plugin)} (given {name}={describe(value)})", f"{name} must be more than 0")


def check_probability(plugin: Any, p: Any) -> None:
    """Raise RecipeError where p is not in [0, 1]."""
    check_range(plugin, p=p)
    if isinstance(p, (int, float)) and p > 1:
        raise RecipeError(f"{describe_head(plugin)} (given p={describe(p)})", "p must be at most 1, a probability")
