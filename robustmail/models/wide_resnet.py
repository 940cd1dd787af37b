"""Wide ResNets for CIFAR (Zagoruyko and Komodakis 2016), as TRADES and its successors use them."""

from __future__ import annotations

import math
import re
from functools import partial
from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, is_model, register_model
from torch import Tensor, nn

from robustmail.models.timm_interface import ACTIVATIONS, Network, block_stage, build_in_timm, config

__all__ = ["cifar_wrn16_2", "cifar_wrn28_10", "cifar_wrn32_10", "cifar_wrn34_10"]

MAX_DEPTH, MAX_WIDTH = 1000, 100  # a name may come from a file

default_cfgs = generate_default_cfgs({f"{name}.none": config() for name in __all__})


class WideResNet(Network):
    """A 16-channel stem and three groups of (depth - 4) / 6 pre-activation blocks, widths 16w, 32w, 64w.

    act: the activation, "relu" or, as in the networks of Gowal et al. 2020 and their successors, "silu".
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: int = 34,
        width: int = 10,
        act: str = "relu",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(64 * width, num_classes, drop_rate)
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4, not {depth}")
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        for i, (in_channels, out_channels) in enumerate(pairwise(widths), start=1):
            block = partial(WideBlock, act=act)
            stage = block_stage(block, in_channels, out_channels, 1 if i == 1 else 2, (depth - 4) // 6)
            self.add_module(f"block{i}", stage)
        self.bn1, self.act = nn.BatchNorm2d(64 * width), ACTIVATIONS[act]()
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 64 width, H/4, W/4]"""
        x = self.conv1(x)
        for i in range(1, 4):
            x = self.get_submodule(f"block{i}")(x)
        features: Tensor = self.act(self.bn1(x))
        return features


def initialise(network: nn.Module) -> None:
    """Draw convolutions as Zagoruyko's code does, with a variance of 2 / fan-out; biases of linear layers are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class WideBlock(nn.Module):
    """Pre-activation basic block; a convolution as shortcut gets act(bn(x)) instead of x."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str = "relu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        active = self.act(self.bn1(x))
        shortcut = self.shortcut(active) if self.shortcut else x
        out: Tensor = shortcut + self.conv2(self.act(self.bn2(self.conv1(active))))
        return out


def nearest_size(name: str) -> str | None:
    """The nearest name of a Wide ResNet that there is, for a name like cifar_wrnD_W or cifar_wrnD_W_silu; else None.

    D is 6n + 4, from 10 to MAX_DEPTH; W is from 1 to MAX_WIDTH.
    """
    match = _SIZE.fullmatch(name)
    if match is None:
        return None
    depth = min(max(6 * round((int(match[1]) - 4) / 6) + 4, 10), MAX_DEPTH)
    return f"cifar_wrn{depth}_{min(max(int(match[2]), 1), MAX_WIDTH)}{match[3]}"


_SIZE = re.compile(r"cifar_wrn(\d{1,9})_(\d{1,9})(_silu|)", re.ASCII)


def register_size(name: str) -> None:
    """Register the Wide ResNet of that name in timm: cifar_wrnD_W or cifar_wrnD_W_silu, of a size that there is.

    Does nothing for any other name.
    """
    match = _SIZE.fullmatch(name)
    if match is None or nearest_size(name) != name or is_model(name):
        return
    size = {"depth": int(match[1]), "width": int(match[2]), "act": "silu" if match[3] else "relu"}

    def network(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_in_timm(WideResNet, name, pretrained, **{**size, **options})

    network.__name__ = network.__qualname__ = name
    default_cfgs.update(generate_default_cfgs({f"{name}.none": config()}))
    register_model(network)


@register_model
def cifar_wrn34_10(pretrained: bool = False, **options: Any) -> nn.Module:
    """WRN-34-10 of TRADES, MART and MAIL's code: 46,160,474 parameters with 10 classes."""
    return build_in_timm(WideResNet, "cifar_wrn34_10", pretrained, **options)


@register_model
def cifar_wrn32_10(pretrained: bool = False, **options: Any) -> nn.Module:
    """The paper's WRN-32-10: the same network as cifar_wrn34_10, its depth counted without the shortcuts."""
    return build_in_timm(WideResNet, "cifar_wrn32_10", pretrained, **options)


@register_model
def cifar_wrn28_10(pretrained: bool = False, **options: Any) -> nn.Module:
    """WRN-28-10, the usual network with extra data."""
    return build_in_timm(WideResNet, "cifar_wrn28_10", pretrained, **{"depth": 28, **options})


@register_model
def cifar_wrn16_2(pretrained: bool = False, **options: Any) -> nn.Module:
    """WRN-16-2, small enough for a CPU."""
    return build_in_timm(WideResNet, "cifar_wrn16_2", pretrained, **{"depth": 16, "width": 2, **options})
