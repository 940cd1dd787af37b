"""Images to evaluate on: of a file or folder that need not have any to train on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robustmail.data.dataset import ImageData, Split
from robustmail.data.sources import as_split, read_arrays, read_folder
from robustmail.errors import DataError

__all__ = ["TestSet", "interleave_classes", "from_arrays", "from_image_data", "from_path"]

PAIRS = (("x_test", "y_test"), ("x", "y"), ("images", "labels"), ("data", "targets"))


@dataclass(frozen=True)
class TestSet:
    """Some images in the data set's own order, uint8 or floats in [0, 1], and what is known of them."""

    __test__ = False  # for pytest, which takes it for a test

    name: str
    part: Split
    classes: int
    class_names: tuple[str, ...] | None = None
    given: str | None = None
    """how to come by them again: what was passed to --data"""

    def first(self, n: int | None) -> TestSet:
        """The first n images. Raises DataError where there are fewer."""
        there = len(self.part.y)
        if n is not None and n > there:
            raise DataError(f"{self.name} (given n={n})", f"has {there} images", f"Pass --n {there}, or leave it out.")
        return replace(self, part=self.part.first(n))

    def lacks(self, whole: TestSet) -> str:
        """A sentence where these images, the first of `whole`, are of far fewer classes than they might; else ""."""
        n, here, there = len(self.part.y), len(self.part.y.unique()), len(whole.part.y.unique())
        if 2 * here >= min(n, there):
            return ""
        why = ": the set is sorted" if bool((whole.part.y.diff() >= 0).all()) else ""
        return f"the first {n:,} images have {here} of the {there} classes{why}"


def from_arrays(data: Any, n: int | None = None) -> Split:
    """(images, labels) as tensors or numpy arrays -> a Part, float32 or uint8 and int64; n: only the first n.

    Raises DataError: no such pair, images outside [0, 1], labels that are no whole numbers from 0, or too few.
    """
    who = "evaluate"
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise DataError(who, f"data are a {type(data).__name__}", "Pass (images, labels), tensors or numpy arrays.")
    try:
        x, y = map(torch.as_tensor, data)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(who, f"data are no arrays ({error})", "Pass (images, labels), tensors or arrays.") from error
    x = x.float() if x.is_floating_point() else x
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
    if x.ndim != 4 or 0 in x.shape or not (x.is_floating_point() or x.dtype == torch.uint8):
        wrong = f"images are {str(x.dtype)[6:]} of shape {list(x.shape)}"
        raise DataError(who, wrong, "Pass uint8, or floats in [0, 1], of shape [N, C, H, W].")
    if x.is_floating_point() and not (x.min() >= 0 and x.max() <= 1):  # also true of NaN
        raise DataError(who, f"images span [{x.min():.3g}, {x.max():.3g}], outside [0, 1]", "Divide bytes by 255.")
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        wrong = f"labels are {str(y.dtype)[6:]} of shape {list(y.shape)}, expected whole numbers of shape [N]"
        raise DataError(who, wrong, "Pass y.argmax(1) of one-hot labels." if y.ndim == 2 else "")
    if len(x) != len(y):
        raise DataError(who, f"{len(x)} images, but {len(y)} labels")
    if int(y.min()) < 0:
        raise DataError(who, f"has the label {int(y.min())}", "Labels are 0, 1, 2, ...")
    if n is not None and not 1 <= n <= len(y):
        raise DataError(f"{who} (given n={n})", f"there are {len(y)} images", f"Pass 1 ... {len(y)}, or leave n out.")
    return Split(x, y.long()).first(n)


def from_image_data(images: ImageData) -> TestSet:
    """The test part of a recipe's data."""
    return TestSet(images.name, images.test, images.classes, images.class_names)


def interleave_classes(part: Split) -> Split:
    """The first image of each class, then the second of each, ...: the first n of a folder are then of all classes."""
    seen: Counter[int] = Counter()
    place = []
    for y in part.y.tolist():
        place.append((seen[y], y))
        seen[y] += 1
    order = torch.tensor(sorted(range(len(place)), key=place.__getitem__), dtype=torch.int64)
    return Split(part.x[order], part.y[order])


def from_path(path: Path) -> TestSet:
    """An npz file (x_test, y_test; or x, y; images, labels; data, targets), or a folder with test/<class>/ or <class>/.

    Raises DataError: no such thing, damaged, or with images outside [0, 1].
    """
    who = str(path)
    if path.is_dir():
        part, names = read_folder(who, path / "test" if (path / "test").is_dir() else path)
        return TestSet(who, interleave_classes(part), len(names), tuple(names))
    arrays, there = read_arrays(who, path, tuple(name for pair in PAIRS for name in pair))
    pair = next((pair for pair in PAIRS if all(name in arrays for name in pair)), None)
    if pair is None:
        wanted = " or ".join(", ".join(pair) for pair in PAIRS)
        raise DataError(who, f"has {', '.join(there) or 'nothing'}", f"Its keys must be {wanted}.")
    part = as_split(who, arrays[pair[0]], arrays[pair[1]], floats=True)
    if len(part.x) != len(part.y) or not len(part.y):
        raise DataError(who, f"has {len(part.x)} images and {len(part.y)} labels")
    if int(part.y.min()) < 0:
        raise DataError(who, f"has the label {int(part.y.min())}", "Labels are 0, 1, 2, ...")
    return TestSet(who, part, int(part.y.max()) + 1)
