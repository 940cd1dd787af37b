"""A recipe on a device that holds few images at once: a forward pass of more is out of memory."""

from __future__ import annotations

import os

import torch
from torch import nn

from robustmail import PGD, SGD, TRADES, Recipe, Sigmoid, digits, pm_adv

MOST = {"images": int(os.environ.get("TEST_MOST_IMAGES", "100"))}


class Limited(nn.Module):
    """A linear network without BatchNorm."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(64 * channels, classes), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) > MOST["images"]:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} images")
        return self.head(x.flatten(1))


class Normed(Limited):
    """The same with BatchNorm."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


recipe = Recipe(
    data=digits(), model=Limited, attack=PGD(eps=0.1, alpha=0.05, steps=2, loss="kl", start="gaussian"),
    objective=TRADES(), epochs=1, margin=pm_adv, weighter=Sigmoid(slope=2.0, bias=0.0), batch=512, validate="pgd2",
    evaluate=("nat", "pgd2"), optimizer=SGD(lr=0.1), test_size=50, precision="fp32",
)  # fmt: skip
normed = recipe.but(model=Normed)
