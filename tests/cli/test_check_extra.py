"""`robustmail check` warns of extra images that are near-copies of images on which a model is tested or validated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robustmail.data.dataset import hold_out
from robustmail.data.file_sources import npz
from tests.docs.conftest import say


def checked(folder: Path, slice_path: Path, x: np.ndarray, data: str = "mixed(npz({!r}), {!r})") -> list[str]:
    """What is printed about extra images x, [N, H, W, C]."""
    np.savez(folder / "extra.npz", image=x, label=np.zeros(len(x), np.int64))
    words = ["model=small_cnn", "attack.steps=1", "batch=32", f"data={data.format(str(slice_path), 'extra.npz')}"]
    first, *lines = say(folder, "check", "at", *words).splitlines()
    assert first.startswith("at: ")
    return lines


def shifted(x: np.ndarray) -> np.ndarray:
    """By a pixel to the right, brighter."""
    return np.clip(np.roll(x, 1, axis=2).astype(int) + 15, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("data", ["mixed(npz({!r}), {!r})", "subset(mixed(npz({!r}), {!r}), train=160)"])
def test_copies_of_test_and_of_validation_images_are_counted_and_named(tmp_path: Path, slice_path: Path, data: str):
    images = npz(str(slice_path))()
    _, held = hold_out(images, 0)
    test, validation = (part.x.permute(0, 2, 3, 1).numpy() for part in (images.test, held))
    other = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), dtype=np.uint8)
    lines = checked(tmp_path, slice_path, np.concatenate([other, shifted(test[7:11]), validation[3:5]]), data)
    heads = [line for line in lines if not line.startswith("  ")]
    assert heads[0].startswith("warning: near-copies of test images among the extra images: 4 of 20 (20 %), of 4 of 80")
    assert heads[1].startswith("warning: near-copies of validation images among the extra images: 2 of 20 (10 %), of 2")
    named = {
        tuple(map(int, "".join(c if c.isdigit() else " " for c in line).split()[:2]))
        for line in lines
        if line[0] == " "
    }
    assert named <= {(14 + i, 7 + i) for i in range(4)} | {(18, 3), (19, 4)}
    assert len(named) == 3 + 2


def test_other_images_are_no_reason_for_a_warning(tmp_path: Path, slice_path: Path):
    x = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    lines = checked(tmp_path, slice_path, x)
    assert [line.partition(":")[0] for line in lines] == [
        f"near-copies of {s} images among the extra images" for s in ("test", "validation")
    ]
    assert all(": 0 of 30 (0 %)" in line for line in lines)
