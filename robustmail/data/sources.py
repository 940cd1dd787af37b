"""Where images come from. A source is a value with knobs that returns `ImageData` when called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from robustmail.data.adapters import class_names, read_bytes
from robustmail.data.dataset import ImageData, Split, in_turn
from robustmail.data.file_sources import image_folder, tiny_imagenet
from robustmail.data.image_files import Preprocess
from robustmail.data.source_values import check_knobs, image_data, square
from robustmail.data.torchvision_sets import check_name, read_torchvision
from robustmail.errors import DataError

__all__ = [
    "cifar10", "cifar100", "dataset", "digits", "fashion_mnist", "gtsrb", "mnist", "stl10", "subset", "svhn",
    "torchvision_dataset",
]  # fmt: skip


@dataclass(frozen=True)
class cifar10:
    """CIFAR-10: 50,000 + 10,000 images of 3x32x32 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "CIFAR10", download, 10)


@dataclass(frozen=True)
class cifar100:
    """CIFAR-100: 50,000 + 10,000 images of 3x32x32 in 100 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "CIFAR100", download, 100)


@dataclass(frozen=True)
class svhn:
    """SVHN: 73,257 + 26,032 house numbers of 3x32x32 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 4
    flip: bool = False

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "SVHN", download, 10)


@dataclass(frozen=True)
class mnist:
    """MNIST: 60,000 + 10,000 digits of 1x28x28 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 3
    flip: bool = False

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "MNIST", download, 10)


@dataclass(frozen=True)
class fashion_mnist:
    """Fashion-MNIST: 60,000 + 10,000 clothes of 1x28x28 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 3
    flip: bool = True

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "FashionMNIST", download, 10)


@dataclass(frozen=True)
class stl10:
    """STL-10: 5,000 + 8,000 images of 3x96x96 in 10 classes, downloaded by torchvision with its checksum."""

    root: str = "data"
    validation: int | None = 1000
    pad: int = 12
    flip: bool = True

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "STL10", download, 10)


@dataclass(frozen=True)
class gtsrb:
    """GTSRB: 26,640 + 12,630 traffic signs in 43 classes, resized to 3x`size`x`size`, downloaded by torchvision."""

    root: str = "data"
    validation: int | None = 1000
    pad: int | None = None
    flip: bool = False
    size: int = 32

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self, download: bool = True) -> ImageData:
        return _torchvision(self, "GTSRB", download, 43, preprocess=Preprocess(self.size, squash=True))


@dataclass(frozen=True)
class torchvision_dataset:
    """Any labelled data set of torchvision by the name of its class, such as "Flowers102", downloaded if it can be.

    Its train split, and test, else val. size: the shorter side of each image after resizing, which is then cropped to a
    square in the centre; needed where images differ in size. split: which of EMNIST's subsets. pad: by default an
    eighth of the shorter side.
    """

    name: str
    root: str = "data"
    validation: int | None = None
    pad: int | None = None
    flip: bool = False
    size: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        check_knobs(self)
        check_name(f"torchvision_dataset({self.name!r})", self.name)

    def __call__(self, download: bool = True) -> ImageData:
        who = f"torchvision_dataset({self.name!r}, {self.root!r})"
        preprocess = square(self.size)
        train, test, names = read_torchvision(who, self.name, self.root, download, self.split, preprocess)
        classes = len(names) if names else int(train.y.max()) + 1
        return image_data(self, who, train, test, classes, names)


@dataclass(frozen=True)
class digits:
    """scikit-learn's 1,797 handwritten digits of 1x8x8 in 10 classes; inside the package, so no network is needed.

    There is no official split: every fifth image, in the data's own order, is a test image.
    """

    validation: int | None = 150
    pad: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self) -> ImageData:
        from sklearn.datasets import load_digits

        raw, labels = load_digits(return_X_y=True)
        x = torch.from_numpy((raw.reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8))
        y = torch.from_numpy(labels.astype(np.int64))
        test = torch.arange(len(y)) % 5 == 4
        parts = Split(x[~test], y[~test]), Split(x[test], y[test])
        return image_data(self, "digits()", *parts, 10, tuple(map(str, range(10))))


class _Held:
    """Data in memory, which a recipe shows by their type and number."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __repr__(self) -> str:
        pair = isinstance(self.data, (tuple, list)) and len(self.data) == 2
        what = self.data[1] if pair else self.data
        count = f" of {len(what):,}" if hasattr(what, "__len__") else ""
        return f"<{'arrays' if pair else type(self.data).__name__}{count}>"


@dataclass(frozen=True)
class dataset:
    """Data in Python: (images, labels), a data set of any library or its DataLoader, to train on and to test on.

    They are read as `evaluate` reads them, once, without augmentation: that is pad and flip. pad: by default an
    eighth of the shorter side. Names of classes are those of train, if it has them.
    """

    train: Any
    test: Any
    validation: int | None = None
    pad: int | None = None
    flip: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        check_knobs(self)
        for name in ("train", "test"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, _Held) else _Held(value))

    def __call__(self) -> ImageData:
        train, test = (read_bytes(f"dataset ({n})", getattr(self, n).data) for n in ("train", "test"))
        names = class_names(self.train.data)
        classes = self.classes or (len(names) if names else int(train.y.max()) + 1)
        return image_data(self, "dataset", train, test, classes, names)


@dataclass(frozen=True)
class subset:
    """The first `train` training images of another source, with all of its test images.

    What is held out for validation is taken from them.
    """

    of: Callable[[], Any]
    train: int

    def __post_init__(self) -> None:
        check_knobs(self)

    def __call__(self) -> ImageData:
        images: ImageData = self.of()
        if self.train > len(images.train.y):
            raise DataError(f"subset (given train={self.train})", f"{images.name} has {len(images.train.y)} images")
        train = images.train
        if isinstance(self.of, (image_folder, tiny_imagenet)):  # sorted by class
            train = train.take(in_turn(train.y))
        return replace(images, name=f"{images.name}, first {self.train:,}", train=train.first(self.train))


def _torchvision(
    source: Any, name: str, download: bool, classes: int, preprocess: Preprocess | None = None
) -> ImageData:
    who = f"{type(source).__name__}({source.root!r})"
    train, test, names = read_torchvision(who, name, source.root, download, preprocess=preprocess)
    if name == "SVHN":  # which names none
        names = tuple(map(str, range(classes)))
    return image_data(source, who, train, test, classes, names)
