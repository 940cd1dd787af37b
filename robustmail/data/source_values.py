"""What all data sources share: checks of their fields, and ImageData with their settings."""

from __future__ import annotations

from typing import Any

from robustmail.data.dataset import ImageData, Split
from robustmail.data.image_files import Preprocess
from robustmail.errors import RecipeError
from robustmail.fields import check_types

__all__ = ["check_knobs", "image_data", "square"]


def check_knobs(source: Any) -> None:
    """Refuse knobs of the wrong type or out of range (raises RecipeError)."""
    check_types(source)
    for name, least in {"pad": 0, "validation": 1, "classes": 1, "train": 1, "size": 1}.items():
        value = getattr(source, name, None)
        if isinstance(value, int) and value < least:
            raise RecipeError(f"{type(source).__name__} (given {name}={value})", f"{name} must be at least {least}")


def image_data(
    source: Any, who: str, train: Split, test: Split, classes: int, names: tuple[str, ...] | None
) -> ImageData:
    """What a source returns, with the augmentation of its knobs."""
    pad = min(train.x.shape[2:]) // 8 if source.pad is None else source.pad
    names = names if names and len(names) == classes else None
    return ImageData(who, train, test, classes, pad, source.flip, source.validation, names)


def square(size: int | None) -> Preprocess | None:
    """Resizes the shorter side to `size`, and crops the square in the centre; None for images as they are."""
    return Preprocess(size, size) if size else None
