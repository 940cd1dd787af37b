"""Near-copies are found however they were changed; other photographs of the same things are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from robustmail.data.dataset import Extra, Split
from robustmail.data.near_duplicates import find_near_copies

RNG = torch.Generator().manual_seed(0)
CHANGES = {
    "the same": lambda x: x,
    "shifted": lambda x: pad(x, (1, 1, 1, 1), mode="replicate")[:, :, :-2, :-2],
    "noise": lambda x: x + 6 * torch.randn(x.shape, generator=RNG),
    "brighter": lambda x: x + 25,
    "less contrast": lambda x: 128 + 0.7 * (x - 128),
    "blurred": lambda x: interpolate(interpolate(x, scale_factor=0.75, mode="area"), x.shape[2:], mode="bilinear"),
    "all of it": lambda x: (
        pad(x, (1, 1, 1, 1), mode="replicate")[:, :, 2:, 2:] * 0.9 + 20 + 6 * torch.randn(x.shape, generator=RNG)
    ),
}


def photographs(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {split: torch.from_numpy(file[f"x_{split}"]).permute(0, 3, 1, 2) for split in ("train", "test")}


def split(x: Tensor) -> Split:
    return Split(x, torch.zeros(len(x), dtype=torch.int64))


@pytest.mark.parametrize("change", CHANGES)
def test_a_planted_near_copy_is_found_and_tells_what_it_is_a_copy_of(change: str, slice_path: Path) -> None:
    images = photographs(slice_path)
    planted = CHANGES[change](images["test"][:40].float()).clamp(0, 255).round().byte()
    mix = torch.cat([images["train"][:50], planted])
    found = find_near_copies(Extra((split(mix[:70]), split(mix[70:])), 0.5).blocks(16), {"test": images["test"]})[
        "test"
    ]
    assert {(copy.image - 50, copy.target) for copy in found} <= {(i, i) for i in range(40)}
    assert len(found) >= 36
    assert all(0.93 <= copy.correlation <= 1.0001 for copy in found)


def test_mirror_images_are_copies_where_training_mirrors(slice_path: Path) -> None:
    x = photographs(slice_path)["test"]
    planted = split(x[5:10].flip(3))
    assert find_near_copies([planted], {"test": x}, flip=False)["test"] == []
    found = find_near_copies([planted], {"test": x}, flip=True)["test"]
    assert [(copy.image, copy.target) for copy in found] == [(i, 5 + i) for i in range(5)]


def test_each_set_is_searched_and_progress_counts_the_images(slice_path: Path) -> None:
    images, seen = photographs(slice_path), []
    targets = {"test": images["test"][:20], "validation": images["train"][:10]}
    blocks = [split(images["test"][10:30]), split(images["train"][:5])]
    found = find_near_copies(blocks, targets, progress=seen.append)
    assert [(copy.image, copy.target) for copy in found["test"]] == [(i, 10 + i) for i in range(10)]
    assert [(copy.image, copy.target) for copy in found["validation"]] == [(20 + i, i) for i in range(5)]
    assert seen == [20, 25]


def test_among_real_images_of_one_data_set_hardly_any_is_a_copy(mini_path: Path) -> None:
    """CIFAR-10 has true duplicates: of 3.3 % of its test images among all 50,000 training images."""
    images = photographs(mini_path)
    found = find_near_copies(Extra((split(images["train"]),), 0.5).blocks(500), {"test": images["test"]})["test"]
    assert len(found) <= 0.01 * len(images["train"])


def test_flat_images_and_tiny_ones_are_no_copies_of_anything() -> None:
    flat, dots = torch.full((3, 1, 8, 8), 7, dtype=torch.uint8), torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    dots[0, 0, 0, 0] = dots[1, 0, 1, 1] = 255
    assert find_near_copies([split(flat)], {"test": flat})["test"] == []
    assert [(c.image, c.target) for c in find_near_copies([split(dots)], {"test": dots})["test"]] == [(0, 0), (1, 1)]
