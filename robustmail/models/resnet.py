"""ResNets for CIFAR (3x3 stem, no max-pool): ResNet-18 post- and pre-activation in several widths, and deeper ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from robustmail.models.timm_interface import ACTIVATIONS, Network, block_stage, build_in_timm, config

__all__ = [
    "cifar_preact_resnet18",
    "cifar_preact_resnet18_silu",
    "cifar_preact_resnet18_w16",
    "cifar_resnet18",
    "cifar_resnet18_silu",
    "cifar_resnet18_w16",
    "cifar_resnet18_w32",
    "cifar_resnet18_w8",
]

default_cfgs = generate_default_cfgs({f"{name}.none": config() for name in __all__})


class ResNet(Network):
    """Four stages of `blocks` blocks each, two by default, of widths w, 2w, 4w, 8w and strides 1, 2, 2, 2.

    bottleneck: blocks of three convolutions, 1x1, 3x3 and 1x1, with four times as many channels at their end, as in
    ResNet-50; not with preact. act: the activation, "relu" or "silu".
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        width: int = 64,
        preact: bool = False,
        blocks: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        act: str = "relu",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        block = PreActBlock if preact else Bottleneck if bottleneck else Block
        top = 4 if block is Bottleneck else 1
        super().__init__(8 * top * width, num_classes, drop_rate)
        self.act = ACTIVATIONS[act]()
        self.conv1 = _conv3(in_chans, width)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(width)
        channels = [width, *(top * width * 2**i for i in range(4))]
        for i, (in_channels, out_channels) in enumerate(pairwise(channels), start=1):
            stage = block_stage(partial(block, act=act), in_channels, out_channels, 1 if i == 1 else 2, blocks[i - 1])
            self.add_module(f"layer{i}", stage)
        self.bn = nn.BatchNorm2d(8 * width) if preact else nn.Identity()
        self.preact = preact

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 8 width, H/8, W/8]"""
        x = self.conv1(x)
        x = x if self.preact else self.act(self.bn1(x))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return self.act(self.bn(x)) if self.preact else x


class Block(nn.Module):
    """act(bn(conv(act(bn(conv(x))))) + shortcut(x))"""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str = "relu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]()
        self.conv1, self.bn1 = _conv3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
        self.conv2, self.bn2 = _conv3(out_channels, out_channels), nn.BatchNorm2d(out_channels)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        out = self.act(self.bn1(self.conv1(x)))
        total: Tensor = self.act(self.bn2(self.conv2(out)) + self.shortcut(x))
        return total


class Bottleneck(nn.Module):
    """As Block, of three convolutions: 1x1 to a quarter of the output's channels, 3x3 with the stride, and 1x1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str = "relu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]()
        width = out_channels // 4
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.shortcut = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        out = self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        total: Tensor = self.act(self.bn3(self.conv3(out)) + self.shortcut(x))
        return total


class PreActBlock(nn.Module):
    """conv(act(bn(conv(act(bn(x)))))) + shortcut(x); a convolution as shortcut gets act(bn(x)) instead of x."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str = "relu") -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]()
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), _conv3(in_channels, out_channels, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out_channels), _conv3(out_channels, out_channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        active = self.act(self.bn1(x))
        shortcut = self.shortcut(active) if self.shortcut else x
        out: Tensor = shortcut + self.conv2(self.act(self.bn2(self.conv1(active))))
        return out


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A shortcut: a 1x1 convolution and BatchNorm where the shape changes, else nothing."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _conv3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


@register_model
def cifar_resnet18(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 of the MAIL, MART and GAIRAT papers: 11,173,962 parameters with 10 classes."""
    return build_in_timm(ResNet, "cifar_resnet18", pretrained, **options)


@register_model
def cifar_resnet18_silu(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 with SiLU in place of ReLU."""
    return build_in_timm(ResNet, "cifar_resnet18_silu", pretrained, **{"act": "silu", **options})


@register_model
def cifar_resnet18_w32(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 at half the width: a quarter of the work."""
    return build_in_timm(ResNet, "cifar_resnet18_w32", pretrained, **{"width": 32, **options})


@register_model
def cifar_resnet18_w16(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 at a quarter of the width, for CPUs: a sixteenth of the work."""
    return build_in_timm(ResNet, "cifar_resnet18_w16", pretrained, **{"width": 16, **options})


@register_model
def cifar_resnet18_w8(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 at an eighth of the width, for tests."""
    return build_in_timm(ResNet, "cifar_resnet18_w8", pretrained, **{"width": 8, **options})


@register_model
def cifar_preact_resnet18(pretrained: bool = False, **options: Any) -> nn.Module:
    """Pre-activation ResNet-18 of the AWP and robust-overfitting papers."""
    return build_in_timm(ResNet, "cifar_preact_resnet18", pretrained, **{"preact": True, **options})


@register_model
def cifar_preact_resnet18_silu(pretrained: bool = False, **options: Any) -> nn.Module:
    """Pre-activation ResNet-18 with SiLU in place of ReLU."""
    knobs = {"preact": True, "act": "silu", **options}
    return build_in_timm(ResNet, "cifar_preact_resnet18_silu", pretrained, **knobs)


@register_model
def cifar_preact_resnet18_w16(pretrained: bool = False, **options: Any) -> nn.Module:
    """Pre-activation ResNet-18 at a quarter of the width, for CPUs."""
    return build_in_timm(ResNet, "cifar_preact_resnet18_w16", pretrained, **{"preact": True, "width": 16, **options})
