"""The data sets of torchvision as tensors: constructed, downloaded and checked by torchvision, read here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustmail.data.dataset import Split
from robustmail.data.image_arrays import as_split
from robustmail.data.image_files import Preprocess, alike, pixels
from robustmail.errors import DataError, RecipeError, did_you_mean, in_brief

__all__ = ["LAYOUTS", "NotDownloadedError", "check_name", "layout_of", "no_downloads", "read_torchvision"]

LAYOUTS = {"cifar-10-batches-py": "cifar10", "cifar-100-python": "cifar100", "MNIST/raw": "mnist",
           "FashionMNIST/raw": "fashion_mnist", "stl10_binary": "stl10", "gtsrb/GTSRB": "gtsrb",
           "test_32x32.mat": "svhn"}  # fmt: skip
"""what torchvision makes in its root, and the source that reads it"""
TESTS = ("test", "val", "valid")  # the splits to evaluate on, the first that a set has
OTHERS = ("ImageFolder", "DatasetFolder", "FakeData", "VisionDataset")  # no data of their own


_OFFLINE: ContextVar[bool] = ContextVar("offline", default=False)


class NotDownloadedError(DataError):
    """The files of a data set are not there, and may not be downloaded now."""


@contextmanager
def no_downloads() -> Iterator[None]:
    """Inside the block, data that would be downloaded raise NotDownloadedError."""
    token = _OFFLINE.set(True)
    try:
        yield
    finally:
        _OFFLINE.reset(token)


def layout_of(who: str, path: Path) -> tuple[str, Path] | None:
    """(source, root) of a folder or file that torchvision's data lie in; None for another.

    Raises DataError for a folder with the data of several.
    """
    for marker, source in LAYOUTS.items():
        first = marker.split("/")[0]
        if path.name == first and (path.parent / marker).exists():
            return source, path.parent
    found = {source: marker for marker, source in LAYOUTS.items() if (path / marker).exists()}
    if len(found) > 1:
        wrong = f"has the data of {', '.join(found)}"
        raise DataError(who, wrong, f"Pass one of them: \"{next(iter(found))}('{path}')\".")
    return next(((source, path) for source in found), None)


def check_name(who: str, name: str) -> None:
    """Refuse a name that no labelled data set of torchvision has (raises RecipeError, with the nearest)."""
    from torchvision import datasets

    if name not in datasets.__all__ or name in OTHERS:
        todo = "Write image_folder('DIR')." if name in OTHERS else did_you_mean(name, set(datasets.__all__) - {*OTHERS})
        raise RecipeError(who, f"torchvision has no data set {name!r}", todo or "See torchvision.datasets.")


def read_torchvision(
    who: str,
    name: str,
    root: str,
    download: bool = True,
    split: str | None = None,
    preprocess: Preprocess | None = None,
) -> tuple[Split, Split, tuple[str, ...] | None]:
    """(training images, test images, names of the classes) of a torchvision data set.

    who: the source, for errors. name: of the class in torchvision.datasets. root: where its files are, or go. download:
    whether those that are missing may be downloaded. split: its subset, where it has one beside train and test, such
    as EMNIST's "letters". preprocess: of each image. Raises DataError: missing,
    damaged, without a network, images that differ in size, or targets that are no classes.
    """
    from torchvision import datasets

    kind = getattr(datasets, name)
    offline = _OFFLINE.get()
    new = not Path(root).exists()
    try:
        train, test = _constructed(who, kind, root, download and not offline, split)
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError, TypeError, KeyError) as error:
        if new:
            _remove_empty(Path(root))
        refusal = _refusal(who, name, root, error)
        if offline and download and "not found" in str(error):
            raise NotDownloadedError(who, "its files are not there", refusal.todo) from error
        raise refusal from error
    names = getattr(train, "classes", None)
    parts = [_part(f"{who} ({part})", data, preprocess) for part, data in {"train": train, "test": test}.items()]
    if not isinstance(names, (list, tuple)) or len(names) <= int(parts[0].y.max()):
        return parts[0], parts[1], None
    return parts[0], parts[1], tuple(re.sub(r"^(\d) - .*", r"\1", str(name)) for name in names)  # MNIST's "7 - seven"


def _constructed(who: str, kind: Any, root: str, download: bool, split: str | None) -> tuple[Any, Any]:
    """The training and the test set, however the class calls them."""
    knobs = _knobs(kind)
    fixed: dict[str, Any] = {"download": download} if "download" in knobs else {}
    if "train" in knobs:
        if "split" in knobs and split is None:
            raise RecipeError(who, f"{kind.__name__} has several subsets", "Name one with split=, such as 'letters'.")
        fixed |= {"split": split} if "split" in knobs else {}
        return kind(root, train=True, **fixed), kind(root, train=False, **fixed)
    if "split" not in knobs:
        todo = "Split it yourself, and pass robustmail.dataset(train, test) in Python."
        raise DataError(who, f"{kind.__name__} has no training and test images of its own", todo)
    train = kind(root, split="train", **fixed)
    for name in TESTS:
        try:
            return train, kind(root, split=name, **fixed)
        except ValueError as error:
            if "Unknown value" not in str(error):  # which names the splits that there are
                raise
    raise DataError(who, f"{kind.__name__} has none of the splits {', '.join(TESTS)}")


def _knobs(kind: type) -> set[str]:
    """The parameters of a class, with those that it hands on to its base as **kwargs."""
    found: set[str] = set()
    for one in kind.__mro__:
        if "__init__" in vars(one):
            knobs = inspect.signature(one).parameters
            found |= knobs.keys()
            if all(knob.kind is not knob.VAR_KEYWORD for knob in knobs.values()):
                break
    return found


def _refusal(who: str, name: str, root: str, error: Exception) -> DataError:
    """What torchvision's error means, and what to do."""
    message = str(error).replace("You can use download=True to download it", "").strip()
    put = f"Connect to the network, put torchvision's {name} files into {root}, or use data=npz('FILE')."
    if isinstance(error, OSError) or message.startswith("Error downloading"):
        return DataError(who, f"cannot be read or downloaded ({message})", put)
    if message == "Dataset not found.":
        return DataError(who, "its files are not there", put)
    if isinstance(error, TypeError) or "Unknown value" in message:
        wrong = f"{name} has more than training and test images ({message})"
        return DataError(who, wrong, "Make both yourself, and pass robustmail.dataset(train, test) in Python.")
    if any(word in message for word in ("install", "externally")):
        return DataError(who, f"torchvision cannot read {name} ({message})")
    message = message if type(error) is RuntimeError else in_brief(error)
    return DataError(who, f"damaged: {message}", f"Delete torchvision's {name} files in {root}.")


