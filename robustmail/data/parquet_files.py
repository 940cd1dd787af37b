"""Hugging Face's parquet files with a column of images and one of labels."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from robustmail.data.image_arrays import (
    IMAGE,
    LABEL,
    ImageFile,
    Pair,
    file_label,
    words_in,
)
from robustmail.data.image_files import FORMATS, alike, pixels
from robustmail.data.image_folders import SPLITS
from robustmail.errors import DataError, in_brief
from robustmail.runtime.untrusted import printable, unpacked

__all__ = ["shards_by_split", "open_parquet"]


def shards_by_split(who: str, shards: list[Path]) -> dict[str, list[Path]]:
    """Shards by the split that their names begin with: train-00000-of-00002.parquet; all of them must be there."""
    found: dict[str, list[Path]] = {}
    count: Counter[tuple[str, int]] = Counter()
    for shard in shards:
        found.setdefault(SPLITS.get(words_in(shard.name)[0], ""), []).append(shard)
        if numbered := re.match(r"(.+)-\d+-of-(\d+)", shard.stem):
            count[numbered[1], int(numbered[2])] += 1
    if missing := next((item for item in count.items() if item[1] != item[0][1]), None):
        (name, total), there = missing
        raise DataError(who, f"has {there} of the {total:,} files {name}-*.parquet", "Download the others.")
    if "" in found and len(found) > 1:
        raise DataError(who, f"{found[''][0]} is of no split", "Shards are called train-*.parquet and test-*.parquet.")
    return found


def open_parquet(who: str, path: Path, shards: dict[str, list[Path]]) -> ImageFile:
    """The images of parquet files; shards: the files of each split. Raises DataError for one that cannot be read."""
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
        raise DataError(file_label(who, path), wrong, "It is truncated, damaged, or another kind.") from error
    if size > unpacked(path.stat().st_size):
        raise DataError(file_label(who, path), f"unpacks from {path.stat().st_size:,} bytes to {size:,}")
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
                raise DataError(
                    file_label(who, path), f"cannot be read ({in_brief(error)})", "It is damaged."
                ) from error
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
