"""Arrays of images and labels as files have them: names of keys, shapes, types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from robustmail.data.dataset import Split, channels_first
from robustmail.data.image_folders import SPLITS
from robustmail.errors import DataError
from robustmail.runtime.untrusted import printable

__all__ = [
    "IMAGE", "ImageFile", "KEYS", "LABEL", "NAMES", "Pair", "T", "class_names_of", "file_label", "pairs_of",
    "words_in", "as_split",
]  # fmt: skip

IMAGE = ("image", "img", "images", "imgs", "x", "data", "pixel_values", "arr_0")
"""names of what holds images: columns of a table, arrays of an npz file, in any letter case"""


LABEL = ("label", "labels", "fine_label", "fine_labels", "y", "target", "targets", "arr_1")
"""names of what holds their classes"""


NAMES = ("class_names", "label_names", "classes")


EVALUATED = ("test", "val", "")  # which split is evaluated, the first that is there; "": a lone pair


KEYS = "x_test and y_test, or image and label, or data and targets"


T = TypeVar("T")


Pair = tuple[Any, Any]


@dataclass(frozen=True)
class ImageFile:
    """Labelled images in files, not read yet.

    name: of the data, also for errors. path: the file or folder. parts: reads (images, labels) of each split, "train",
    "val" or "test"; "" is a lone pair; with `mapped=True` arrays stay on disk where that is possible. class_names: if
    the file has them. there: what is in it, for errors.
    """

    name: str
    path: Path
    parts: Mapping[str, Callable[..., Pair]]
    class_names: tuple[str, ...] | None = None
    there: str = ""

    def evaluated(self) -> Split:
        """The images of test, else val, else the lone pair. Raises DataError, also as `as_split`."""
        split = next((split for split in EVALUATED if split in self.parts), None)
        if split is None:
            todo = "Pass one of its files." if self.path.is_dir() else f"In an npz file they are {KEYS}."
            raise DataError(self.name, f"has no test images but {self.there}", todo)
        part = as_split(self.name, *self.parts[split](), floats=True)
        if len(part.x) != len(part.y) or not len(part.y):
            raise DataError(self.name, f"has {len(part.x)} images and {len(part.y)} labels")
        return part

    def trained(self) -> Split:
        """The images of train, else the lone pair, not copied: a view of the array, on disk where it can be mapped.

        Raises DataError, also as `as_split`.
        """
        split = next((split for split in ("train", "") if split in self.parts), None)
        if split is None:
            raise DataError(self.name, f"has no training images but {self.there}", "Name them image and label.")
        return as_split(self.name, *self.parts[split](mapped=True), copy=False)


def words_in(name: str) -> list[str]:
    """x_test.npy -> ["x", "test"]"""
    return re.split(r"[_.\-\s]", Path(name).stem.lower())


def role_of(key: str) -> tuple[str, bool] | None:
    """(split, whether it holds images) of an array by its name: "y_test" -> ("test", False); None for another."""
    name = key.lower().replace(".", "_").replace("-", "_")
    first, _, rest = name.partition("_")
    start, _, last = name.rpartition("_")
    for split, inner in (("", name), (SPLITS.get(last), start), (SPLITS.get(first), rest)):
        if split is not None and inner in IMAGE + LABEL:
            return split, inner in IMAGE
    return None


def pairs_of(who: str, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{split: (name of the images, name of the labels)}; refused is a split with two of either."""
    found: dict[tuple[str, bool], str] = {}
    for key in keys:
        if (role := role_of(key)) and (first := found.setdefault(role, key)) != key:
            what = "images" if role[1] else "labels"
            raise DataError(who, f"has two arrays that may be the {what}, {first} and {key}", "Save one of them.")
    return {
        split: (found[split, True], found[split, False])
        for split in ("train", "val", "test", "")
        if (split, True) in found and (split, False) in found
    }


def class_names_of(value: Any) -> tuple[str, ...] | None:
    """An array of texts as the names of classes; None for another array."""
    if value.ndim != 1 or value.dtype.kind not in "US" or value.size < 2:
        return None
    return tuple(printable(v.decode(errors="replace") if isinstance(v, bytes) else v) for v in value.tolist())


def file_label(who: str, path: Path) -> str:
    """The data with the file of them that an error is about."""
    return who if str(path) in who else f"{who} ({path})"


def as_split(who: str, x: Any, y: Any, floats: bool = False, copy: bool = True) -> Split:
    """Arrays as a Split.

    who: the data, for errors. x: images [N, H, W, C], [N, C, H, W] or [N, H, W]. y: labels [N] or [N, 1]. floats:
    whether images may be floats in [0, 1]. copy: whether images are brought into the order [N, C, H, W] now; else the
    Split is a view of x. Raises DataError: other types, shapes or ranges.
    """
    if floats and np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
        if x.size and not (x.min() >= 0 and x.max() <= 1):  # also true of NaN
            span = f"[{x.min():.3g}, {x.max():.3g}]"
            raise DataError(who, f"images span {span}, outside [0, 1]", "Undo the normalisation, or divide by 255.")
    elif x.dtype != np.uint8:
        whole = np.issubdtype(x.dtype, np.integer)
        todo = "Save them as x.astype('uint8')." if whole else "Multiply floats in [0, 1] by 255 and round."
        raise DataError(who, f"images are {x.dtype}, expected uint8", todo)
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y  # as Keras ships CIFAR
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        wrong = f"{len(x)} images but labels of shape {list(y.shape)}" if y.ndim != 1 else f"labels are {y.dtype}"
        todo = "Save y.argmax(1) of one-hot labels." if y.ndim == 2 else "Save whole numbers, as y.astype(int)."
        raise DataError(who, f"{wrong}, expected integers", todo)
    images = channels_first(torch.from_numpy(x))
    images = images.contiguous() if copy else images
    if images.ndim != 4:
        raise DataError(who, f"images have shape {list(x.shape)}, expected [N, H, W, C] or [N, C, H, W]")
    return Split(images, torch.from_numpy(y.astype(np.int64)))
