"""Images as they are: broken examples beside their originals, as PNGs within the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from robustmail.errors import RunError, in_brief
from robustmail.runtime.untrusted import check_tensors

__all__ = ["Example", "data_uri", "magnification", "png", "read_examples"]

LARGEST = 160  # pixels; larger images are shrunk, as 36 of them must fit into one page
Pixels = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Example:
    """A broken image: as it was and as the attack left it, float32 [C, H, W] in [0, 1]."""

    index: int
    original: Pixels
    broken: Pixels

    def distance(self, norm: str) -> float:
        """How far the attack went."""
        moved = (self.broken - self.original).ravel()
        return float(np.linalg.norm(moved) if norm == "l2" else np.abs(moved).max(initial=0))

    def moved(self, scale: int) -> Pixels:
        """The perturbation, so many times larger, around grey."""
        moved: Pixels = np.clip(0.5 + scale * (self.broken - self.original), 0, 1)
        return moved


def read_examples(folder: Path, most: int = 12) -> tuple[list[Example], int]:
    """At most so many examples, evenly spread over the set, and how many there are.

    Raises RunError where the file is damaged.
    """
    path = folder / "examples.safetensors"
    if not path.exists():
        return [], 0
    from safetensors import SafetensorError, safe_open

    try:
        check_tensors(path)
        with safe_open(path, framework="np") as file:  # reads no more than the images that are shown
            index = file.get_tensor("index")
            x, original = file.get_slice("x"), file.get_slice("original")
            chosen = sorted({round(i) for i in np.linspace(0, len(index) - 1, min(most, len(index)))})
            return [Example(int(index[i]), _floats(original[i]), _floats(x[i])) for i in chosen], len(index)
    except (SafetensorError, ValueError, TypeError, IndexError, KeyError, OSError) as error:
        raise RunError(
            str(path), f"is damaged ({in_brief(error)})",
            "Restore it, or evaluate again into another folder.",
        ) from error  # fmt: skip


def magnification(examples: list[Example]) -> int:
    """How many times larger the perturbations can be shown, all of them alike, without leaving [0, 1]."""
    largest = max((example.distance("linf") for example in examples), default=0.0)
    return max(1, int(0.5 / largest + 0.1)) if largest else 1


def png(image: Pixels, exact: bool = False) -> str:
    """An image as a data URI; three channels are colours, any other number is shown as its mean, in grey.

    exact: shrink by leaving pixels out rather than by averaging, which would blur a perturbation away.
    """
    pixels = np.round(np.clip(image if len(image) == 3 else image.mean(0, keepdims=True), 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0])
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.NEAREST if exact else Image.Resampling.BOX)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return data_uri(out.getvalue())


def data_uri(file: bytes) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def _floats(image: np.ndarray[Any, Any]) -> Pixels:
    pixels: Pixels = image.astype(np.float32)
    return pixels / np.float32(255) if image.dtype == np.uint8 else pixels
