"""Labelled images as people hand them over in Python: arrays, a data set of any library, or its DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from robustmail.data.dataset import Split, channels_first
from robustmail.data.image_arrays import IMAGE, LABEL
from robustmail.data.image_files import LabelledImages, StreamedSplit, alike, pixels
from robustmail.errors import DataError, RobustmailError, in_brief
from robustmail.runtime.rng import fork_rng
from robustmail.runtime.untrusted import printable

__all__ = ["class_names", "read_bytes", "read_data"]

TWICE = 32  # items that are read twice, to see whether they are the same
DEEP = 8  # data sets and transforms within one another
RANDOM = ("Random", "Jitter", "Aug")  # in the names of transforms that draw
WANTED = "Pass (images, labels), tensors or arrays, or a data set, or its DataLoader."

Pair = tuple[Any, Any]


def read_data(who: str, data: Any, n: int | None = None) -> LabelledImages:
    """Labelled images: [N, C, H, W] uint8 or float32 in [0, 1], and [N] int64; files are decoded when they are needed.

    who: the caller, for errors. data: (images, labels) as tensors or arrays; what `load_data` returns; a data set of
    (image, label) or of rows with an image and a label, also PIL images; or a DataLoader, whose data set is read in its
    own order, to the last image. Images [N, H, W, C] are permuted. n: only the first n images.
    Raises DataError: images that are normalised, augmented or outside [0, 1], labels that are not whole numbers from 0,
    or fewer than n images.
    """
    data = data.part if isinstance(getattr(data, "part", None), (Split, StreamedSplit)) else data  # of `load_data`
    if isinstance(data, StreamedSplit):
        return _first(who, data, n)
    pair = _columns(who, data) or _collected(who, data, n)
    x, y = (_joined(who, value) if isinstance(value, list) else _tensor(who, value) for value in _plain(who, pair))
    y = y.squeeze(1) if y.ndim == 2 and y.shape[1] == 1 else y
    x = channels_first(x).contiguous() if x.ndim == 4 or (x.ndim == 3 and y.shape == x.shape[:1]) else x
    _check_images(who, x, data)
    _check_labels(who, x, y)
    return _first(who, Split(x.float() if x.is_floating_point() else x, y.long()), n)


def _first(who: str, part: LabelledImages, n: int | None) -> LabelledImages:
    count = len(part.y)
    if n is not None and not 1 <= n <= count:
        raise DataError(f"{who} (given n={n})", f"there are {count} images", f"Pass 1 ... {count}, or leave n out.")
    return part.first(n)


def read_bytes(who: str, data: Any) -> Split:
    """The same to train on, as bytes: floats are k / 255, as ToTensor gives them, or refused (DataError)."""
    x, y = read_data(who, data).loaded()
    if not x.is_floating_point():
        return Split(x, y)
    levels = (x * 255).round().to(torch.uint8)
    if not torch.equal(levels.float() / 255, x):
        wrong = "images are floats between the 256 levels of a byte"
        raise DataError(who, wrong, "Pass uint8: multiply floats in [0, 1] by 255 and round.")
    return Split(levels, y)


def class_names(data: Any) -> tuple[str, ...] | None:
    """The names of its classes that a data set has, in `classes` or in the features of its label; else None."""
    for _ in range(DEEP):
        features = getattr(data, "features", None)
        label = (
            next((features[name] for name in LABEL if name in features), None)
            if isinstance(features, Mapping)
            else None
        )
        names = getattr(label, "names", None) or getattr(data, "classes", None)
        if isinstance(names, (list, tuple)) and len(names) > 1 and all(isinstance(name, str) for name in names):
            return tuple(map(printable, names))
        if (data := getattr(data, "dataset", None)) is None:
            break
    return None


def _check_images(who: str, x: Tensor, data: Any) -> None:
    if x.ndim != 4 or 0 in x.shape or not (x.is_floating_point() or x.dtype == torch.uint8):
        wrong = f"images are {str(x.dtype)[6:]} of shape {list(x.shape)}"
        raise DataError(who, wrong, "Pass uint8, or floats in [0, 1], of shape [N, C, H, W].")
    low, high = float(x.min()), float(x.max())
    inside = not x.is_floating_point() or (low >= 0 and high <= 1)  # not true of NaN
    span = "" if inside else f" and span [{low:.3g}, {high:.3g}], outside [0, 1]"
    if found := next(_normalised(data), None):
        mean, std = found
        wrong = f"images are normalised by the data set's transform, mean {mean} and std {std}{span}"
        raise DataError(who, wrong, f"Take Normalize out of it, and pass Classifier(model, ({mean}, {std})).")
    if not inside:
        todo = "Undo the normalisation, and pass Classifier(model, (mean, std)), which does it inside."
        bytes_ = low >= 0 and high <= 255
        raise DataError(who, f"images{span.removeprefix(' and')}", "Divide them by 255." if bytes_ else todo)


def _check_labels(who: str, x: Tensor, y: Tensor) -> None:
    if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        wrong = f"labels are {str(y.dtype)[6:]} of shape {list(y.shape)}, expected whole numbers of shape [N]"
        todo = "Pass y.argmax(1) of one-hot labels." if y.ndim == 2 else "Pass y.astype(int)." if y.ndim == 1 else ""
        raise DataError(who, wrong, todo)
    if len(x) != len(y):
        raise DataError(who, f"{len(x)} images, but {len(y)} labels")
    if int(y.min()) < 0:
        raise DataError(who, f"has the label {int(y.min())}", "Labels are 0, 1, 2, ...")


# Data sets and loaders


def _columns(who: str, data: Any) -> Pair | None:
    """(images, labels) where they are handed over as such; None for what has to be read item by item."""
    if isinstance(data, Mapping):
        return _row(who, data)
    rows = isinstance(data, list) and all(isinstance(item, (tuple, Mapping)) for item in data)
    if isinstance(data, (tuple, list)) and len(data) == 2 and not rows:
        return data[0], data[1]
    sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, (str, bytes, Tensor, np.ndarray, tuple)) or not (sequence or hasattr(data, "__iter__")):
        todo = f"Pass load_data({data!r})." if isinstance(data, str) else WANTED
        raise DataError(who, f"data are a {type(data).__name__}", todo)
    return None


def _collected(who: str, data: Any, n: int | None) -> Pair:
    """All images and labels of a data set or a loader in its data set's order, or the first n of them and some."""
    with fork_rng():  # whatever it draws
        loader = _in_order(who, data) if isinstance(data, DataLoader) else None
        whole = data if loader is None else loader
        _check_repeatable(who, data, loader)
        images: list[Any] = []
        labels: list[Any] = []
        for row in _guarded(who, whole, _items(whole, n)):
            image, label = _plain(who, _row(who, row))
            batched = np.ndim(label) > 0 and (isinstance(image, list) or np.ndim(image) == 4)
            images.extend(image if batched else [image])
            labels.extend(label if batched else [label])
            if n is not None and len(labels) >= n:
                break
    if not images:
        raise DataError(who, f"the {type(data).__name__} is empty")
    return images, labels


