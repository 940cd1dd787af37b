"""Where images come from. A source is a value with knobs that returns `ImageData` when called."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustmail.data.dataset import ImageData, Split, channels_first, in_turn
from robustmail.data.image_files import Preprocess
from robustmail.data.image_folders import stream_images, to_train
from robustmail.errors import DataError, RecipeError
from robustmail.fields import check_types
from robustmail.runtime.untrusted import check_unpacked

__all__ = ["cifar10", "cifar100", "digits", "image_folder", "npz", "subset", "svhn"]


def _check_knobs(source: Any) -> None:
    """Refuse knobs of the wrong type or out of range (raises RecipeError)."""
    check_types(source)
    for name, least in {"pad": 0, "validation": 1, "classes": 1, "train": 1, "size": 1}.items():
        value = getattr(source, name, None)
        if value is not None and value < least:
            raise RecipeError(f"{type(source).__name__} (given {name}={value})", f"{name} must be at least {least}")


@dataclass(frozen=True)
class cifar10:
    """CIFAR-10: 50,000 + 10,000 images of 3x32x32 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        return _torchvision(self, "CIFAR10", 10)


@dataclass(frozen=True)
class cifar100:
    """CIFAR-100: 50,000 + 10,000 images of 3x32x32 in 100 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        return _torchvision(self, "CIFAR100", 100)


@dataclass(frozen=True)
class svhn:
    """SVHN: 73,257 + 26,032 house numbers of 3x32x32 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 4
    flip: bool = False

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        return _torchvision(self, "SVHN", 10)


@dataclass(frozen=True)
class digits:
    """scikit-learn's 1,797 handwritten digits of 1x8x8 in 10 classes; inside the package, so no network is needed.

    There is no official split: every fifth image, in the data's own order, is a test image.
    """

    validation: int | None = 150
    pad: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        from sklearn.datasets import load_digits

        raw, labels = load_digits(return_X_y=True)
        x = torch.from_numpy((raw.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8))
        y = torch.from_numpy(labels.astype(np.int64))
        test = torch.arange(len(y)) % 5 == 4
        return ImageData(
            "digits()",
            Split(x[~test], y[~test]),
            Split(x[test], y[test]),
            10,
            self.pad,
            self.flip,
            self.validation,
            tuple(map(str, range(10))),
        )