def _remove_empty(root: Path) -> None:
    """Remove the empty folders that torchvision has made."""
    for folder in [*sorted((f for f in root.rglob("*") if f.is_dir()), reverse=True), root]:
        with suppress(OSError):
            folder.rmdir()


def _part(who: str, data: Any, preprocess: Preprocess | None) -> Split:
    """Images and labels: as arrays where the set has them in memory, else item by item."""
    x, y = getattr(data, "data", None), getattr(data, "targets", getattr(data, "labels", None))
    if preprocess is None and isinstance(x, (np.ndarray, torch.Tensor)) and y is not None:
        return as_split(who, np.asarray(x), np.asarray(y))
    images: list[Any] = []
    labels: list[int] = []
    for i in range(len(data)):
        try:
            image, label = data[i]
        except Exception as error:  # of any kind, from its decoder
            raise DataError(who, f"image {i} cannot be read ({in_brief(error)})") from error
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise DataError(who, f"its targets are {type(label).__name__}, no classes")
        images.append(pixels(who, image, preprocess))
        labels.append(int(label))
        if images[-1].shape[:2] != images[0].shape[:2]:
            first, other = list(images[0].shape[:2]), list(images[-1].shape[:2])
            raise DataError(who, f"images differ in size: {first} and {other}", "Pass size=, such as size=224.")
    if not images:
        raise DataError(who, "there are no images")
    return as_split(who, np.stack(alike(images)), np.array(labels))
