"""A data set as tensors: checked, split, shuffled and augmented without worker processes."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustmail.errors import DataError
from robustmail.text import plural

HASHED = 4096  # images of a block

__all__ = [
    "Extra",
    "ImageData",
    "Split",
    "batch_indices",
    "channels_first",
    "hold_out",
    "in_turn",
    "to_float",
    "tensor_hash",
]


class Split(NamedTuple):
    """Some images and their labels."""

    x: Tensor
    """[N, C, H, W] uint8"""
    y: Tensor
    """[N] int64"""

    def to(self, device: torch.device | str) -> Split:
        """The same on another device."""
        return Split(self.x.to(device), self.y.to(device))

    def first(self, n: int | None) -> Split:
        """The first n images in the data set's own order, or all."""
        return self if n is None else Split(self.x[:n], self.y[:n])

    def take(self, index: Tensor) -> Split:
        """The images at places [M], or where a mask [N] is true."""
        return Split(self.x[index.to(self.x.device)], self.y[index.to(self.y.device)])

    def loaded(self) -> Split:
        """Itself: the images are in memory."""
        return self


@dataclass(frozen=True)
class Extra:
    """Images that are mixed into every training batch, such as generated ones; they stay on the host, or on disk.

    parts: of several files, numbered one after another. share: of a batch, in (0, 1].
    """

    parts: tuple[Split, ...]
    share: float

    def __len__(self) -> int:
        return sum(len(part.y) for part in self.parts)

    def take(self, index: Tensor) -> Split:
        """The images of these numbers, [M], copied into memory."""
        ends = torch.tensor([len(part.y) for part in self.parts]).cumsum(0)
        number = torch.bucketize(index, ends, right=True)
        x, y = torch.empty(len(index), *self.parts[0].x.shape[1:], dtype=torch.uint8), torch.empty_like(index)
        for i, part in enumerate(self.parts):
            here = number == i
            x[here], y[here] = part.take(index[here] - (ends[i] - len(part.y)))
        return Split(x, y)

    def blocks(self, size: int) -> Iterator[Split]:
        """All images in order, `size` at a time or fewer."""
        for part in self.parts:
            for start in range(0, len(part.y), size):
                yield Split(part.x[start : start + size], part.y[start : start + size])


@dataclass(frozen=True)
class ImageData:
    """What a data source returns.

    train, test: as stored. pad, flip: the augmentation that suits them: zero padding of a random crop, in pixels, and
    whether mirror images are images of the same class. validation: how many of train to hold out. class_names: one per
    class, where they are known. extra: images that are mixed into the training batches and used for nothing else.
    """

    name: str
    train: Split
    test: Split
    classes: int
    pad: int = 0
    flip: bool = False
    validation: int | None = None
    class_names: tuple[str, ...] | None = None
    extra: Extra | None = None

    def __post_init__(self) -> None:
        for split, part in {"train": self.train, "test": self.test}.items():
            _check_split(f"{self.name} ({split})", part, self.classes)
        for part in () if self.extra is None else self.extra.parts:
            self._check_extra(part)
        if self.classes < 2:
            raise DataError(self.name, f"has {self.classes} class, a classifier needs two")
        if self.train.x.shape[1:] != self.test.x.shape[1:]:
            raise DataError(
                self.name,
                f"training images are {list(self.train.x.shape[1:])}, test images {list(self.test.x.shape[1:])}",
            )

    def _check_extra(self, part: Split) -> None:
        _check_split(f"{self.name} (extra)", part, self.classes)
        if part.x.shape[1:] != self.train.x.shape[1:]:
            shapes = list(part.x.shape[1:]), list(self.train.x.shape[1:])
            raise DataError(f"{self.name} (extra)", f"extra images are {shapes[0]}, training images {shapes[1]}")

    @property
    def mixture(self) -> str:
        """The name, and what is mixed into the training batches, in words."""
        if self.extra is None:
            return self.name
        return f"{self.name}, {self.extra.share:.3g} of each batch from {len(self.extra):,} extra images"

    @property
    def augmentation(self) -> str:
        """What is done to training images, in words."""
        crops = f"random crops of images padded by {plural(self.pad, 'pixel')}" if self.pad else "no crops"
        return f"{crops}, {'mirrored at random' if self.flip else 'never mirrored'}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        c, h, w = self.train.x.shape[1:]
        return c, h, w

    def to(self, device: torch.device | str) -> ImageData:
        """The same on another device; extra images stay where they are."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of every image and label, to tell whether a run goes on with the data it began with."""
        digest = hashlib.sha256()
        for tensor in (*self.train, *self.test):
            digest.update(tensor.cpu().contiguous().numpy().data)
        for block in () if self.extra is None else self.extra.blocks(HASHED):
            for tensor in (_as_stored(block.x), block.y):
                digest.update(tensor.numpy().data)
        return digest.hexdigest()[:16]


