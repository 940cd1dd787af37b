"""From the words of a user, or of a file, to labelled images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustmail.config.overrides import parse_value
from robustmail.data.file_sources import npy, npz, parquet
from robustmail.data.image_files import Preprocess
from robustmail.data.mixed import tested_source
from robustmail.data.testsets import TestSet, from_file, from_image_data, from_path
from robustmail.errors import DataError, RecipeError
from robustmail.models.pretrained import PretrainedConfig
from robustmail.runtime.untrusted import data_source, quoted

__all__ = ["load_data", "open_data", "open_recorded_data", "pretrained_preprocess"]


def load_data(text: str, n: int | None = None, preprocess: Preprocess | None = None) -> TestSet:
    """Labelled images by name or path, to evaluate on; those of a folder are decoded when they are needed.

    text: a built-in source with or without arguments (`cifar10`, `npz("file.npz")`), the path of an npz file or of an
    image folder, or file.py:source of one's own.
    n: only the first n images; those of a folder are then drawn evenly from all classes. By default all.
    preprocess: how image files are resized and cropped; by default not at all.
    Raises DataError or RecipeError: no such data, damaged, or images outside [0, 1].
    """
    return open_data(text, preprocess).first(n).checked()


def open_data(text: str, preprocess: Preprocess | None = None) -> TestSet:
    """As `load_data`, but no image file is opened yet: see `TestSet.checked`."""
    path = Path(text)
    if path.exists():
        return replace(from_path(path, preprocess), given=text)
    if "(" not in text and (
        path.suffix in (".npz", ".npy", ".parquet", ".mat") or (len(path.parts) > 1 and ".py:" not in text)
    ):
        raise DataError(text, "no such file or folder")
    source = parse_value(text, "data")
    if not callable(source):
        raise RecipeError(f"--data {text}", "not a data source", "Write cifar10, npz('FILE') or a path.")
    if preprocess is not None:
        raise DataError(f"--data {text}", "is no folder of image files, which --resize and --crop are for",
                        "Put the resizing into the network: --model file.py:factory.")  # fmt: skip
    return _from_source(source, text)


def pretrained_preprocess(config: PretrainedConfig | None) -> tuple[Preprocess | None, bool]:
    """(how images are resized for a network of this configuration, whether it takes images of no other size)."""
    if config is None:
        return None, False
    return Preprocess(config.resize, config.crop, config.interpolation, config.squash), config.fixed_size


def open_recorded_data(text: str, who: str) -> TestSet:
    """The data that a file names as those of its training or evaluation, if they are a built-in source.

    text: the source as the file has it. who: the file, for the error. Raises DataError, with the option that allows it,
    for any other source: a file does not decide what is opened.
    """
    if (source := data_source(text)) is None:
        wrong = f"names its data {text}, and a file may not say what to open"
        raise DataError(who, wrong, f"Add {quoted('--data', text)} if you trust it, or other data.")
    return _from_source(source, text)


def _from_source(source: Callable[[], Any], text: str) -> TestSet:
    source = tested_source(source)
    if isinstance(source, (npz, npy, parquet)):  # which need not have images to train on
        return replace(from_file(source.tested()), given=text)
    return replace(from_image_data(source()), given=text)
