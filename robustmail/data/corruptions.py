"""Corrupted images by corruption and severity, as CIFAR-10-C and ImageNet-C lay them out, or made from clean images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustmail.data.dataset import Split
from robustmail.data.image_arrays import as_split
from robustmail.data.testsets import TestSet, from_class_folders
from robustmail.errors import DataError, in_brief
from robustmail.runtime.rng import derive_seed, fork_rng, patched, seed_all

__all__ = ["COMMON", "EXTRA", "CorruptedSet", "find_corruptions", "generate_corruptions"]

COMMON = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""the corruptions over which papers take the mean: Hendrycks and Dietterich (ICLR 2019), section 4"""
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""those that they keep for validation"""
SEVERITIES = 5
LABELS = "labels.npy"


@dataclass(frozen=True)
class CorruptedSet:
    """Images under one corruption of one severity, from 1; nothing is opened before `load` is called."""

    corruption: str
    severity: int
    load: Callable[[], TestSet]


def find_corruptions(folder: Path, clean: TestSet) -> list[CorruptedSet]:
    """The corrupted images of a folder, in the order of COMMON and EXTRA, then by name.

    folder: with labels.npy and CORRUPTION.npy, which holds the severities one after another, as CIFAR-10-C; or with
    CORRUPTION/SEVERITY/CLASS/, also within folders of categories, as ImageNet-C.
    clean: the images without corruption, whose classes fix the numbers of the folders.
    Raises DataError: another layout, naming what is there; or labels that do not fit.
    """
    who = str(folder)
    if not folder.is_dir():
        raise DataError(who, "no such folder", "Pass the folder of CIFAR-10-C or ImageNet-C, or `generate`.")
    folder = _unwrapped(folder)
    if (folder / LABELS).is_file():
        found = list(_of_arrays(who, folder, clean))
    else:
        found = list(_of_folders(who, folder, clean))
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DataError(who, f"holds {there}, but no corruptions",
                        "Expected labels.npy with fog.npy, ..., or fog/1/CLASS/ with images.")  # fmt: skip
    known = (*COMMON, *EXTRA)
    place = {name: k for k, name in enumerate(known)}
    return sorted(found, key=lambda s: (place.get(s.corruption, len(known)), s.corruption, s.severity))


def _unwrapped(folder: Path) -> Path:
    """The folder that an archive has wrapped once more, if it is the only thing there and holds the corruptions."""
    inner = [path for path in folder.iterdir() if not path.name.startswith((".", "__"))]
    is_wrapped = len(inner) == 1 and inner[0].is_dir() and not inner[0].is_symlink() and not _severities(folder)
    return _unwrapped(inner[0]) if is_wrapped and not _severities(inner[0]) else folder


# CIFAR-10-C: arrays


def _of_arrays(who: str, folder: Path, clean: TestSet) -> Iterator[CorruptedSet]:
    labels = _array(folder / LABELS)
    for path in sorted(folder.glob("*.npy")):
        if path.name == LABELS:
            continue
        images = _array(path)
        if images.ndim != 4:
            raise DataError(str(path), f"has shape {list(images.shape)}, expected [severities * N, H, W, C]")
        y, severities = _repeated(str(path), labels, len(images))
        for k in range(severities):
            yield CorruptedSet(path.stem, k + 1, functools.partial(_block, path, k, y, clean))


def _block(path: Path, k: int, y: Any, clean: TestSet) -> TestSet:
    """The images of one severity, of which only these are read."""
    n = len(y)
    part = as_split(str(path), np.array(_array(path)[k * n : (k + 1) * n]), y)
    return TestSet(f"{path.stem} {k + 1}", part, clean.classes, clean.class_names)


def _array(path: Path) -> Any:
    """An array that stays on disk until it is indexed. Raises DataError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(str(path), f"cannot be read ({in_brief(error)})", "It is truncated or damaged.") from error


