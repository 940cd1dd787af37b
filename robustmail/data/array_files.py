"""Files of labelled images: npz, npy beside its labels, and parquet as Hugging Face has it, alone or in shards.

What a file is follows from its first bytes, not from its name; which array is what follows from the names in it:

    x_test, y_test; train_images, train_labels; ...   the splits of one file, in any letter case
    image, label; data, targets; arr_0, arr_1; ...    one pair
    train-00000-of-00002.parquet, test-...            the splits of a folder

Nothing that is opened runs code: arrays of Python objects, which are pickles, are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.data.image_arrays import (
    IMAGE,
    KEYS,
    LABEL,
    NAMES,
    ImageFile,
    Pair,
    T,
    class_names_of,
    file_label,
    pairs_of,
    words_in,
)
from robustmail.data.image_folders import IMAGES, SPLITS
from robustmail.data.mapped_arrays import map_member, map_npy
from robustmail.data.parquet_files import open_parquet, shards_by_split
from robustmail.errors import DataError
from robustmail.runtime.untrusted import check_unpacked, printable

__all__ = ["open_file", "open_folder"]

KINDS = {b"PK": "zip", b"\x93NUMPY": "npy", b"PAR1": "parquet", b"\x1f\x8b": "a gzip-compressed file",
         b"\x89HDF": "an HDF5 file", b"MATLAB": "a MATLAB file", b"ARROW1": "an Arrow file", b"\x80": "a pickle",
         b"BZh": "a bzip2-compressed file", b"\xfd7zXZ": "an xz-compressed file"}  # fmt: skip
TODO = {
    "a gzip-compressed file": "Unpack it with gunzip.",
    "a bzip2-compressed file": "Unpack it with bunzip2.",
    "an xz-compressed file": "Unpack it with unxz.",
    "a pickle": "A pickle may run any code: save its arrays with numpy.savez, or write cifar10('DIR') for CIFAR's own.",
    "an Arrow file": "Save the data set with to_parquet, or pass it to robustmail.evaluate.",
}


def open_file(who: str, path: Path, labels: Path | None = None) -> ImageFile:
    """A file of images: npz, parquet, or npy with labels beside it.

    who: the data, for errors. labels: of an npy file; by default labels.npy, y.npy and their kin beside it. Raises
    DataError: not found, damaged, of another kind, or without images and labels under known names.
    """
    if not path.is_file():
        raise DataError(who, "no such file" if labels is None else f"no such file as {path}")
    kind = _kind(path)
    if kind == "npy" and path.suffix.lower() != ".npz":
        return _npy(who, path, labels)
    if kind == "parquet":
        return open_parquet(who, path, {"": [path]})
    return _npz(who, path, kind)


def open_folder(who: str, folder: Path, depth: int = 4) -> ImageFile | None:
    """The parquet files of a folder, of data/ in it, or of its only folder; None for a folder without.

    Raises DataError for a folder of arrays, or of several data sets: it does not say which one is meant.
    """
    inner = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
    for tried in (folder, folder / "data"):
        if shards := _shards(tried):
            return open_parquet(who, folder, shards_by_split(who, shards))
    filled = [f for f in inner if _shards(f)]
    if filled and all(SPLITS.get(f.name.lower()) for f in filled):
        return open_parquet(who, folder, {SPLITS[f.name.lower()]: _shards(f) for f in filled})
    if len(filled) > 1:
        wrong = f"has parquet files in {', '.join(f.name for f in filled[:5])}"
        raise DataError(who, wrong, f"Pass one of them: {filled[0]}.")
    if len(inner) == 1 and depth:
        return open_folder(who, inner[0], depth - 1)
    if not inner:
        _check_folder(who, folder)
    return None


def _shards(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*.parquet") if f.name[0] != ".")


def _check_folder(who: str, folder: Path) -> None:
    """Refuse a folder that holds files of arrays, or MNIST's own."""
    names = sorted(f.name for f in folder.iterdir() if f.name[0] != ".")
    if any(name.lower().endswith(IMAGES) for name in names):
        return
    arrays = [name for name in names if Path(name).suffix.lower() in (".npy", ".npz", ".arrow")]
    if arrays:
        wrong = f"is a folder of arrays: {', '.join(arrays[:5])}{' ...' if len(arrays) > 5 else ''}"
        images = [name for name in arrays if not set(words_in(name)) & set(LABEL)]
        is_arrow = arrays[0].endswith(".arrow")
        todo = TODO["an Arrow file"] if is_arrow else f"Pass one file of images: {folder / (images or arrays)[0]}."
        raise DataError(who, wrong, todo)
    if any(re.search(r"-idx\d-ubyte", name) for name in names):
        todo = (
            "Move its files into ROOT/MNIST/raw and pass mnist('ROOT'), or FashionMNIST/raw and fashion_mnist('ROOT')."
        )
        raise DataError(who, f"is a folder of MNIST's own files, such as {names[0]}", todo)


