"""Image files: decoded to bytes, resized and cropped where that is wanted, at once or batch by batch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from robustmail.data.dataset import Split, tensor_hash
from robustmail.errors import DataError, did_you_mean, in_brief
from robustmail.text import plural

__all__ = [
    "FORMATS",
    "ImageFiles",
    "LabelledImages",
    "Preprocess",
    "StreamedSplit",
    "alike",
    "batches",
    "data_fingerprint",
    "hash_data",
    "pixels",
]

T = TypeVar("T")

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "GIF", "WEBP")  # no other decoder is tried: some start programs
BYTES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "LAB", "HSV")  # PIL's modes of 8 bits
GREY = ("1", "L")
ORIENTATION = 0x0112  # EXIF
BATCH = 64  # images that are hashed together
LARGEST = 8192  # side of an image in pixels
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocess:
    """What is done to an image before it is evaluated: torchvision's Resize, then its CenterCrop, on the PIL image.

    resize: the shorter side in pixels, or None. crop: the side of the square in the centre, or None. interpolation: of
    the resizing, one of INTERPOLATIONS. squash: resize both sides to `resize`, so that the ratio of the sides is lost.
    Raises DataError: sides that are not positive, or another interpolation.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self) -> None:
        for name, side in {"--resize": self.resize, "--crop": self.crop}.items():
            if side is not None and not 1 <= side <= LARGEST:
                raise DataError(f"{name} {side}", f"expected 1 ... {LARGEST} pixels")
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(f"interpolation {self.interpolation!r}", "no such interpolation",
                            did_you_mean(self.interpolation, INTERPOLATIONS))  # fmt: skip
        if self.resize and self.crop and self.crop > self.resize:
            raise DataError(f"--resize {self.resize} --crop {self.crop}", "the crop is larger than the resized image")

    def __str__(self) -> str:
        sides = "both sides" if self.squash else "shorter side"
        resized = f"{sides} resized to {self.resize} ({self.interpolation})" if self.resize else ""
        return ", ".join(filter(None, [resized, f"centre {self.crop} x {self.crop}" if self.crop else ""]))

    def __call__(self, image: Any) -> Any:
        """The PIL image resized and cropped. Raises ValueError for one that is smaller than the crop."""
        from torchvision.transforms import InterpolationMode, functional

        if self.resize:
            size = [self.resize, self.resize] if self.squash else [self.resize]
            image = functional.resize(image, size, InterpolationMode(self.interpolation))
        if self.crop:
            if self.crop > min(image.size):  # torchvision would frame it in black
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, smaller than the crop of {self.crop}")
            image = functional.center_crop(image, [self.crop, self.crop])
        return image

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of every image, or None where it depends on the image."""
        side = self.crop or (self.resize if self.squash else None)
        return (side, side) if side else None


class _Header(NamedTuple):
    """What a file says of its image before it is decoded."""

    size: tuple[int, int]
    """(height, width)"""
    grey: bool
    upright: bool


class _Form(NamedTuple):
    """What all images of a data set have in common once they are decoded."""

    grey: bool
    size: tuple[int, int]
    """(height, width)"""


@dataclass(frozen=True)
class ImageFiles:
    """[N, C, H, W] uint8 images in files, decoded when they are indexed; all are grey, or all have three channels.

    who: the data, for errors. files: paths, [N]. preprocess: what is done to each image, or None. form: of the data set
    that the files are a part of; without it, the headers of these files tell.
    Its methods raise DataError, naming the file: damaged, of more than 8 bits, or of another size than the others.
    """

    who: str
    files: tuple[Path, ...]
    preprocess: Preprocess | None = None
    form: _Form | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, which: slice | Tensor | int) -> Tensor:
        """The images at a place, at places [M], or in a slice, decoded."""
        if isinstance(which, int):
            return self._decode([self.files[which]])[0]
        if isinstance(which, Tensor) and which.ndim == 0:
            return self._decode([self.files[int(which)]])[0]
        return self._decode(self.take(which).files)

    def take(self, which: slice | Tensor) -> ImageFiles:
        """The files at places [M] or in a slice; nothing is decoded."""
        if isinstance(which, slice):
            return replace(self, files=self.files[which])
        if which.dtype == torch.bool:
            which = which.nonzero().flatten()
        return replace(self, files=tuple(self.files[i] for i in which.tolist()))

    def as_whole(self) -> ImageFiles:
        """The same as a whole data set: all that is taken from it has its channels, and no header is read again."""
        return replace(self, form=self._form)

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W], after the preprocessing; the headers of the files are read."""
        return torch.Size((len(self.files), 1 if self._form.grey else 3, *self._form.size))

    @cached_property
    def sizes(self) -> dict[tuple[int, int], Path]:
        """The different sizes (height, width) of the images as stored, each with its first file."""
        found: dict[tuple[int, int], Path] = {}
        for file, header in zip(self.files, self._headers, strict=True):
            found.setdefault(header.size, file)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said of the images, in sentences."""
        turned = [file for file, header in zip(self.files, self._headers, strict=True) if not header.upright]
        exif_notes = (
            [f"EXIF would turn {plural(len(turned), 'image')}, such as {turned[0]}: read as stored"] if turned else []
        )
        return (*([f"images: {self.preprocess}"] if self.preprocess else []), *exif_notes)

    @cached_property
    def _headers(self) -> tuple[_Header, ...]:
        return tuple(_in_threads(lambda file: _read_image(self.who, file, partial(_header, str(file))), self.files))

    @cached_property
    def _form(self) -> _Form:
        return self.form or _Form(all(header.grey for header in self._headers), self._size())

    def _size(self) -> tuple[int, int]:
        if self.preprocess and self.preprocess.size:
            return self.preprocess.size
        (first, file), *others = self.sizes.items()
        if others:
            wrong = f"images differ in size: {list(first)} and {list(others[0][0])}, {file} and {others[0][1]}"
            raise DataError(self.who, wrong, "Pass --resize 256 --crop 224, or resize them beforehand.")
        if self.preprocess is None:
            return first
        height, width = self._decode_one(file).shape[:2]
        return height, width

    def _decode(self, files: Sequence[Path]) -> Tensor:
        found = _in_threads(self._decode_one, files)
        grey, size = self._form
        if odd := next((k for k, image in enumerate(found) if image.shape[:2] != size), None):
            wrong = f"the image {files[odd]} is {list(found[odd].shape[:2])}, expected {list(size)}"
            raise DataError(self.who, wrong, "Has it changed since?")
        stacked = torch.from_numpy(np.stack(found if grey else [_coloured(image) for image in found]))
        return stacked[:, None] if grey else stacked.permute(0, 3, 1, 2).contiguous()

    def _decode_one(self, file: Path) -> Any:
        return _read_image(self.who, file, lambda image: pixels(str(file), image, self.preprocess))


class StreamedSplit(NamedTuple):
    """Some images on disk and their labels: as `Split`, but decoded batch by batch, so that memory stays flat."""

    x: ImageFiles
    """[N, C, H, W] uint8"""
    y: Tensor
    """[N] int64"""

    def first(self, n: int | None) -> StreamedSplit:
        """The first n images in the data set's own order, or all."""
        return self if n is None else StreamedSplit(self.x.take(slice(n)), self.y[:n])

    def take(self, index: Tensor) -> StreamedSplit:
        """The images at places [M], or where a mask [N] is true."""
        return StreamedSplit(self.x.take(index), self.y[index])

    def loaded(self) -> Split:
        """The same in memory."""
        return Split(self.x[:], self.y)


