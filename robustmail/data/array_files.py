"""Files of labelled images: npz, npy beside its labels, and parquet as Hugging Face has it, alone or in shards.

What a file is follows from its first bytes, not from its name; which array is what follows from the names in it:

    x_test, y_test; train_images, train_labels; ...   the splits of one file, in any letter case
    image, label; data, targets; arr_0, arr_1; ...    one pair
    train-00000-of-00002.parquet, test-...            the splits of a folder

Nothing that is opened runs code: arrays of Python objects, which are pickles, are refused.
"""

from __future__ import annotations

import io
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from robustmail.data.dataset import Split, channels_first
from robustmail.data.image_files import FORMATS, alike, pixels
from robustmail.data.image_folders import IMAGES, SPLITS
from robustmail.data.mapped_arrays import map_member, map_npy
from robustmail.errors import DataError, in_brief
from robustmail.runtime.untrusted import check_unpacked, printable, unpacked

__all__ = ["IMAGE", "LABEL", "ImageFile", "as_split", "open_file", "open_folder"]

IMAGE = ("image", "img", "images", "imgs", "x", "data", "pixel_values", "arr_0")
"""names of what holds images: columns of a table, arrays of an npz file, in any letter case"""
LABEL = ("label", "labels", "fine_label", "fine_labels", "y", "target", "targets", "arr_1")
"""names of what holds their classes"""
NAMES = ("class_names", "label_names", "classes")
EVALUATED = ("test", "val", "")  # which split is evaluated, the first that is there; "": a lone pair
KEYS = "x_test and y_test, or image and label, or data and targets"
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
T = TypeVar("T")
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class ImageFile:
    """Labelled images in files, not read yet.

    name: of the data, also for errors. path: the file or folder. parts: reads (images, labels) of each split, "train",
    "val" or "test"; "" is a lone pair; with `mapped=True` arrays stay on disk where that is possible. class_names: if
    the file has them. there: what is in it, for errors.
    """

    name: str
    path: Path
    parts: Mapping[str, Callable[..., Pair]]
    class_names: tuple[str, ...] | None = None
    there: str = ""

    def evaluated(self) -> Split:
        """The images of test, else val, else the lone pair. Raises DataError, also as `as_split`."""
        split = next((split for split in EVALUATED if split in self.parts), None)
        if split is None:
            todo = "Pass one of its files." if self.path.is_dir() else f"In an npz file they are {KEYS}."
            raise DataError(self.name, f"has no test images but {self.there}", todo)
        part = as_split(self.name, *self.parts[split](), floats=True)
        if len(part.x) != len(part.y) or not len(part.y):
            raise DataError(self.name, f"has {len(part.x)} images and {len(part.y)} labels")
        return part

    def trained(self) -> Split:
        """The images of train, else the lone pair, not copied: a view of the array, on disk where it can be mapped.

        Raises DataError, also as `as_split`.
        """
        split = next((split for split in ("train", "") if split in self.parts), None)
        if split is None:
            raise DataError(self.name, f"has no training images but {self.there}", "Name them image and label.")
        return as_split(self.name, *self.parts[split](mapped=True), copy=False)


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
        return _parquet(who, path, {"": [path]})
    return _npz(who, path, kind)


def open_folder(who: str, folder: Path, depth: int = 4) -> ImageFile | None:
    """The parquet files of a folder, of data/ in it, or of its only folder; None for a folder without.

    Raises DataError for a folder of arrays, or of several data sets: it does not say which one is meant.
    """
    inner = sorted(f for f in folder.iterdir() if f.is_dir() and f.name[0] != ".")
    for tried in (folder, folder / "data"):
        if shards := _shards(tried):
            return _parquet(who, folder, _by_split(who, shards))
    filled = [f for f in inner if _shards(f)]
    if filled and all(SPLITS.get(f.name.lower()) for f in filled):
        return _parquet(who, folder, {SPLITS[f.name.lower()]: _shards(f) for f in filled})
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
        images = [name for name in arrays if not set(_words(name)) & set(LABEL)]
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


def _words(name: str) -> list[str]:
    """x_test.npy -> ["x", "test"]"""
    return re.split(r"[_.\-\s]", Path(name).stem.lower())


# Names of arrays