def _kind(path: Path) -> str:
    """What a file is by its first bytes, or ""."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((kind for magic, kind in KINDS.items() if start.startswith(magic)), "")


# Names of arrays


# npz and npy


def _npz(who: str, path: Path, kind: str) -> ImageFile:
    keys = _in_archive(who, path, kind, lambda file: list(file))
    pairs = pairs_of(who, keys)
    there = ", ".join(printable(key) for key in keys[:20]) or "nothing"
    if not pairs and keys and not any(name.endswith(".npy") for name in _in_archive(who, path, kind, _members)):
        is_torch = any(key.endswith("data.pkl") for key in keys)
        todo = "Save its arrays with numpy.savez." if is_torch else "Unpack it, and pass the folder."
        raise DataError(who, f"is {'a file of torch' if is_torch else 'a zip archive'} with {there}", todo)
    if not pairs:
        raise DataError(who, f"has {there}", f"Its keys must be {KEYS}, or the like.")

    def read(names: tuple[str, ...], mapped: bool = False) -> Any:
        array = partial(map_member, who, path) if mapped else lambda file, name: np.asarray(file[name])
        return _in_archive(who, path, kind, lambda file: tuple(array(file, name) for name in names))

    named = next((key for wanted in NAMES for key in keys if key.lower() == wanted), None)
    names = class_names_of(*read((named,))) if named else None
    return ImageFile(who, path, {split: partial(read, pair) for split, pair in pairs.items()}, names, there)


def _members(file: Any) -> list[str]:
    return list(file.zip.namelist())


def _in_archive(who: str, path: Path, kind: str, work: Callable[[Any], T]) -> T:
    """What `work` makes of an npz file that announces no more than it holds."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            check_unpacked(file.zip, path.stat().st_size)
            return work(file)
    except DataError:
        raise
    except Exception as error:  # a damaged archive fails in a dozen ways, from zlib's to the tokenizer's
        if "Object arrays" in str(error):
            todo = "Save plain arrays of numbers with numpy.savez."
            raise DataError(who, "not a readable npz file: an array of it holds Python objects", todo) from error
        why = "" if "pickle" in str(error) else f" ({error})"  # numpy takes what it does not know for a pickle
        todo = "It is truncated, damaged, or another kind."
        if kind not in ("", "zip"):
            todo = TODO.get(kind, f"It is {kind}." if kind != "npy" else "It is a single array: call it .npy.")
            why = f": it is {kind}" if kind in TODO else ""
        called = path.suffix.lower().lstrip(".")
        wrong = f"not a readable {called if called in ('npy', 'parquet') else 'npz'} file{why}"
        raise DataError(who, wrong, todo) from error


def _npy(who: str, path: Path, labels: Path | None) -> ImageFile:
    beside = labels or _labels_beside(who, path)
    names = path.with_name("class_names.npy")
    found = class_names_of(_array(who, names)) if names.is_file() else None

    def read(mapped: bool = False) -> Pair:
        return _array(who, path, mapped), _array(who, beside)

    return ImageFile(who, path, {"": read}, found, f"{path.name}, {beside.name}")


def _labels_beside(who: str, path: Path) -> Path:
    """x_test.npy -> y_test.npy; images.npy -> labels.npy, y.npy, ...; a lone *_labels.npy."""
    stem = path.stem
    swapped = [re.sub(rf"(?<![A-Za-z]){image}(?![A-Za-z])", label, stem, flags=re.IGNORECASE)
               for image in IMAGE for label in LABEL]  # fmt: skip
    tried = [name for name in swapped if name != stem] + [f"{stem}_{label}" for label in LABEL] + list(LABEL)
    there = {f.stem.lower(): f for f in sorted(path.parent.glob("*.npy")) if f != path}
    if found := next((there[name.lower()] for name in tried if name.lower() in there), None):
        return found
    ends = [f for f in there.values() if f.stem.lower().endswith(("_labels", "_targets", "_y"))]
    if len(ends) == 1:
        return ends[0]
    wrong = f"has images, and no labels lie beside it (labels.npy, y.npy, {stem}_labels.npy)"
    raise DataError(who, wrong, f"Pass both: npy({str(path)!r}, 'LABELS.npy').")


def _array(who: str, path: Path, mapped: bool = False) -> Any:
    """The array of an npy file; mapped: left on disk."""
    from numpy.lib import format as npy

    if not path.is_file():
        raise DataError(who, f"no such file as {path}")
    try:
        with open(path, "rb") as file:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            size = path.stat().st_size - file.tell()
            if dtype.hasobject:
                raise DataError(
                    file_label(who, path), "holds Python objects, a pickle", "Save plain arrays of numbers."
                )
            if (announced := math.prod(shape) * dtype.itemsize) > size:
                raise ValueError(f"it announces {announced:,} bytes and has {size:,}")
            file.seek(0)
            return map_npy(path, file) if mapped else np.load(file, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:
        kind = _kind(path)
        todo = "It is truncated, or damaged." if kind in ("npy", "") else TODO.get(kind, f"It is {kind}.")
        why = "" if "magic" in str(error) else f" ({error})"
        raise DataError(file_label(who, path), f"not a readable npy file{why}", todo) from error


# Parquet
