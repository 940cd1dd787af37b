"""The architectures of RobustBench's model zoo for CIFAR, by its names, with its names of parameters.

RobustBench writes "WideResNet-28-10" for networks of different code: TRADES' (`block1.layer.0.conv1`), DeepMind's
(`layer.0.block.0.conv_0`: SiLU, and images are normalised inside) and others. So a name has several `architectures`,
and the names of a file's tensors tell which of them it holds.

Sources: robustbench/model_zoo of RobustBench/robustbench, and core/models of wzekai99/DM-Improves-AT.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.models import create_model, is_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from robustmail.models.resnet import ResNet
from robustmail.models.robustbench_zoo import ZOO
from robustmail.models.timm_interface import ACTIVATIONS, block_stage
from robustmail.models.wide_resnet import WideResNet as OurWideResNet
from robustmail.models.wide_resnet import initialise

__all__ = [
    "NAMES",
    "Architecture",
    "DMPreActResNet",
    "DMWideResNet",
    "PreActResNet",
    "WideResNet",
    "architectures",
    "use_statistics",
    "zoo_normalization",
]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""mean and std inside DeepMind's networks and those of DM-Improves-AT, by data set"""
XCIT_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
XCITS = {"s12": (384, 8), "m12": (512, 8), "l12": (768, 16)}
"""channels and heads"""
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""blocks in the four stages of a ResNet; bottlenecks from 50 layers on"""
IMAGENET = {
    "convnext-t": "convnext_tiny", "convnext-s": "convnext_small", "convnext-b": "convnext_base",
    "convnext-l": "convnext_large", "swin-b": "swin_base_patch4_window7_224", "swin-l": "swin_large_patch4_window7_224",
    "vit-b": "vit_base_patch16_224",
}  # fmt: skip
"""RobustBench's names of ImageNet networks that timm has"""
MAX_DEPTH, MAX_WIDTH = 300, 64  # a name may come from a file

NAMES = (
    "ResNet-18", "ResNet-34", "ResNet-50", "PreActResNet-18", "PreActResNet-34", "PreActResNet-50",
    *(f"{kind}WideResNet-{size}" for kind in ("", "DM") for size in ("28-4", "28-10", "34-5", "34-10", "34-15", "34-20",
                                                                     "70-16", "82-8", "94-16", "106-16")),
    "DMPreActResNet-18", "DMPreActResNet-34", "RaWideResNet-70-16", "BoostingWideResNet-34-20",
    "XCiT-S12", "XCiT-M12", "XCiT-L12", "ConvNeXt-T", "ConvNeXt-S", "ConvNeXt-B", "ConvNeXt-L", "Swin-B", "Swin-L",
    "ViT-B", *ZOO,
)  # fmt: skip
"""names to suggest; Wide ResNets have any depth 6n + 4 and any width"""


@dataclass(frozen=True)
class Architecture:
    """One network that a name stands for.

    title: what it is, in words, which the network gets as its attribute `title`. make: builds it, as `build`.
    """

    title: str
    make: Callable[[int, int, Collection[str]], nn.Module]

    def build(self, classes: int, channels: int, names: Collection[str] = ()) -> nn.Module:
        """The network with new weights. names: of the file's tensors, () if there is no file.

        Raises ValueError for classes or channels that the network is not made for.
        """
        network = self.make(classes, channels, names)
        network.title = self.title  # type: ignore[assignment]
        return network


def architectures(name: str) -> list[Architecture]:
    """The networks that a name of RobustBench stands for; the first is the one to train. [] for any other name.

    name: of an architecture, such as WideResNet-28-10, PreActResNet-18 or RaWideResNet-70-16, or of a model in its
    zoo, such as Carmon2019Unlabeled; letter case, "-" and "_" do not count. `-silu` and `-relu` at the end change the
    activation; `-cifar10`, `-cifar100` and `-svhn` the statistics inside DMWideResNet and DMPreActResNet, which else
    follow from the number of classes.
    """
    if entries := _entries(name):
        named = dict.fromkeys(architecture for architecture, _, _ in entries)
        return [architecture for one in named for architecture in architectures(one)]
    plain = name.lower().replace("_", "-")
    if timm_name := IMAGENET.get(plain):
        return [_of_timm(timm_name)]
    if match := re.fullmatch(r"(?:debenedetti2022light-)?xcit-?([sml]12)", plain):
        return [_xcit(match[1])]
    found = _NAME.fullmatch(plain)
    if found is None:
        return []
    depth, width = int(found["depth"]), int(found["width"] or 0)
    options = set(filter(None, found["options"].split("-")))
    act = "relu" if "relu" in options else "silu" if options & {"silu", "swish"} else None
    data = next((name for name in STATISTICS if name in options), None)
    kind = re.sub("-", "", found["kind"])
    if depth > MAX_DEPTH or width > MAX_WIDTH or len(options) > (act is not None) + (data is not None):
        return []
    if kind in ("wideresnet", "wrn"):
        return _wide_resnets(found["family"], depth, width, act, data)
    return [] if width else _resnets(found["family"], kind, depth, act, data)


_NAME = re.compile(
    r"(?P<family>dm-?|ra-?|boosting-?|)(?P<kind>wide-?res-?net|wrn|pre-?act-?res-?net|res-?net)-?(?P<depth>\d{1,3})"
    r"(?:-(?P<width>\d{1,2}))?(?P<options>(?:-(?:relu|silu|swish|cifar10|cifar100|svhn)){0,2})"
)