LabelledImages = Split | StreamedSplit
"""images and labels, in memory or on disk: the same fields and methods"""


def batches(x: Tensor | ImageFiles) -> Iterator[Tensor]:
    """All images, a few at a time, in order."""
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH]


def data_fingerprint(part: LabelledImages) -> str:
    """A hash of images and labels."""
    return hash_data(part, lambda images: None)


def hash_data(part: LabelledImages, visit: Callable[[Tensor], object]) -> str:
    """The fingerprint of images and labels; `visit` is called with every batch, as images on disk are read but once."""

    def visited() -> Iterator[Tensor]:
        for images in batches(part.x):
            visit(images)
            yield images

    return tensor_hash(visited())[:8] + tensor_hash(part.y)[:8]


def alike(images: list[Any]) -> list[Any]:
    """Arrays [H, W] or [H, W, 3], all grey or all coloured: grey ones among coloured ones become coloured."""
    if all(image.ndim == 2 for image in images):
        return images
    return [_coloured(image) for image in images]


def _coloured(image: Any) -> Any:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)


def pixels(who: str, image: Any, preprocess: Preprocess | None = None) -> Any:
    """A PIL image as bytes, [H, W] if it is grey, else [H, W, 3]; preprocess: what is done to it before.

    Raises DataError for more than 8 bits, or an image smaller than the crop.
    """
    _check_mode(who, image)
    image = image.convert("L" if image.mode in GREY else "RGB")
    try:
        return np.array(preprocess(image) if preprocess else image)
    except ValueError as error:
        raise DataError(who, f"an image has {error}", "Pass --resize too.") from error


def _read_image(who: str, file: Path, read: Callable[[Any], T]) -> T:
    """What `read` makes of the PIL image in a file, of which only the header has been read."""
    from PIL import Image

    if not file.is_file():  # a pipe would be waited for
        raise DataError(who, f"the image {file} is no file")
    try:
        with Image.open(file, formats=FORMATS) as image:
            return read(image)
    except DataError:
        raise
    except Exception as error:  # a damaged image fails in a dozen ways
        raise DataError(who, f"the image {file} cannot be read ({in_brief(error)})") from error


def _check_mode(who: str, image: Any) -> None:
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # which is a photograph with its preview
        raise DataError(who, f"an image has {image.n_frames} frames", "Save one of them.")
    if image.mode not in BYTES:
        raise DataError(who, f"an image has pixels of mode {image.mode}", "Save it with 8 bits.")


def _header(who: str, image: Any) -> _Header:
    _check_mode(who, image)
    orientation = 1
    with suppress(Exception):  # EXIF may be damaged where the image is not
        orientation = image.getexif().get(ORIENTATION, 1)
    return _Header(image.size[::-1], image.mode in GREY, orientation in (0, 1))


def _in_threads(function: Callable[[Path], T], files: Sequence[Path]) -> list[T]:
    """The function of every file, in order; PIL decodes without Python's lock, and its warnings are of no use here."""
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, files))