def _role(key: str) -> tuple[str, bool] | None:
    """(split, whether it holds images) of an array by its name: "y_test" -> ("test", False); None for another."""
    name = key.lower().replace(".", "_").replace("-", "_")
    first, _, rest = name.partition("_")
    start, _, last = name.rpartition("_")
    for split, inner in (("", name), (SPLITS.get(last), start), (SPLITS.get(first), rest)):
        if split is not None and inner in IMAGE + LABEL:
            return split, inner in IMAGE
    return None


def _pairs(who: str, keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{split: (name of the images, name of the labels)}; refused is a split with two of either."""
    found: dict[tuple[str, bool], str] = {}
    for key in keys:
        if (role := _role(key)) and (first := found.setdefault(role, key)) != key:
            what = "images" if role[1] else "labels"
            raise DataError(who, f"has two arrays that may be the {what}, {first} and {key}", "Save one of them.")
    return {
        split: (found[split, True], found[split, False])
        for split in ("train", "val", "test", "")
        if (split, True) in found and (split, False) in found
    }


def _class_names(value: Any) -> tuple[str, ...] | None:
    """An array of texts as the names of classes; None for another array."""
    if value.ndim != 1 or value.dtype.kind not in "US" or value.size < 2:
        return None
    return tuple(printable(v.decode(errors="replace") if isinstance(v, bytes) else v) for v in value.tolist())


# npz and npy


def _npz(who: str, path: Path, kind: str) -> ImageFile:
    keys = _in_archive(who, path, kind, lambda file: list(file))
    pairs = _pairs(who, keys)
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
    names = _class_names(*read((named,))) if named else None
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
    found = _class_names(_array(who, names)) if names.is_file() else None

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
                raise DataError(_named(who, path), "holds Python objects, a pickle", "Save plain arrays of numbers.")
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
        raise DataError(_named(who, path), f"not a readable npy file{why}", todo) from error


def _named(who: str, path: Path) -> str:
    """The data with the file of them that an error is about."""
    return who if str(path) in who else f"{who} ({path})"


# Parquet


def _by_split(who: str, shards: list[Path]) -> dict[str, list[Path]]:
    """Shards by the split that their names begin with: train-00000-of-00002.parquet; all of them must be there."""
    found: dict[str, list[Path]] = {}
    count: Counter[tuple[str, int]] = Counter()
    for shard in shards:
        found.setdefault(SPLITS.get(_words(shard.name)[0], ""), []).append(shard)
        if numbered := re.match(r"(.+)-\d+-of-(\d+)", shard.stem):
            count[numbered[1], int(numbered[2])] += 1
    if missing := next((item for item in count.items() if item[1] != item[0][1]), None):
        (name, total), there = missing
        raise DataError(who, f"has {there} of the {total:,} files {name}-*.parquet", "Download the others.")
    if "" in found and len(found) > 1:
        raise DataError(who, f"{found[''][0]} is of no split", "Shards are called train-*.parquet and test-*.parquet.")
    return found


def _parquet(who: str, path: Path, shards: dict[str, list[Path]]) -> ImageFile:
    first = next(iter(shards.values()))[0]
    with _opened(who, first) as file:
        features = _features(file.schema_arrow.metadata)
        columns = list(file.schema_arrow.names)
    image = _column(who, "image", IMAGE, columns, [n for n, f in features.items() if f.get("_type") == "Image"])
    label = _column(who, "label", LABEL, columns, [n for n, f in features.items() if f.get("_type") == "ClassLabel"])
    names = features.get(label, {}).get("names")
    is_named = isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)
    parts = {split: partial(_rows, who, files, image, label) for split, files in shards.items()}
    there = ", ".join(filter(None, shards)) or ", ".join(columns)
    return ImageFile(who, path, parts, tuple(map(printable, names or ())) if is_named else None, there)


def _opened(who: str, path: Path) -> Any:
    """A parquet file that announces no more than it may hold."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        todo = "Install it: pip install 'robustmail[parquet]'."
        raise DataError(who, "is of parquet files, which pyarrow reads, and that is not installed", todo) from error
    try:
        file = parquet.ParquetFile(path)
        about = file.metadata
        size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
    except Exception as error:
        wrong = f"not a readable parquet file ({in_brief(error)})"
        raise DataError(_named(who, path), wrong, "It is truncated, damaged, or another kind.") from error
    if size > unpacked(path.stat().st_size):
        raise DataError(_named(who, path), f"unpacks from {path.stat().st_size:,} bytes to {size:,}")
    return file


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """The columns as Hugging Face describes them, {name: {"_type": ..., "names": ...}}; {} where it does not."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in found.items() if isinstance(value, dict)}
    return {}


def _column(who: str, what: str, known: tuple[str, ...], columns: list[str], typed: list[str]) -> str:
    """The column of images or of labels: by its usual name, else the only one of that type."""
    by_name = [name for wanted in known for name in columns if name.lower() == wanted]
    found = by_name[:1] or (typed if len(typed) == 1 else [])
    if found:
        return found[0]
    wrong = f"no column is called {what}: there are {', '.join(map(printable, columns))}"
    raise DataError(who, wrong, f"Rename it: dataset.rename_column(NAME, {what!r}).")


def _rows(who: str, files: list[Path], image: str, label: str, mapped: bool = False) -> Pair:
    """(images, labels) of parquet files, decoded, which cannot be mapped."""
    images: list[Any] = []
    labels: list[Any] = []
    for path in files:
        with _opened(who, path) as file:
            try:
                for batch in file.iter_batches(batch_size=256, columns=[image, label]):
                    for row in batch.to_pylist():
                        images.append(_decoded(f"{who} (row {len(images)})", row[image]))
                        labels.append(row[label])
            except DataError:
                raise
            except Exception as error:
                raise DataError(_named(who, path), f"cannot be read ({in_brief(error)})", "It is damaged.") from error
    if odd := [value for value in labels if type(value) is not int]:
        wrong = f"a label is {printable(repr(odd[0])[:40])}"
        raise DataError(who, wrong, "Labels are 0, 1, 2, ...: see class_encode_column of Hugging Face's data sets.")
    sizes = sorted({str(list(value.shape[:2])) for value in images})
    if len(sizes) != 1:
        wrong = f"images differ in size: {', '.join(sizes[:3])}" if sizes else "there are no rows"
        raise DataError(who, wrong, "Resize them, and save them again." if sizes else "")
    return np.stack(alike(images)), np.array(labels)


def _decoded(who: str, value: Any) -> Any:
    """Bytes of an image file, alone or as {"bytes": ..., "path": ...}, as pixels; a path is never opened."""
    from PIL import Image

    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        is_path = isinstance(value, str) or (isinstance(value, dict) and value.get("path"))
        wrong = "has a path in place of an image" if is_path else f"has no image but a {type(content).__name__}"
        raise DataError(who, wrong, "Save the images themselves: they are {'bytes': ..., 'path': ...}.")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return pixels(who, image)
    except DataError:
        raise
    except Exception as error:  # a damaged image fails in a dozen ways
        why = "no JPEG, PNG or the like" if "cannot identify" in str(error) else in_brief(error)
        raise DataError(who, f"the image cannot be read ({why})") from error


def as_split(who: str, x: Any, y: Any, floats: bool = False, copy: bool = True) -> Split:
    """Arrays as a Split.

    who: the data, for errors. x: images [N, H, W, C], [N, C, H, W] or [N, H, W]. y: labels [N] or [N, 1]. floats:
    whether images may be floats in [0, 1]. copy: whether images are brought into the order [N, C, H, W] now; else the
    Split is a view of x. Raises DataError: other types, shapes or ranges.
    """
    if floats and np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
        if x.size and not (x.min() >= 0 and x.max() <= 1):  # also true of NaN
            span = f"[{x.min():.3g}, {x.max():.3g}]"
            raise DataError(who, f"images span {span}, outside [0, 1]", "Undo the normalisation, or divide by 255.")
    elif x.dtype != np.uint8:
        whole = np.issubdtype(x.dtype, np.integer)
        todo = "Save them as x.astype('uint8')." if whole else "Multiply floats in [0, 1] by 255 and round."
        raise DataError(who, f"images are {x.dtype}, expected uint8", todo)
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y  # as Keras ships CIFAR
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        wrong = f"{len(x)} images but labels of shape {list(y.shape)}" if y.ndim != 1 else f"labels are {y.dtype}"
        todo = "Save y.argmax(1) of one-hot labels." if y.ndim == 2 else "Save whole numbers, as y.astype(int)."
        raise DataError(who, f"{wrong}, expected integers", todo)
    images = channels_first(torch.from_numpy(x))
    images = images.contiguous() if copy else images
    if images.ndim != 4:
        raise DataError(who, f"images have shape {list(x.shape)}, expected [N, H, W, C] or [N, C, H, W]")
    return Split(images, torch.from_numpy(y.astype(np.int64)))
