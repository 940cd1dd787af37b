"""A network small enough for adversarial training in a minute on a CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.models.timm_interface import Network, build_in_timm, config

__all__ = ["small_cnn"]

default_cfgs = generate_default_cfgs({"small_cnn.none": config()})


class SmallCNN(Network):
    """Three 3x3 convolutions of w, 2w and 4w channels with BatchNorm, the last two with stride 2."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(4 * width, num_classes, drop_rate)
        widths = [in_chans, width, 2 * width, 4 * width]
        for i, (in_channels, out_channels) in enumerate(pairwise(widths), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(in_channels, out_channels, 3, 1 if i == 1 else 2, 1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(out_channels))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4 width, H/4, W/4]"""
        for i in range(1, 4):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)))
        return x


@register_model
def small_cnn(pretrained: bool = False, **options: Any) -> nn.Module:
    """Three convolutions for images of 8x8 to 64x64 with 1 or 3 channels."""
    return build_in_timm(SmallCNN, "small_cnn", pretrained, **options)