@dataclass(frozen=True)
class npz:
    """A file with Keras' keys x_train, y_train, x_test, y_test: uint8 images, NHWC or NCHW; integer labels.

    classes: by default one more than the largest label of y_train.
    """

    path: str
    classes: int | None = None
    validation: int | None = None
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        who = f"npz({self.path!r})"
        arrays = _read_npz(who, Path(self.path))
        train, test = (as_split(f"{who} ({s})", arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in ("train", "test"))
        classes = self.classes or (int(train.y.max()) + 1 if len(train.y) else 1)
        return ImageData(who, train, test, classes, self.pad, self.flip, self.validation)


@dataclass(frozen=True)
class image_folder:
    """Folders train/<class>/*.png and test/<class>/*.png, or val/ in place of test/.

    size: the shorter side of each image is resized to so many pixels, and the square in the centre is taken; without
    it, all images must be of one size. Classes are numbered in the order of their folders' names as text; where all
    images are grey, they have one channel. Training images come class by class, test images of each class in turn.
    """

    path: str
    validation: int | None = None
    pad: int = 4
    flip: bool = True
    size: int | None = None

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        who = f"image_folder({self.path!r})"
        listings = to_train(who, Path(self.path))
        preprocess = Preprocess(self.size, self.size) if self.size else None
        parts = [stream_images(who, listing, preprocess).loaded() for listing in listings]
        channels = max(part.x.shape[1] for part in parts)  # all grey in one split alone is no reason to refuse
        train, test = (part._replace(x=part.x.expand(-1, channels, -1, -1).contiguous()) for part in parts)
        names = listings[0].classes
        return ImageData(
            who, train, test.take(in_turn(test.y)), len(names), self.pad, self.flip, self.validation, names
        )


@dataclass(frozen=True)
class subset:
    """The first `train` training images of another source, with all of its test images.

    What is held out for validation is taken from them.
    """

    of: Callable[[], Any]
    train: int

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        images: ImageData = self.of()
        if self.train > len(images.train.y):
            raise DataError(f"subset (given train={self.train})", f"{images.name} has {len(images.train.y)} images")
        train = images.train
        if isinstance(self.of, image_folder):  # sorted by class
            train = train.take(in_turn(train.y))
        return replace(images, name=f"{images.name}, first {self.train:,}", train=train.first(self.train))


def _torchvision(source: Any, name: str, classes: int) -> ImageData:
    import torchvision

    who = f"{type(source).__name__}({source.root!r})"
    kind = getattr(torchvision.datasets, name)
    # SVHN names its splits, the CIFARs have a flag.
    keys = [{"split": "train"}, {"split": "test"}] if name == "SVHN" else [{"train": True}, {"train": False}]
    there = Path(source.root).exists()
    try:
        sets = [kind(source.root, download=True, **key) for key in keys]
    except OSError as error:  # URLError is one
        if not there:
            with suppress(OSError):
                Path(source.root).rmdir()  # the empty folder that torchvision has made
        raise DataError(
            who, f"cannot be read or downloaded ({error})",
            f"Connect to the network, put torchvision's {name} files into {source.root}, or use data=npz('FILE').",
        ) from error  # fmt: skip
    except (RuntimeError, EOFError) as error:
        raise DataError(who, f"damaged: {error}", f"Delete torchvision's {name} files in {source.root}.") from error
    labels = [s.labels if name == "SVHN" else s.targets for s in sets]
    train, test = (as_split(who, np.asarray(s.data), np.asarray(y)) for s, y in zip(sets, labels, strict=True))
    names = getattr(sets[0], "classes", None)  # SVHN has none: its classes are digits
    names = tuple(map(str, names if names and len(names) == classes else range(classes)))
    return ImageData(who, train, test, classes, source.pad, source.flip, source.validation, names)


def read_arrays(who: str, path: Path, keys: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """Those of `keys` that an npz file has, and all that it has. Raises DataError for a file that cannot be read."""
    if not path.is_file():
        raise DataError(who, "no such file")
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            check_unpacked(file.zip, path.stat().st_size)
            there = list(file)
            return {key: np.asarray(file[key]) for key in keys if key in there}, there
    except Exception as error:  # a damaged archive fails in a dozen ways, from zlib's to the tokenizer's
        why = "" if "pickle" in str(error) else f" ({error})"  # numpy takes what it does not know for a pickle
        wrong = f"not a readable npz file{why}"
        raise DataError(who, wrong, "It is truncated, damaged, or another kind.") from error


def _read_npz(who: str, path: Path) -> dict[str, Any]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    arrays, there = read_arrays(who, path, keys)
    if missing := [key for key in keys if key not in arrays]:
        wanted = f"Its keys are {', '.join(there)}; Keras' are {', '.join(keys)}."
        raise DataError(who, f"has no {', '.join(missing)}", wanted)
    return arrays


def as_split(who: str, x: Any, y: Any, floats: bool = False) -> Split:
    """Arrays as a Split.

    who: the data, for errors. x: images [N, H, W, C], [N, C, H, W] or [N, H, W]. y: labels [N] or [N, 1]. floats:
    whether images may be floats in [0, 1]. Raises DataError: other types, shapes or ranges.
    """
    if floats and np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
        if x.size and not (x.min() >= 0 and x.max() <= 1):  # also true of NaN
            span = f"[{x.min():.3g}, {x.max():.3g}]"
            raise DataError(who, f"images span {span}, outside [0, 1]", "Undo the normalisation, or divide by 255.")
    elif x.dtype != np.uint8:
        raise DataError(who, f"images are {x.dtype}, expected uint8", "Multiply floats in [0, 1] by 255 and round.")
    if not np.issubdtype(y.dtype, np.integer):
        raise DataError(who, f"labels are {y.dtype}, expected integers")
    images = channels_first(torch.from_numpy(x)).contiguous()
    if images.ndim != 4:
        raise DataError(who, f"images have shape {list(x.shape)}, expected [N, H, W, C] or [N, C, H, W]")
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y  # as Keras ships CIFAR
    return Split(images, torch.from_numpy(y.astype(np.int64)))