def _repeated(who: str, labels: Any, n: int) -> tuple[Any, int]:
    """(labels of one severity, number of severities); labels: of one severity, or of all of them."""
    if labels.ndim == 1 and len(labels) and n % len(labels) == 0 and n > len(labels):
        return np.array(labels), n // len(labels)
    if labels.ndim != 1 or len(labels) != n or not n:
        raise DataError(who, f"{n} images, but labels of shape {list(labels.shape)}")
    blocks = labels.reshape(SEVERITIES, -1) if n % SEVERITIES == 0 else labels[None]
    if n % SEVERITIES or not (blocks == blocks[0]).all():
        wrong = f"the {n} labels do not repeat {SEVERITIES} times, as those of {SEVERITIES} severities do"
        raise DataError(who, wrong, "Pass a single set with --data, not with --corruptions.")
    return np.array(blocks[0]), SEVERITIES


# ImageNet-C: folders


def _of_folders(who: str, folder: Path, clean: TestSet) -> Iterator[CorruptedSet]:
    """Those of CORRUPTION/SEVERITY/CLASS/, of CATEGORY/CORRUPTION/SEVERITY/CLASS/, or of one corruption."""
    if _severities(folder):
        below = [folder]
    else:
        first = _folders(folder)
        below = [found for path in first for found in ([path] if _severities(path) else _folders(path))]
    names: set[str] = set()
    for path in below:
        if severities := _severities(path):
            if path.name in names:
                raise DataError(who, f"has two corruptions called {path.name}", "Move one away.")
            names.add(path.name)
        for inner in severities:
            yield CorruptedSet(path.name, int(inner.name), functools.partial(from_class_folders, inner, clean))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(str(folder), f"cannot be read ({error.strerror})") from error


def _severities(folder: Path) -> list[Path]:
    """The folders 1, 2, ... of a corruption; none where other folders are beside them."""
    found = _folders(folder)
    names = [str(k + 1) for k in range(SEVERITIES)]
    return found if found and all(path.name in names and _folders(path) for path in found) else []


# Made here


def generate_corruptions(clean: TestSet, seed: int) -> list[CorruptedSet]:
    """The 15 common corruptions in 5 severities, made from clean images by the package imagecorruptions.

    They are not CIFAR-10-C: its files were made by other constants for small images, and by other draws.
    Raises DataError: the package is missing, or images are not 32 pixels or larger.
    """
    try:
        import numba
        from imagecorruptions import corrupt
    except ImportError as error:
        raise DataError("--corruptions generate", "needs the package imagecorruptions-imaug",
                        "Run pip install 'robustmail[corruptions]'.") from error  # fmt: skip
    if min(clean.part.x.shape[2:]) < 32:
        raise DataError("--corruptions generate", f"images of {list(clean.part.x.shape[2:])}, expected at least 32")
    seed_numba = numba.njit(_seed_numpy)  # compiled functions draw from a generator of their own
    return [
        CorruptedSet(name, severity, functools.partial(_made, corrupt, seed_numba, name, severity, clean, seed))
        for name in COMMON
        for severity in range(1, SEVERITIES + 1)
    ]


def _seed_numpy(seed: int) -> None:
    np.random.seed(seed)


def _made(
    corrupt: Callable[..., Any], seed_numba: Callable[[int], None], name: str, severity: int, clean: TestSet, seed: int
) -> TestSet:
    """Each image corrupted by itself, so that its noise depends on its place and the seed alone."""
    made = []
    unseeded = np.random.default_rng
    for i in range(len(clean.part.y)):
        number = derive_seed(seed, name, severity, i)
        with fork_rng(), patched(np.random, default_rng=lambda *_, number=number: unseeded(number)):
            seed_all(seed, name, severity, i)
            seed_numba(number % 2**32)
            image = _eight_bit(clean.part.x[i])
            made.append(corrupt(image if image.shape[2] == 3 else image[..., 0], severity, name))
    x = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
    x = x if clean.part.x.shape[1] == 3 else x[:, :1]
    return TestSet(f"{name} {severity}", Split(x.contiguous(), clean.part.y), clean.classes, clean.class_names)


def _eight_bit(image: torch.Tensor) -> Any:
    """[C, H, W] as bytes [H, W, C]."""
    x = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    return x.permute(1, 2, 0).contiguous().numpy()