def _in_order(who: str, loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader without shuffling, to the last image; a sampler that chooses images is refused."""
    if isinstance(loader.dataset, IterableDataset):
        return loader
    sampler = loader.sampler
    every = type(sampler) is SequentialSampler
    if type(sampler) is RandomSampler:
        every = not sampler.replacement and len(sampler) == len(sampler.data_source)
    own = None if type(loader.batch_sampler) in (BatchSampler, type(None)) else loader.batch_sampler
    if own is not None or not every:
        wrong = f"the DataLoader chooses images by a {type(own or sampler).__name__}"
        todo = "Pass loader.dataset, or torch.utils.data.Subset(loader.dataset, indices) for some of them."
        raise DataError(who, wrong, todo)
    return DataLoader(
        loader.dataset, loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn,
        timeout=loader.timeout, worker_init_fn=loader.worker_init_fn, prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
    )  # fmt: skip


def _items(whole: Any, n: int | None) -> Iterator[Any]:
    """What a loader, an iterable or a map-style data set gives, one after another."""
    if isinstance(whole, (DataLoader, IterableDataset)) or not hasattr(whole, "__getitem__"):
        return iter(whole)
    return (whole[i] for i in range(len(whole) if n is None else min(n, len(whole))))


def _guarded(who: str, whole: Any, items: Iterator[Any]) -> Iterator[Any]:
    """The same items; what somebody's data set raises is told in a line."""
    count = 0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RobustmailError:
            raise
        except Exception as error:
            wrong = f"the {type(whole).__name__} fails after {count} items ({in_brief(error)})"
            raise DataError(who, wrong) from error
        yield item
        count += 1


def _row(who: str, row: Any) -> Pair:
    """(image, label) of an item, or of a batch."""
    if isinstance(row, Mapping):
        lower = {str(name).lower(): name for name in row}
        image, label = (next((lower[name] for name in names if name in lower), None) for names in (IMAGE, LABEL))
        if image is not None and label is not None:
            return row[image], row[label]
        missing = "image" if image is None else "label"
        parts = any(hasattr(value, "column_names") or hasattr(value, "__getitem__") for value in row.values())
        todo = f"Rename it to {missing!r}" + (f", or pass one of them, as data[{list(row)[-1]!r}]." if parts else ".")
        raise DataError(who, f"no column is called {missing}: there are {', '.join(map(str, row))}", todo)
    if isinstance(row, (tuple, list)) and len(row) >= 2:
        return row[0], row[1]
    wrong = f"an item is a {type(row).__name__}{' of one thing' if isinstance(row, (tuple, list)) else ''}"
    raise DataError(who, wrong, "Items are (image, label), or rows with an image and a label.")


def _plain(who: str, value: Any) -> Any:
    """A PIL image as an array, also in a list; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [_plain(who, item) for item in value]
    return pixels(who, value) if hasattr(value, "convert") and hasattr(value, "mode") else value


def _joined(who: str, values: list[Any]) -> Tensor:
    """One tensor of many items."""
    if all(isinstance(v, np.ndarray) and v.dtype == np.uint8 and (v.ndim == 2 or v.shape[2:] == (3,)) for v in values):
        values = alike(values)
    tensors = [_tensor(who, value) for value in values]
    sizes = sorted({str(list(tensor.shape)) for tensor in tensors})
    if len(sizes) != 1:
        wrong = f"items differ in size: {', '.join(sizes[:3])}" if sizes else "there are none"
        raise DataError(who, wrong, "Resize images in the transform." if sizes else "")
    return torch.stack(tensors)


def _tensor(who: str, value: Any) -> Tensor:
    if isinstance(value, str):
        raise DataError(who, f"a label is the text {value!r}", "Labels are 0, 1, 2, ...")
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(np.require(value, requirements="W"))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(who, f"data are no arrays ({in_brief(error)})", WANTED) from error


# Transforms


def _check_repeatable(who: str, data: Any, loader: DataLoader[Any] | None) -> None:
    """Refuse what gives other images when it is read again."""
    source: Any = loader.dataset if loader is not None else data
    read: Callable[[], Iterable[Any]]
    if isinstance(source, IterableDataset) or not hasattr(source, "__getitem__"):
        whole = source if loader is None else loader
        if iter(whole) is whole:  # a generator, which can be read but once
            return

        def read() -> Iterable[Any]:
            return list(islice(_guarded(who, whole, iter(whole)), TWICE if loader is None else 1))

        todo = f"Read it once: pass {'list(data)' if loader is None else '(images, labels)'}."
    else:
        places = sorted({i * len(source) // TWICE for i in range(TWICE)}) if len(source) else []

        def read() -> Iterable[Any]:
            items = list(_guarded(who, source, (source[i] for i in places)))
            return loader.collate_fn(items) if loader is not None and loader.batch_size and items else items

        todo = "Read it without augmentation, as with dataset.transform = torchvision.transforms.ToTensor()."
    if not _same(*_plain(who, [read(), read()])):
        names = dict.fromkeys(type(transform).__name__ for transform in _transforms(data))
        drawn = [name for name in names if any(word in name for word in RANDOM)]
        why = f" ({', '.join(drawn)})" if drawn else ""
        raise DataError(who, f"the {type(data).__name__} gives other images when it is read again{why}", todo)


def _same(a: Any, b: Any) -> bool:
    """Are two items, or batches, the same to the bit?"""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (Tensor, np.ndarray)):
        return np.shape(a) == np.shape(b) and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return bool(a == b) if isinstance(a, (int, float, str, bool)) else True


def _transforms(value: Any, depth: int = DEEP) -> Iterator[Any]:
    """The transforms of a data set, also of one within a subset or a loader."""
    if depth == 0 or value is None or isinstance(value, (Tensor, np.ndarray, str, tuple)):
        return
    if isinstance(value, (list, torch.nn.Sequential)):
        for part in islice(value, 100):
            yield part
            yield from _transforms(part, depth - 1)
    for name in ("dataset", "datasets", "transform", "transforms"):
        inner = getattr(value, name, None)
        if name.startswith("transform") and callable(inner):
            yield inner
        yield from _transforms(inner, depth - 1)


def _normalised(data: Any) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """(mean, std) of each Normalize among a data set's transforms that does anything."""
    for transform in _transforms(data):
        if type(transform).__name__ == "Normalize":
            mean, std = (
                tuple(float(f"{v:.6g}") for v in np.asarray(getattr(transform, name), dtype=float).flatten())
                for name in ("mean", "std")
            )
            if set(mean) != {0.0} or set(std) != {1.0}:
                yield mean, std
