"""Where images come from. A source is a value with knobs that returns `ImageData` when called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustmail.data.adapters import class_names, read_bytes
from robustmail.data.array_files import ImageFile, as_split, open_file, open_folder
from robustmail.data.dataset import ImageData, Split, in_turn
from robustmail.data.image_files import Preprocess
from robustmail.data.image_folders import stream_images, to_train, wordnet_names
from robustmail.data.torchvision_sets import check_name, read_torchvision
from robustmail.errors import DataError, RecipeError
from robustmail.fields import check_types

__all__ = [
    "cifar10", "cifar100", "dataset", "digits", "fashion_mnist", "gtsrb", "image_folder", "mnist", "npy", "npz",
    "parquet", "stl10", "subset", "svhn", "tiny_imagenet", "torchvision_dataset",
]  # fmt: skip


def _check_knobs(source: Any) -> None:
    """Refuse knobs of the wrong type or out of range (raises RecipeError)."""
    check_types(source)
    for name, least in {"pad": 0, "validation": 1, "classes": 1, "train": 1, "size": 1}.items():
        value = getattr(source, name, None)
        if isinstance(value, int) and value < least:
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
        _check_knobs(self)

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
        _check_knobs(self)

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
        _check_knobs(self)

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
        _check_knobs(self)

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
        _check_knobs(self)

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
        _check_knobs(self)

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
        _check_knobs(self)
        check_name(f"torchvision_dataset({self.name!r})", self.name)

    def __call__(self, download: bool = True) -> ImageData:
        who = f"torchvision_dataset({self.name!r}, {self.root!r})"
        preprocess = _square(self.size)
        train, test, names = read_torchvision(who, self.name, self.root, download, self.split, preprocess)
        classes = len(names) if names else int(train.y.max()) + 1
        return _image_data(self, who, train, test, classes, names)


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
        parts = Split(x[~test], y[~test]), Split(x[test], y[test])
        return _image_data(self, "digits()", *parts, 10, tuple(map(str, range(10))))


@dataclass(frozen=True)
class npz:
    """A file with Keras' keys x_train, y_train, x_test, y_test: uint8 images, NHWC or NCHW; integer labels.

    Also train_images, train_labels and the like, in any letter case; class_names, an array of texts, may be there.
    classes: by default as many as class_names, or one more than the largest training label. test: another file, for the
    images to test on. pad: by default an eighth of the shorter side. flip: training images are mirrored at random.
    """

    path: str
    classes: int | None = None
    validation: int | None = None
    pad: int | None = None
    flip: bool = False
    test: str | None = None

    def __post_init__(self) -> None:
        _check_knobs(self)

    def trained(self) -> ImageFile:
        """The file to train on."""
        return open_file(f"npz({self.path!r})", Path(self.path))

    def tested(self) -> ImageFile:
        """The file to evaluate on."""
        return open_file(f"npz({self.path!r})", Path(self.test or self.path))

    def __call__(self) -> ImageData:
        test = open_file(f"npz({self.test!r})", Path(self.test)) if self.test else None
        return _from_files(self, f"npz({self.path!r})", self.trained(), test, self.classes)


@dataclass(frozen=True)
class npy:
    """Two npy files, of images and of their labels; for training two more, to test on.

    labels: by default y.npy, labels.npy or the like beside the images. pad: by default an eighth of the shorter side.
    flip: training images are mirrored at random.
    """

    images: str
    labels: str | None = None
    test_images: str | None = None
    test_labels: str | None = None
    classes: int | None = None
    validation: int | None = None
    pad: int | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        _check_knobs(self)

    def tested(self) -> ImageFile:
        """The files to evaluate on."""
        return self._test() or self.trained()

    def trained(self) -> ImageFile:
        """The files to train on."""
        return _npy(self.images, self.labels)

    def _test(self) -> ImageFile | None:
        return _npy(self.test_images, self.test_labels) if self.test_images else None

    def __call__(self) -> ImageData:
        return _from_files(self, f"npy({self.images!r})", self.trained(), self._test(), self.classes)


@dataclass(frozen=True)
class parquet:
    """A folder of Hugging Face's parquet files, train-*.parquet and test-*.parquet; needs robustmail[parquet].

    path: the folder, or one file, with `test` as another, for the images to test on. pad: by default an eighth of the
    shorter side. flip: training images are mirrored at random.
    """

    path: str
    test: str | None = None
    validation: int | None = None
    pad: int | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        _check_knobs(self)

    def trained(self) -> ImageFile:
        """The file to train on."""
        return _parquet(self.path)

    def tested(self) -> ImageFile:
        """The file to evaluate on."""
        return _parquet(self.test or self.path)

    def __call__(self) -> ImageData:
        test = _parquet(self.test) if self.test else None
        return _from_files(self, f"parquet({self.path!r})", self.trained(), test)


@dataclass(frozen=True)
class image_folder:
    """Folders train/<class>/*.png and test/<class>/*.png, or val/ in place of test/.

    size: the shorter side of each image is resized to so many pixels, and the square in the centre is taken; without
    it, all images must be of one size. Classes are numbered in the order of their folders' names as text; where all
    images are grey, they have one channel. Training images come class by class, test images of each class in turn.
    pad: by default an eighth of the shorter side. flip: training images are mirrored at random.
    """

    path: str
    validation: int | None = None
    pad: int | None = None
    flip: bool = False
    size: int | None = None

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        return _folder(self, f"image_folder({self.path!r})")


@dataclass(frozen=True)
class tiny_imagenet:
    """Tiny-ImageNet as unpacked: 100,000 + 10,000 images of 3x64x64 in 200 classes, named by its words.txt."""

    path: str
    validation: int | None = 1000
    pad: int = 8
    flip: bool = True

    def __post_init__(self) -> None:
        _check_knobs(self)

    def __call__(self) -> ImageData:
        return _folder(self, f"tiny_imagenet({self.path!r})")


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
        _check_knobs(self)
        for name in ("train", "test"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, _Held) else _Held(value))

    def __call__(self) -> ImageData:
        train, test = (read_bytes(f"dataset ({n})", getattr(self, n).data) for n in ("train", "test"))
        names = class_names(self.train.data)
        classes = self.classes or (len(names) if names else int(train.y.max()) + 1)
        return _image_data(self, "dataset", train, test, classes, names)


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
        if isinstance(self.of, (image_folder, tiny_imagenet)):  # sorted by class
            train = train.take(in_turn(train.y))
        return replace(images, name=f"{images.name}, first {self.train:,}", train=train.first(self.train))


def _image_data(
    source: Any, who: str, train: Split, test: Split, classes: int, names: tuple[str, ...] | None
) -> ImageData:
    """What a source returns, with the augmentation of its knobs."""
    pad = min(train.x.shape[2:]) // 8 if source.pad is None else source.pad
    names = names if names and len(names) == classes else None
    return ImageData(who, train, test, classes, pad, source.flip, source.validation, names)


def _torchvision(
    source: Any, name: str, download: bool, classes: int, preprocess: Preprocess | None = None
) -> ImageData:
    who = f"{type(source).__name__}({source.root!r})"
    train, test, names = read_torchvision(who, name, source.root, download, preprocess=preprocess)
    if name == "SVHN":  # which names none
        names = tuple(map(str, range(classes)))
    return _image_data(source, who, train, test, classes, names)


def _square(size: int | None) -> Preprocess | None:
    """Resizes the shorter side to `size`, and crops the square in the centre; None for images as they are."""
    return Preprocess(size, size) if size else None


def _folder(source: Any, who: str) -> ImageData:
    listings = to_train(who, Path(source.path))
    preprocess = _square(getattr(source, "size", None))
    parts = [stream_images(who, listing, preprocess).loaded() for listing in listings]
    channels = max(part.x.shape[1] for part in parts)  # all grey in one split alone is no reason to refuse
    train, test = (part._replace(x=part.x.expand(-1, channels, -1, -1).contiguous()) for part in parts)
    names = wordnet_names(listings[0])
    return _image_data(source, who, train, test.take(in_turn(test.y)), len(names), names)


def _npy(images: str, labels: str | None) -> ImageFile:
    return open_file(f"npy({images!r})", Path(images), Path(labels) if labels else None)


def _parquet(path: str) -> ImageFile:
    who = f"parquet({path!r})"
    if not Path(path).is_dir():
        return open_file(who, Path(path))
    if found := open_folder(who, Path(path)):
        return found
    raise DataError(who, "has no parquet files")


def _from_files(
    source: Any, who: str, train: ImageFile, test: ImageFile | None, classes: int | None = None
) -> ImageData:
    """The training part of one file, and the test part of it or of another."""
    name = next((name for name in ("train", "") if name in train.parts and (name or test)), None)
    of = test or train
    tested = next((name for name in ("test", "val", "") if name in of.parts and (name or test)), None)
    if name is None or tested is None:
        alone = "" in train.parts or (name is not None and test is None)
        wrong = f"has {train.there}: " + f"no images with labels to {'test' if alone else 'train'} on"
        kind = "test_images" if isinstance(source, npy) else "test"
        todo = (
            f"Pass {type(source).__name__}({train.path.name!r}, {kind}='FILE')."
            if alone
            else "Name them x_train, y_train."
        )
        raise DataError(who, wrong, todo)
    parts = as_split(f"{who} (train)", *train.parts[name]()), as_split(f"{who} (test)", *of.parts[tested]())
    labels = parts[0].y
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low == 1 and classes is None:
        wrong = f"labels count from 1 to {high}, and are to count from 0"
        raise DataError(
            f"{who} (train)", wrong, f"Subtract 1, or pass classes={high + 1}, if class 0 is without images."
        )
    names = train.class_names or of.class_names
    return _image_data(source, who, *parts, classes or max(high + 1, len(names or ())), names)
