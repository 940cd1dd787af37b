"""From the words of a user, or of a file, to labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustmail.config.overrides import parse_value
from robustmail.data.sources import npy, npz, parquet
from robustmail.data.testsets import TestSet, from_file, from_image_data, from_path
from robustmail.errors import DataError, RecipeError
from robustmail.runtime.untrusted import data_source, quoted

__all__ = ["load_data", "open_recorded_data"]


def load_data(text: str) -> TestSet:
    """Labelled images by name or path, to evaluate on.

    text: a built-in source with or without arguments (`cifar10`, `npz("file.npz")`), the path of an npz file or of an
    image folder, or file.py:source of one's own.
    Raises DataError or RecipeError: no such data, damaged, or images outside [0, 1].
    """
    path = Path(text)
    if path.exists():
        return replace(from_path(path), given=text)
    if "(" not in text and (
        path.suffix in (".npz", ".npy", ".parquet", ".mat") or (len(path.parts) > 1 and ".py:" not in text)
    ):
        raise DataError(text, "no such file or folder")
    source = parse_value(text, "data")
    if not callable(source):
        raise RecipeError(f"--data {text}", "not a data source", "Write cifar10, npz('FILE') or a path.")
    return _from_source(source, text)


def open_recorded_data(text: str, who: str) -> TestSet:
    """The data that a file says its network was trained on, if they are a built-in source.

    text: the source as the file has it. who: the file, for the error. Raises DataError, with the option that allows it,
    for any other source: a file does not decide what is opened.
    """
    if (source := data_source(text)) is None:
        wrong = f"was trained on {text}, and a file may not say what to open"
        raise DataError(who, wrong, f"Add {quoted('--data', text)} if you trust it, or other data.")
    return _from_source(source, text)


def _from_source(source: Callable[[], Any], text: str) -> TestSet:
    if isinstance(source, (npz, npy, parquet)):  # which need not have images to train on
        return replace(from_file(source.tested()), given=text)
    return replace(from_image_data(source()), given=text)
