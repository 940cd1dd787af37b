"""Data sources that read files: arrays, parquet files and folders of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustmail.data.array_files import open_file, open_folder
from robustmail.data.dataset import ImageData, in_turn
from robustmail.data.image_arrays import ImageFile, as_split
from robustmail.data.image_folders import stream_images, to_train, wordnet_names
from robustmail.data.source_values import check_knobs, image_data, square
from robustmail.errors import DataError

__all__ = ["image_folder", "npy", "npz", "parquet", "tiny_imagenet"]


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
        check_knobs(self)

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
        check_knobs(self)

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
        check_knobs(self)

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
        check_knobs(self)

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
        check_knobs(self)

    def __call__(self) -> ImageData:
        return _folder(self, f"tiny_imagenet({self.path!r})")


def _folder(source: Any, who: str) -> ImageData:
    listings = to_train(who, Path(source.path))
    preprocess = square(getattr(source, "size", None))
    parts = [stream_images(who, listing, preprocess).loaded() for listing in listings]
    channels = max(part.x.shape[1] for part in parts)  # all grey in one split alone is no reason to refuse
    train, test = (part._replace(x=part.x.expand(-1, channels, -1, -1).contiguous()) for part in parts)
    names = wordnet_names(listings[0])
    return image_data(source, who, train, test.take(in_turn(test.y)), len(names), names)


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
    return image_data(source, who, *parts, classes or max(high + 1, len(names or ())), names)
