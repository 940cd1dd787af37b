"""How images are prepared for a network that timm has weights of: size, crop, interpolation, normalisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PretrainedConfig", "config_of", "pretrained_config"]

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")
MAX_SIDE = 4096


@dataclass(frozen=True)
class PretrainedConfig:
    """What is done to an image: shorter side to `resize` pixels, the middle `crop` x `crop` pixels, (x - mean) / std.

    resize, crop: in pixels. interpolation: bicubic, bilinear, nearest or lanczos. mean, std: per channel, for images in
    [0, 1]. squash: both sides are resized, and the ratio is lost. fixed_size: the network takes no other size.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    squash: bool = False
    fixed_size: bool = False


def pretrained_config(name: str) -> PretrainedConfig | None:
    """How timm prepares images for its weights of a network; nothing is downloaded.

    name: timm's, such as resnet50 or resnet50.a1_in1k, or RobustBench's for one of timm's, such as Swin-B. None for all
    other names, and for networks that timm has no weights of.
    """
    import timm

    from robustmail.models.classifier import is_in_timm
    from robustmail.models.robustbench import IMAGENET

    name = IMAGENET.get(name.lower().replace("_", "-"), name)
    found = timm.get_pretrained_cfg(name) if is_in_timm(name) else None
    return config_of(found.to_dict()) if found is not None and found.has_weights else None


def config_of(config: Mapping[str, Any]) -> PretrainedConfig | None:
    """A PretrainedConfig of timm's `pretrained_cfg`, which may come from a file; None if a value cannot be used."""
    size, mean, std = ([*value] if isinstance(value := config.get(name), (list, tuple)) else []
                       for name in ("input_size", "mean", "std"))  # fmt: skip
    crop_pct, interpolation = config.get("crop_pct", 0.875), config.get("interpolation", "bicubic")
    if not (len(size) == 3 and size[1] == size[2] and all(isinstance(n, int) and 1 <= n <= MAX_SIDE for n in size)):
        return None
    if interpolation not in INTERPOLATIONS or not _within([crop_pct], 0.1, 1):
        return None
    if not len(mean) == len(std) == size[0] or not _within(mean, 0, 1) or not _within(std, 1e-3, 2):
        return None
    squash, fixed_size = config.get("crop_mode") == "squash", config.get("fixed_input_size") is True
    resize = size[2] if squash else math.floor(size[2] / crop_pct)
    return PretrainedConfig(resize, size[2], interpolation, tuple(mean), tuple(std), squash, fixed_size)


def _within(values: list[Any], least: float, most: float) -> bool:
    """Whether all are numbers, from `least` to `most`."""
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and least <= v <= most for v in values)