def zoo_normalization(name: str, classes: int) -> str | None:
    """How images of a model in RobustBench's zoo are normalised outside of the network, in the words of --normalize.

    name: of the model. classes: its number of classes. None if it is no such name.
    """
    return next((how for _, number, how in _entries(name) if number == classes), None)


def _entries(name: str) -> list[tuple[str, int, str]]:
    """(architecture, classes, normalisation) of the models that have a name in the zoo."""
    return ZOO.get(name) or next((entry for key, entry in ZOO.items() if _same(key, name)), [])


def _same(a: str, b: str) -> bool:
    return a.lower().replace("_", "-") == b.lower().replace("_", "-")


def _wide_resnets(family: str, depth: int, width: int, act: str | None, data: str | None) -> list[Architecture]:
    family = family.strip("-")
    if family == "ra":
        return [_dm("RaWideResNet-70-16", RA_70_16, act, data)] if (depth, width) == (70, 16) else []
    if (depth - 4) % 6 or not width or depth < 10:
        timm_name = f"wide_resnet{depth}_{width}"
        return [_of_timm(timm_name)] if is_model(timm_name) and not family else []
    size = f"{depth}-{width}"

    def trades(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        has_sub_block, has_bias = any(name.startswith("sub_block1.") for name in names), _has(names, "fc.bias")
        is_cosine = family == "boosting"
        return WideResNet(classes, channels, depth, width, act or "relu", has_sub_block, has_bias, is_cosine)

    plain = Architecture(f"WideResNet-{size} of TRADES' code", trades)
    if family == "boosting":
        return [Architecture(f"WideResNet-{size}, features and last layer of length 1", trades)]
    widths = (16, 16 * width, 32 * width, 64 * width)
    dm = _dm(f"DMWideResNet-{size}", {"widths": widths, "blocks": ((depth - 4) // 6,) * 3}, act, data)
    if family == "dm":
        return [dm]

    def ours(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        return OurWideResNet(classes, channels, depth, width, act or "relu")

    return [plain, dm, Architecture(f"WideResNet-{size} of robustmail", ours)]


RA_70_16: dict[str, Any] = {"widths": (96, 216, 432, 864), "blocks": (30, 31, 10), "squeeze": 0.25}


def _resnets(family: str, kind: str, depth: int, act: str | None, data: str | None) -> list[Architecture]:
    family = family.strip("-")
    if depth not in BLOCKS or family not in ("", "dm") or (family == "dm" and kind == "resnet"):
        return []
    blocks, bottleneck = BLOCKS[depth], depth >= 50

    def cifar(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        return ResNet(classes, channels, blocks=blocks, bottleneck=bottleneck)

    def preact(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        return PreActResNet(classes, channels, blocks, bottleneck, "bn.weight" in names)

    def dm_preact(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        return DMPreActResNet(classes, channels, blocks, act or "silu", _statistics(classes, channels, data))

    def ours(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        return ResNet(classes, channels, preact=True, blocks=blocks)

    if kind == "resnet":
        return [] if act or data else [Architecture(f"ResNet-{depth} for CIFAR", cifar), _of_timm(f"resnet{depth}")]
    found = [] if act or family else [Architecture(f"PreActResNet-{depth}", preact)]
    if depth < 50:
        found.append(Architecture(_dm_title(f"DMPreActResNet-{depth}", act), dm_preact))
        found += [] if act or family else [Architecture(f"PreActResNet-{depth} of robustmail", ours)]
    return found


def _dm(name: str, sizes: dict[str, Any], act: str | None, data: str | None) -> Architecture:
    def build(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        statistics = _statistics(classes, channels, data)
        return DMWideResNet(classes, channels, act=act or "silu", statistics=statistics, **sizes)

    return Architecture(_dm_title(name, act), build)


def _dm_title(name: str, act: str | None) -> str:
    return f"{name} ({'ReLU' if act == 'relu' else 'SiLU'}, normalises images itself)"


def _statistics(classes: int, channels: int, data: str | None = None) -> Statistics:
    if channels != 3:
        raise ValueError(f"it normalises images of 3 channels, not {channels}")
    return STATISTICS[data or ("cifar100" if classes == 100 else "cifar10")]


def _has(names: Collection[str], name: str) -> bool:
    return not names or name in names


def _of_timm(name: str) -> Architecture:
    def build(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        network: nn.Module = create_model(name, num_classes=classes, in_chans=channels)
        return network

    return Architecture(f"timm {name}", build)


def _xcit(size: str) -> Architecture:
    """XCiT of Debenedetti et al. 2022 for CIFAR: of patches of 16, two of the four strides of the stem are 1."""
    width, heads = XCITS[size]

    def build(classes: int, channels: int, names: Collection[str]) -> nn.Module:
        if classes not in (10, 100):
            raise ValueError(f"it is for CIFAR, and not for {classes} classes: xcit_small_12_p16_224 is timm's")
        net: Any = create_model(
            "xcit_small_12_p16_224", num_classes=classes, in_chans=channels, embed_dim=width, num_heads=heads
        )
        for i in (0, 2):
            net.patch_embed.proj[i][0].stride = (1, 1)
        net.patch_embed.patch_size = 4
        statistics = XCIT_CIFAR100 if classes == 100 else _statistics(classes, channels)
        return nn.Sequential(OrderedDict(normalize=_Normalize(statistics), model=net))

    return Architecture(f"XCiT-{size.upper()} (patches of 4, normalises images itself)", build)


# Networks


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


class _Normalize(nn.Module):
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
        if isinstance(module, _Normalize):
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
        self.normalize = _Normalize(statistics)
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
        self.normalize = _Normalize(statistics)
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
