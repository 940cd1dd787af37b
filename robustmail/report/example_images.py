"""Adversarial examples and their originals as PNGs inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from robustmail.errors import RunError, in_brief
from robustmail.runtime.files import atomic_write
from robustmail.runtime.untrusted import check_tensors

__all__ = ["Example", "data_uri", "magnification", "png", "read_examples", "write_sheet"]

MAX_SIDE = 160  # pixels; larger images are shrunk, because a page holds 36
SHEET_WIDTH = 640  # pixels, at least half of which a sheet of small images has
PADDING = ((1, 1), (1, 1), (0, 0))  # white pixels around each image of a sheet
Pixels = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Example:
    """A broken image: the original and the adversarial example, float32 [C, H, W] in [0, 1]."""

    index: int
    original: Pixels
    broken: Pixels

    def distance(self, norm: str) -> float:
        """Size of the perturbation, in l2 for "l2" and in l-inf otherwise."""
        difference = (self.broken - self.original).ravel()
        return float(np.linalg.norm(difference) if norm == "l2" else np.abs(difference).max(initial=0))

    def perturbation(self, scale: int) -> Pixels:
        """The perturbation, `scale` times larger, around grey, [C, H, W] in [0, 1]."""
        pixels: Pixels = np.clip(0.5 + scale * (self.broken - self.original), 0, 1)
        return pixels


def read_examples(folder: Path, max_examples: int = 12) -> tuple[list[Example], int]:
    """Read (examples evenly spread over the test set, the number of all examples) of an evaluation's folder.

    Raises RunError: examples.safetensors is damaged.
    """
    path = folder / "examples.safetensors"
    if not path.exists():
        return [], 0
    from safetensors import SafetensorError, safe_open

    try:
        check_tensors(path)
        with safe_open(path, framework="np") as file:  # reads only the chosen images
            index = file.get_tensor("index")
            x, original = file.get_slice("x"), file.get_slice("original")
            chosen = sorted({round(i) for i in np.linspace(0, len(index) - 1, min(max_examples, len(index)))})
            return [Example(int(index[i]), _floats(original[i]), _floats(x[i])) for i in chosen], len(index)
    except (SafetensorError, ValueError, TypeError, IndexError, KeyError, OSError) as error:
        raise RunError(
            str(path), f"is damaged ({in_brief(error)})", "Restore it, or evaluate again into another folder."
        ) from error


def write_sheet(folder: Path, path: Path, max_examples: int = 8) -> Path | None:
    """Write examples of an evaluation's folder as one PNG: originals, enlarged perturbations, adversarial images.

    Returns its path, None where there are no examples. Raises RunError as `read_examples`.
    """
    examples, _ = read_examples(folder, max_examples)
    if not examples:
        return None
    scale = magnification(examples)
    rows = [[e.original for e in examples], [e.perturbation(scale) for e in examples], [e.broken for e in examples]]
    images = [[_pixels(image) for image in row] for row in rows]
    sheet = np.concatenate(
        [np.concatenate([np.pad(i, PADDING[: i.ndim], constant_values=255) for i in row], 1) for row in images]
    )
    picture = Image.fromarray(sheet)
    times = max(1, SHEET_WIDTH // picture.width)
    picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    atomic_write(path, lambda temporary: picture.save(temporary, "PNG"))
    return path


def magnification(examples: list[Example]) -> int:
    """The largest whole factor by which all perturbations can be enlarged around grey within [0, 1]."""
    largest = max((example.distance("linf") for example in examples), default=0.0)
    return max(1, int(0.5 / largest + 0.1)) if largest else 1


def png(image: Pixels, exact: bool = False) -> str:
    """Encode an image, [C, H, W] in [0, 1], as the data URI of a PNG; unless C = 3, the channels' mean in grey.

    exact: a large image is shrunk by dropping pixels; averaging would remove a perturbation.
    """
    picture = Image.fromarray(_pixels(image))
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.NEAREST if exact else Image.Resampling.BOX)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return data_uri(out.getvalue())


def _pixels(image: Pixels) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image, [C, H, W] in [0, 1], as uint8 [H, W, 3], or [H, W] in grey."""
    pixels = np.round(np.clip(image if len(image) == 3 else image.mean(0, keepdims=True), 0, 1) * 255).astype(np.uint8)
    return pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]


def data_uri(file: bytes) -> str:
    """Encode the bytes of a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def _floats(image: np.ndarray[Any, Any]) -> Pixels:
    pixels: Pixels = image.astype(np.float32)
    return pixels / np.float32(255) if image.dtype == np.uint8 else pixels
