"""The networks of RobustBench's names, with the names of tensors that their files have."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from robustmail.models.timm_interface import ACTIVATIONS, block_stage
from robustmail.models.wide_resnet import initialise

__all__ = [
    "DMPreActResNet", "DMWideResNet", "PreActResNet", "STATISTICS", "Statistics", "WideResNet", "Normalize",
    "use_statistics",
]  # fmt: skip

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""mean and std inside DeepMind's networks and those of DM-Improves-AT, by data set"""


class WideResNet(nn.Module):
    """The Wide ResNet of TRADES: depth 6n + 4, widths 16, 16w, 32w, 64w.

    num_classes: of the last layer.
    in_chans: channels of the images.
    depth, width: as in WRN-depth-width.
    act: the activation, "relu" or "silu".
    sub_block1: have the copy of the first group that TRADES' code builds and never uses.
    bias: of the last layer.
    cosine: divide features and rows of the last layer by their lengths (Pang et al. 2020, hypersphere embedding).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: int = 34,
        width: int = 10,
        act: str = "relu",
        sub_block1: bool = False,
        bias: bool = True,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4, not {depth}")
        widths, block = (16, 16 * width, 32 * width, 64 * width), partial(WideBlock, act=act)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        for i, (in_channels, out_channels) in enumerate(pairwise(widths), start=1):
            for name in ("block1", "sub_block1") if i == 1 and sub_block1 else (f"block{i}",):
                stage = block_stage(block, in_channels, out_channels, 1 if i == 1 else 2, (depth - 4) // 6)
                self.add_module(name, nn.Sequential(OrderedDict(layer=stage)))
        self.bn1, self.act = nn.BatchNorm2d(64 * width), ACTIVATIONS[act]()
        self.fc = nn.Linear(64 * width, num_classes, bias)
        self.cosine = cosine
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        x = self.conv1(x)
        for i in range(1, 4):
            x = self.get_submodule(f"block{i}")(x)
        x = self.act(self.bn1(x)).mean((2, 3))
        if self.cosine:
            return F.linear(F.normalize(x), F.normalize(self.fc.weight), self.fc.bias)
        logits: Tensor = self.fc(x)
        return logits


class WideBlock(nn.Module):
    """Pre-activation basic block; a convolution as shortcut gets act(bn(x)) instead of x."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]()
        self.bn1, self.bn2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.convShortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        active = self.act(self.bn1(x))
        shortcut = self.convShortcut(active) if self.convShortcut else x
        out: Tensor = shortcut + self.conv2(self.act(self.bn2(self.conv1(active))))
        return out


class Normalize(nn.Module):
    """(x - mean) / std; the numbers are not in the state dict, as in RobustBench's networks."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, C, H, W]"""
        return (x - self.mean) / self.std


def use_statistics(network: nn.Module, statistics: tuple[Sequence[float], Sequence[float]]) -> None:
    """Let a network of this module that normalises its images do so by the mean and std of a file."""
    for module in network.modules():
        if isinstance(module, Normalize):
            for buffer, values in zip((module.mean, module.std), statistics, strict=True):
                buffer.copy_(torch.tensor(values).view(-1, 1, 1).expand_as(buffer))


class DMWideResNet(nn.Module):
    """DeepMind's Wide ResNet (Gowal et al. 2020), which takes images in [0, 1] and normalises them itself.

    A 3x3 convolution of stride 2 is padded right and below only, as TensorFlow's "SAME" does.
    num_classes: of the last layer.
    in_chans: channels of the images.
    widths: channels of the stem and of the three groups.
    blocks: in each group.
    act: the activation, "silu" or "relu".
    statistics: (mean, std) of the images, per channel.
    squeeze: share of a block's channels in its squeeze-and-excitation, as in RaWideResNet (Peng et al. 2023); 0: none.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (16, 160, 320, 640),
        blocks: Sequence[int] = (4, 4, 4),
        act: str = "silu",
        statistics: Statistics = STATISTICS["cifar10"],
        squeeze: float = 0.0,
    ) -> None:
        super().__init__()
        block = partial(DMBlock, act=act, squeeze=squeeze)
        self.normalize = Normalize(statistics)
        self.init_conv = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        groups = []
        for i, (in_channels, out_channels) in enumerate(pairwise(widths)):
            stage = block_stage(block, in_channels, out_channels, 1 if i == 0 else 2, blocks[i])
            groups.append(nn.Sequential(OrderedDict(block=stage)))
        self.layer = nn.Sequential(*groups)
        self.batchnorm, self.act = nn.BatchNorm2d(widths[-1]), ACTIVATIONS[act]()
        self.logits = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes]"""
        x = self.layer(self.init_conv(self.normalize(x)))
        logits: Tensor = self.logits(self.act(self.batchnorm(x)).mean((2, 3)))
        return logits


