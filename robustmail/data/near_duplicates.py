"""Near-copies of the images on which a model is validated or tested, among the extra images that it is trained on.

Two images are compared in two steps. A descriptor, the image averaged down to 6 x 6 pixels in each channel without its
mean and contrast, finds the nearest candidate; the descriptors of all pairs are compared, in blocks. Then the pixels
decide: two images are near-copies where their correlation, at the best of nine shifts by at most one pixel, is COPY or
more. Brightness and contrast cancel out of both.

Why 0.93: between CIFAR-10's own 50,000 training and 10,000 test images, 98 % of the 297 pairs from there on have the
same class, as copies must; of the 287 pairs from 0.88 to 0.90 it is 70 %, two ships on one sea among them. The 297 are
of 2.3 % of the test images. Barz and Denzler (Do We Train on Test Data?, 2020) looked at pairs, and found copies of
3.3 %. Data differ, so the share that is found among the original training images is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from robustmail.data.dataset import Split

__all__ = ["COPY", "NearCopy", "find_near_copies"]

SIDE = 6  # of a descriptor, in pixels
SIMILAR = 0.9  # of descriptors: 99 % of images that are shifted by a pixel in both directions are within it
COPY = 0.93
"""the correlation of pixels from which on an image is a near-copy"""
TOGETHER = 1024  # pairs whose pixels are compared together


class NearCopy(NamedTuple):
    """An image that is nearly the same as another."""

    image: int
    target: int
    """the number of the image that it is a copy of"""
    correlation: float


def find_near_copies(
    blocks: Iterable[Split],
    targets: Mapping[str, Tensor],
    flip: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, list[NearCopy]]:
    """Compare images with every image of several sets; for each set those that are near-copies of one in it.

    blocks: some hundred images each, which are numbered one after another.
    targets: sets of images [N, C, H, W] uint8, by name.
    flip: whether mirror images are copies, too, as they are where training images are mirrored.
    device: where descriptors are compared.
    progress: called with the number of images after each block.

    An image is compared by its pixels with the one image of the set whose descriptor is nearest.
    """
    mirrored = {name: torch.cat([x, x.flip(3)]) if flip else x for name, x in targets.items()}
    descriptors = {name: torch.cat([_descriptor(b) for b in x.split(TOGETHER)]).to(device)
                   for name, x in mirrored.items()}  # fmt: skip
    found: dict[str, list[NearCopy]] = {name: [] for name in targets}
    done = 0
    for block in blocks:
        own = _descriptor(block.x).to(device)
        for name, x in mirrored.items():
            similarity, nearest = (part.cpu() for part in (own @ descriptors[name].T).max(1))
            which = (similarity >= SIMILAR).nonzero().flatten()
            for some in which.split(TOGETHER):
                values = _correlation(block.x[some], x[nearest[some]])
                found[name] += [
                    NearCopy(done + int(i), int(nearest[i]) % len(targets[name]), float(value))
                    for i, value in zip(some, values, strict=True) if value >= COPY
                ]  # fmt: skip
        done += len(block.y)
        progress(done)
    return found


def _descriptor(x: Tensor) -> Tensor:
    """[N, C, H, W] uint8 -> [N, C * SIDE * SIDE], of mean 0 and norm 1; a flat image has norm 0."""
    return _normalised(adaptive_avg_pool2d(x.float(), SIDE))


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of the pixels of pairs of images, [M, C, H, W] each, at the best shift; [M]."""
    height, width = a.shape[2:]
    shift = 1 if min(height, width) > 4 else 0
    core = _normalised(b[:, :, shift : height - shift, shift : width - shift].float())
    best = core.new_full((len(a),), -1.0)
    for top in range(2 * shift + 1):
        for left in range(2 * shift + 1):
            window = a[:, :, top : top + height - 2 * shift, left : left + width - 2 * shift]
            best = torch.maximum(best, (_normalised(window.float()) * core).sum(1))
    return best


def _normalised(x: Tensor) -> Tensor:
    """Vectors [N, D] of mean 0 and norm 1."""
    vectors = x.flatten(1)
    centred = vectors - vectors.mean(1, keepdim=True)
    length: Tensor = centred.norm(dim=1, keepdim=True)
    return centred / length.clamp_min(1e-6)
