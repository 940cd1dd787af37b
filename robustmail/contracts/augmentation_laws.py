"""The laws of augmentations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustmail.contracts.samples import SIZE, Law, all_finite, changes_of_generators, random_images
from robustmail.functional import one_hot

__all__ = ["AUGMENTATION_LAWS"]


def _augmented(augmentation: Any, n: int = SIZE, channels: int = 3, classes: int = 10) -> tuple[Tensor, Tensor]:
    """(x, targets) of a sample batch, drawn from one and the same generator."""
    x, y = random_images(n, classes)
    x, targets = augmentation(x[:, :channels], one_hot(y, classes), torch.Generator().manual_seed(0))
    return x, targets


def _shape(augmentation: Any) -> str | None:
    for n, channels, classes in ((SIZE, 3, 10), (1, 3, 10), (SIZE, 1, 10), (SIZE, 3, 2)):
        for name, part, shape in zip(
            ("images", "targets"),
            _augmented(augmentation, n, channels, classes),
            ((n, channels, 8, 8), (n, classes)),
            strict=True,
        ):
            if not isinstance(part, Tensor) or part.shape != shape or part.dtype != torch.float32:
                returned = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                return f"returned {name} as {returned}, expected torch.float32 {list(shape)}"
    return None


def _box(augmentation: Any) -> str | None:
    x, _ = _augmented(augmentation)
    low, high = x.min().item(), x.max().item()
    return all_finite(x) or (None if low >= 0 and high <= 1 else f"pixels span [{low:.3g}, {high:.3g}]")


def _probabilities(augmentation: Any) -> str | None:
    _, targets = _augmented(augmentation)
    fine = targets.min() >= 0 and (targets.sum(1) - 1).abs().max() < 1e-4
    return None if fine else f"returned targets {[round(t, 3) for t in targets[0].tolist()]}"


def _same_draws(augmentation: Any) -> str | None:
    x, y = random_images()
    first, second = (
        augmentation(x.clone(), one_hot(y, 10), torch.Generator().manual_seed(0)) for _ in range(2)
    )  # fmt: skip
    return None if all(map(torch.equal, first, second)) else "differs for two generators of the same seed"


def _generators_unchanged(augmentation: Any) -> str | None:
    x, y = random_images()
    rng = torch.Generator().manual_seed(0)
    return changes_of_generators(lambda: augmentation(x, one_hot(y, 10), rng))


def _inputs_unchanged(augmentation: Any) -> str | None:
    x, y = random_images()
    before, targets = x.clone(), one_hot(y, 10)
    augmentation(x, targets, torch.Generator().manual_seed(0))
    same = torch.equal(x, before) and torch.equal(targets, one_hot(y, 10))
    return None if same else "wrote into the images or targets it was given"


AUGMENTATION_LAWS: dict[str, Law] = {
    "images and targets of the same shape": _shape,
    "stays in the box": _box,
    "targets are probabilities": _probabilities,
    "the same for the same generator": _same_draws,
    "leaves the global generators alone": _generators_unchanged,
    "does not write into its input": _inputs_unchanged,
}
