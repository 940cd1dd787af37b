"""Extra training images, such as those of a generative model, mixed into every batch of another data source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustmail.data.array_files import open_file, open_folder
from robustmail.data.dataset import Extra, ImageData, Split
from robustmail.data.file_sources import npy, npz, parquet
from robustmail.data.image_arrays import ImageFile
from robustmail.data.pickled_arrays import is_pickle, read_pickle
from robustmail.data.sources import subset
from robustmail.errors import DataError, RecipeError
from robustmail.fields import check_types, describe

__all__ = ["mixed", "tested_source"]

ExtraSource = str | Callable[[], Any]


@dataclass(frozen=True)
class mixed:
    """Another source with extra images, such as generated ones, mixed into every training batch.

    data: the source whose images are held out, validated and tested on, and whose augmentation all images get.
    extra: a source or the path of a file, or several; only training images are needed, image and label in an npz file.
    share: of a batch, in (0, 1]: int(share * batch) of its images are drawn from `extra`, with replacement.

    An epoch has ceil(n / batch) steps, n being the training images of `data`, and sees a share of these. Extra images
    in npy files and in uncompressed npz files stay on disk; those on disk or in memory are never copied to a GPU whole.
    Raises DataError where shape or classes of the extra images are not those of `data`.
    Source: Gowal et al., Improving Robustness using Generated Data, 2021; Wang et al., Better Diffusion Models Further
    Improve Adversarial Training, 2023.
    """

    data: Callable[[], Any]
    extra: ExtraSource | tuple[ExtraSource, ...]
    share: float = 0.7

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.extra, list):
            object.__setattr__(self, "extra", tuple(self.extra))
        if self.extra == ():
            raise RecipeError("mixed (given extra=())", "there is nothing to mix in", "Write extra='FILE.npz'.")
        if not 0 < self.share <= 1:
            raise RecipeError(f"mixed (given share={self.share:g})", "share must lie in (0, 1]", "Write share=0.7.")

    def __call__(self) -> ImageData:
        images: ImageData = self.data()
        if images.extra is not None:
            raise DataError(f"mixed({describe(self.data)})", "has extra images already", "Name all in extra=(A, B).")
        sources = self.extra if isinstance(self.extra, tuple) else (self.extra,)
        return replace(images, extra=Extra(tuple(_extra_part(source, images) for source in sources), self.share))


def tested_source(source: Callable[[], Any]) -> Callable[[], Any]:
    """The source without extra images, which has the same test images; itself where it has none."""
    if isinstance(source, mixed):
        return source.data
    if isinstance(source, subset) and (plain := tested_source(source.of)) is not source.of:
        return replace(source, of=plain)
    return source


def _extra_part(source: ExtraSource, images: ImageData) -> Split:
    """The training images of a source or a file; `images`: what they are mixed into."""
    if isinstance(source, str) and Path(source).is_file() and is_pickle(Path(source)):
        return read_pickle(source, Path(source))
    file = _file(source)
    if file is not None:
        _check_classes(file.name, len(file.class_names or ()) or images.classes, file.class_names, images)
        return file.trained()
    assert callable(source)
    found = source()
    if not isinstance(found, ImageData):
        raise DataError(f"extra={describe(source)}", f"returned {type(found).__name__}, not ImageData")
    _check_classes(found.name, found.classes, found.class_names, images)
    return found.train.to("cpu")


def _file(source: ExtraSource) -> ImageFile | None:
    """The file of a path, or of a source that is one; None for another source."""
    if isinstance(source, (npz, npy, parquet)):
        return source.trained()
    if not isinstance(source, str):
        return None
    path = Path(source)
    file = open_folder(source, path) if path.is_dir() else open_file(source, path)
    if file is None:
        raise DataError(source, "is a folder without parquet files", f"Write image_folder({source!r}).")
    return file


def _check_classes(who: str, classes: int, names: tuple[str, ...] | None, images: ImageData) -> None:
    """Refuse extra images of another number of classes, or of classes with other names."""
    if classes != images.classes:
        raise DataError(f"{who} (extra)", f"has {classes} classes, {images.name} has {images.classes}")
    pairs = zip(names or (), images.class_names or (), strict=False)
    if odd := next(((i, a, b) for i, (a, b) in enumerate(pairs) if a != b), None):
        number, name, expected = odd
        wrong = f"calls class {number} {name!r}, and {images.name} calls it {expected!r}"
        raise DataError(f"{who} (extra)", wrong, "Number its classes in the same order.")
