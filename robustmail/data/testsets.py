"""Images to evaluate on: of a file or folder that need not have any to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from robustmail.data.images import Images, Part
from robustmail.data.sources import as_part, read_arrays, read_folder
from robustmail.errors import DataError

__all__ = ["TestSet", "of_images", "of_path"]

PAIRS = (("x_test", "y_test"), ("x", "y"), ("images", "labels"), ("data", "targets"))


@dataclass(frozen=True)
class TestSet:
    """Some images in the data set's own order, uint8 or floats in [0, 1], and what is known of them."""

    __test__ = False  # for pytest, which takes it for a test

    name: str
    part: Part
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


def of_images(images: Images) -> TestSet:
    """The test part of a recipe's data."""
    return TestSet(images.name, images.test, images.classes, images.class_names)


def of_path(path: Path) -> TestSet:
    """An npz file (x_test, y_test; or x, y; images, labels; data, targets), or a folder with test/<class>/ or <class>/.

    Raises DataError: no such thing, damaged, or with images outside [0, 1].
    """
    who = str(path)
    if path.is_dir():
        part, names = read_folder(who, path / "test" if (path / "test").is_dir() else path)
        return TestSet(who, part, len(names), tuple(names))
    arrays, there = read_arrays(who, path, tuple(name for pair in PAIRS for name in pair))
    pair = next((pair for pair in PAIRS if all(name in arrays for name in pair)), None)
    if pair is None:
        wanted = " or ".join(", ".join(pair) for pair in PAIRS)
        raise DataError(who, f"has {', '.join(there) or 'nothing'}", f"Its keys must be {wanted}.")
    part = as_part(who, arrays[pair[0]], arrays[pair[1]], floats=True)
    if len(part.x) != len(part.y) or not len(part.y):
        raise DataError(who, f"has {len(part.x)} images and {len(part.y)} labels")
    if int(part.y.min()) < 0:
        raise DataError(who, f"has the label {int(part.y.min())}", "Labels are 0, 1, 2, ...")
    return TestSet(who, part, int(part.y.max()) + 1)