def in_turn(y: Tensor) -> Tensor:
    """The order, [N], that takes the first image of each class, then the second of each, ...: the first n images of a
    folder are then drawn evenly from all classes. y: labels, [N]."""
    seen: Counter[int] = Counter()
    place = []
    for label in y.tolist():
        place.append((seen[label], label))
        seen[label] += 1
    return torch.tensor(sorted(range(len(place)), key=place.__getitem__), dtype=torch.int64)


def hold_out(images: ImageData, seed: int) -> tuple[Split, Split]:
    """(training part, validation part): a random share of every class is held out of train, `validation` in all.

    Without a number, 1,000, but never more than half. The choice depends on `seed` alone.
    Raises DataError where nothing would be left to train on.
    """
    part, n = images.train, len(images.train.y)
    wanted = min(1000, n // 2) if images.validation is None else images.validation
    if not 0 < wanted < n:
        raise DataError(
            f"{images.name} (given validation={wanted})",
            f"train has {n} images",
            f"Set the source's validation={max(1, n // 10)}.",
        )
    rng = np.random.default_rng(seed)
    # Shuffle, sort by class, and take every (n / wanted)-th: each class gives its share, to the nearest image.
    order = rng.permutation(n)
    order = order[np.argsort(part.y.cpu().numpy()[order], kind="stable")]
    held = np.zeros(n, dtype=bool)
    held[order[((np.arange(wanted) + 0.5) * n / wanted).astype(np.int64)]] = True
    mask = torch.from_numpy(held).to(part.x.device)
    return Split(part.x[~mask], part.y[~mask]), Split(part.x[mask], part.y[mask])


def batch_indices(n: int, size: int, rng: torch.Generator) -> list[Tensor]:
    """The indices of one epoch's batches: every example once, in random order; a last short batch is kept, but one
    of a single example, whose statistics a BatchNorm cannot do with, joins its neighbour."""
    chunks = list(torch.randperm(n, generator=rng).split(size))
    if size > 1 and len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    return chunks


def channels_first(x: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, C] -> [N, C, H, W], a view; the channels come last where there are 1, 3 or 4 of them at
    the end, and not 1 or 3, or those of a square image, at the beginning."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4 or x.shape[3] not in (1, 3, 4) or x.shape[1] in (1, 3) or x.shape[1] != x.shape[2] == x.shape[3]:
        return x
    return x.permute(0, 3, 1, 2)


def to_float(x: Tensor) -> Tensor:
    """Bytes to [0, 1]."""
    return x.float() / 255


def _check_split(who: str, part: Split, classes: int) -> None:
    if part.x.dtype != torch.uint8:
        raise DataError(who, f"images are {str(part.x.dtype)[6:]}, expected bytes (uint8, 0 ... 255)")
    if part.x.ndim != 4 or 0 in part.x.shape:
        raise DataError(who, f"images have shape {list(part.x.shape)}, expected [N, C, H, W] with at least one image")
    if part.y.dtype != torch.int64:
        raise DataError(who, f"labels are {str(part.y.dtype)[6:]}, expected int64")
    if part.y.shape != part.x.shape[:1]:
        raise DataError(who, f"{len(part.x)} images but labels of shape {list(part.y.shape)}")
    low, high = int(part.y.min()), int(part.y.max())
    if low < 0 or high >= classes:
        raise DataError(who, f"labels span {low} ... {high}, outside the {classes} classes 0 ... {classes - 1}")


def _as_stored(x: Tensor) -> Tensor:
    """Images [N, C, H, W] in the order in which their bytes lie, channels last or first, so that nothing is copied."""
    last = x.permute(0, 2, 3, 1)
    return last if last.is_contiguous() else x.contiguous()


def tensor_hash(tensors: Tensor | Iterable[Tensor]) -> str:
    """A hash of the bytes of a tensor, or of several one after another; 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
