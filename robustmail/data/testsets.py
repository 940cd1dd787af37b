"""Images to evaluate on: of a file or folder that need not have any to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from robustmail.data import sources
from robustmail.data.dataset import ImageData, Split, in_turn
from robustmail.data.image_files import ImageFile, open_file, open_folder
from robustmail.data.image_folders import read_images, to_evaluate, wordnet_names
from robustmail.data.torchvision_sets import layout_of
from robustmail.errors import DataError

__all__ = ["TestSet", "from_file", "from_image_data", "from_path"]


@dataclass(frozen=True)
class TestSet:
    """Labelled images to evaluate on.

    name: of the data. part: images and labels in the data set's own order, uint8 or floats in [0, 1]. classes: number
    of classes. class_names: one per class, if known. given: what was passed to --data. notes: how they were read, if
    that could have been otherwise, in sentences.
    """

    __test__ = False  # for pytest, which takes it for a test

    name: str
    part: Split
    classes: int
    class_names: tuple[str, ...] | None = None
    given: str | None = None
    notes: tuple[str, ...] = ()

    def class_name(self, number: int) -> str:
        """ "cat", or "class 3" where names are not known."""
        names = self.class_names or ()
        return names[number] if number < len(names) else f"class {number}"

    def first(self, n: int | None) -> TestSet:
        """The first n images. Raises DataError where there are fewer."""
        count = len(self.part.y)
        if n is not None and n > count:
            raise DataError(f"{self.name} (given n={n})", f"has {count} images", f"Pass --n {count}, or leave it out.")
        return replace(self, part=self.part.first(n))

    def class_warning(self, whole: TestSet) -> str:
        """A warning if the first n images have far fewer classes than the whole set, else ""; whole: the set they are
        of."""
        n, classes, all_classes = len(self.part.y), len(self.part.y.unique()), len(whole.part.y.unique())
        if 2 * classes >= min(n, all_classes):
            return ""
        why = ": the set is sorted" if bool((whole.part.y.diff() >= 0).all()) else ""
        return f"the first {n:,} images have {classes} of the {all_classes} classes{why}"


def from_image_data(images: ImageData) -> TestSet:
    """The test part of a recipe's data."""
    return TestSet(images.name, images.test, images.classes, images.class_names)


def from_path(path: Path) -> TestSet:
    """The images of a file, an image folder, a folder of parquet files, or one that torchvision's data lie in.

    An npz file has the keys x_test and y_test; or image, label; or data, targets; ... Labels lie beside an npy file.
    The folder has test/<class>/, else val/<class>/, else <class>/; of its images come the first of each class, then
    the second of each, and so on. Raises DataError: not found, damaged, images outside [0, 1], or a folder whose
    classes are ambiguous.
    """
    who = str(path)
    if layout := layout_of(who, path):
        name, root = layout
        found = from_image_data(getattr(sources, name)(str(root))(download=False))
        return replace(found, notes=(f"read as {name}('{root}')",))
    if file := open_folder(who, path) if path.is_dir() else open_file(who, path):
        return from_file(file)
    listing = to_evaluate(who, path)
    part, said = read_images(who, listing)
    names = wordnet_names(listing)
    return TestSet(str(listing.folder), in_turn(part), len(names), names, notes=(*listing.notes, *said))


def from_file(file: ImageFile) -> TestSet:
    """The images of a file to evaluate on. Raises DataError as `from_path`."""
    who, part = file.name, file.evaluated()
    low, high = int(part.y.min()), int(part.y.max())
    if low < 0:
        raise DataError(who, f"has the label {low}", "Labels are 0, 1, 2, ...; -1 is what images without one have.")
    names = file.class_names
    if names and high >= len(names):
        raise DataError(who, f"has the label {high}, and names of {len(names)} classes", "Labels are 0, 1, 2, ...")
    notes = [f"no image is of class 0: labels are to count from 0, and span 1 ... {high}"] if low == 1 else []
    _, channels, height, width = part.x.shape
    if channels in (1, 3) and width in (1, 3, 4):  # either may be the channels
        notes.append(f"images are read as [N, C, H, W], {channels} channels of {height} x {width} pixels")
    return TestSet(who, part, len(names) if names else high + 1, names, notes=tuple(notes))
