"""Images to evaluate on: of a file or folder that need not have any to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from robustmail.data import sources
from robustmail.data.array_files import open_file, open_folder
from robustmail.data.dataset import ImageData, in_turn
from robustmail.data.image_arrays import ImageFile
from robustmail.data.image_files import LabelledImages, Preprocess, StreamedSplit
from robustmail.data.image_folders import class_folders, stream_images, to_evaluate, wordnet_names
from robustmail.data.torchvision_sets import layout_of
from robustmail.errors import DataError

__all__ = ["TestSet", "from_class_folders", "from_file", "from_image_data", "from_path"]


@dataclass(frozen=True)
class TestSet:
    """Labelled images to evaluate on.

    name: of the data. part: images and labels in the data set's own order, uint8 or floats in [0, 1]. classes: number
    of classes. class_names: one per class, if known. given: what was passed to --data. notes: how they were read, if
    that could have been otherwise, in sentences.
    """

    __test__ = False  # for pytest, which takes it for a test

    name: str
    part: LabelledImages
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

    def first_at_most(self, n: int) -> TestSet:
        """The first n images, or all where there are fewer."""
        return self.first(min(n, len(self.part.y)))

    @property
    def preprocess(self) -> Preprocess | None:
        """What is done to each image when it is decoded; None for arrays, and for images that are read as stored."""
        return self.part.x.preprocess if isinstance(self.part, StreamedSplit) else None

    def checked(self, default: Preprocess | None = None, fixed: bool = False) -> TestSet:
        """The same, once the headers of image files have been read.

        default: the preprocessing that the model's pretrained configuration has; it is used where images differ in
        size, or where the model takes only that size (`fixed`) and no other preprocessing was asked for.
        Raises DataError: a file cannot be read, or images differ in size and nothing says how to resize them.
        """
        if not isinstance(self.part, StreamedSplit):
            return self
        files, notes = self.part.x, self.notes
        if default and not files.preprocess and (len(files.sizes) > 1 or (fixed and default.size not in files.sizes)):
            files = replace(files, preprocess=default)
            notes = (*notes, "that is the model's pretrained configuration; --resize and --crop replace it")
        part = StreamedSplit(files.as_whole(), self.part.y)
        return replace(self, part=part, notes=(*files.notes, *notes))

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


def from_class_folders(folder: Path, like: TestSet) -> TestSet:
    """The images of folders that are classes, numbered as in `like`, the first of each class first.

    Raises DataError: the folders are not the classes of `like`, so that their numbers are in doubt.
    """
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    listing = class_folders(str(folder), folder, like.class_names if names <= set(like.class_names or ()) else None)
    if len(listing.classes) != like.classes:
        wrong = f"has {len(listing.classes)} classes of {like.classes}, whose numbers are in doubt"
        raise DataError(str(folder), wrong, "Pass --data with a folder that names all classes.")
    files = stream_images(str(folder), listing)
    return TestSet(str(folder), files.take(in_turn(files.y)), like.classes, listing.classes, notes=listing.notes)


def from_path(path: Path, preprocess: Preprocess | None = None) -> TestSet:
    """The images of a file, an image folder, a folder of parquet files, or one that torchvision's data lie in.

    An npz file has the keys x_test and y_test; or image, label; or data, targets; ... Labels lie beside an npy file.
    The folder has test/<class>/, else val/<class>/, else <class>/; of its images come the first of each class, then
    the second of each, and so on. Raises DataError: not found, damaged, images outside [0, 1], or a folder whose
    classes are ambiguous.
    """
    who = str(path)
    layout = layout_of(who, path)
    file = None if layout else open_folder(who, path) if path.is_dir() else open_file(who, path)
    if (layout or file) and preprocess is not None:
        raise DataError(who, "holds arrays, and --resize and --crop are for image files",
                        "Put the resizing into the network: --model file.py:factory.")  # fmt: skip
    if layout:
        name, root = layout
        found = from_image_data(getattr(sources, name)(str(root))(download=False))
        return replace(found, notes=(f"read as {name}('{root}')",))
    if file:
        return from_file(file)
    listing = to_evaluate(who, path)
    files, names = stream_images(who, listing, preprocess), wordnet_names(listing)
    return TestSet(str(listing.folder), files.take(in_turn(files.y)), len(names), names, notes=listing.notes)


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