class DMBlock(nn.Module):
    """As WideBlock, padded as "SAME", with squeeze-and-excitation after the second convolution where `squeeze` > 0."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str, squeeze: float) -> None:
        super().__init__()
        self.act, self.stride = ACTIVATIONS[act](), stride
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv_0 = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)
        self.conv_1 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.se = SqueezeExcitation(out_channels, round(squeeze * out_channels)) if squeeze else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        active = self.act(self.batchnorm_0(x))
        shortcut = self.shortcut(active) if self.shortcut else x
        out: Tensor = self.conv_1(self.act(self.batchnorm_1(self.conv_0(_pad_same(active, self.stride)))))
        return shortcut + (self.se(out) if self.se else out)


class DMPreActResNet(nn.Module):
    """DeepMind's PreActResNet (Rebuffi et al. 2021), which takes images in [0, 1] and normalises them itself.

    A shortcut that changes the shape is a 3x3 convolution of the block's input, before its BatchNorm.
    num_classes, in_chans, act, statistics: as for DMWideResNet. blocks: in the four stages, of widths 64 to 512.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        blocks: Sequence[int] = (2, 2, 2, 2),
        act: str = "silu",
        statistics: Statistics = STATISTICS["cifar10"],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(statistics)
        self.conv_2d = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        for i, (in_channels, out_channels) in enumerate(pairwise((64, 64, 128, 256, 512))):
            block = partial(DMPreActBlock, act=act)
            self.add_module(f"layer_{i}", block_stage(block, in_channels, out_channels, 1 if i == 0 else 2, blocks[i]))
        self.batchnorm, self.act = nn.BatchNorm2d(512), ACTIVATIONS[act]()
        self.logits = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes]"""
        x = self.conv_2d(self.normalize(x))
        for i in range(4):
            x = self.get_submodule(f"layer_{i}")(x)
        logits: Tensor = self.logits(self.act(self.batchnorm(x)).mean((2, 3)))
        return logits


class DMPreActBlock(nn.Module):
    """conv(act(bn(conv(act(bn(x)))))) + shortcut(x), padded as "SAME"."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, act: str) -> None:
        super().__init__()
        self.act, self.stride = ACTIVATIONS[act](), stride
        self.batchnorm_0, self.batchnorm_1 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv_2d_1 = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)
        self.conv_2d_2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 3, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        shortcut = self.shortcut(_pad_same(x, self.stride)) if self.shortcut else x
        out = self.conv_2d_1(_pad_same(self.act(self.batchnorm_0(x)), self.stride))
        total: Tensor = shortcut + self.conv_2d_2(self.act(self.batchnorm_1(out)))
        return total


def _pad_same(x: Tensor, stride: int) -> Tensor:
    """Pad for a 3x3 convolution as TensorFlow's "SAME" does for even sizes."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


class PreActResNet(nn.Module):
    """RobustBench's PreActResNet for CIFAR, in its two forms.

    num_classes, in_chans: as for WideResNet. blocks: in the four stages. bottleneck: blocks of three convolutions.
    bn: have BatchNorm and relu before the last layer; then a shortcut with a convolution gets relu(bn(x)), else x. The
    zoo's PreActResNets are of these two forms, and bottlenecks always take relu(bn(x)).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        blocks: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        bn: bool = False,
    ) -> None:
        super().__init__()
        top = 4 if bottleneck else 1
        block = partial(PreActBlock, kernels=(1, 3, 1) if bottleneck else (3, 3), is_active=bn or bottleneck)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        for i, (in_channels, out_channels) in enumerate(pairwise((64, *(top * 64 * 2**i for i in range(4)))), start=1):
            stage = block_stage(block, in_channels, out_channels, 1 if i == 1 else 2, blocks[i - 1])
            self.add_module(f"layer{i}", stage)
        self.bn = nn.BatchNorm2d(top * 512) if bn else None
        self.linear = nn.Linear(top * 512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        x = self.conv1(x)
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        x = F.relu(self.bn(x)) if self.bn else x
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class PreActBlock(nn.Module):
    """Convolutions, each after BatchNorm and relu, plus shortcut(x), or shortcut(relu(bn(x))) where `is_active`.

    in_channels, out_channels, stride: of the block; of three convolutions the first two have a quarter of the channels.
    kernels: sizes of the convolutions; the first 3x3 one has the stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, kernels: tuple[int, ...], is_active: bool
    ) -> None:
        super().__init__()
        inner = out_channels // 4 if len(kernels) == 3 else out_channels
        channels = (in_channels, *[inner] * (len(kernels) - 1), out_channels)
        for i, (kernel, (a, b)) in enumerate(zip(kernels, pairwise(channels), strict=True), start=1):
            step = stride if i == kernels.index(3) + 1 else 1
            self.add_module(f"bn{i}", nn.BatchNorm2d(a))
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
        self.depth, self.is_active = len(kernels), is_active
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        out = active = F.relu(self.get_submodule("bn1")(x))
        for i in range(1, self.depth + 1):
            out = out if i == 1 else F.relu(self.get_submodule(f"bn{i}")(out))
            out = self.get_submodule(f"conv{i}")(out)
        shortcut = self.shortcut(active if self.is_active else x) if self.shortcut else x
        return out + shortcut
