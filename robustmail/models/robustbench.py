"""The architectures of RobustBench's model zoo for CIFAR, by its names, with its names of parameters.

RobustBench writes "WideResNet-28-10" for networks of different code: TRADES' (`block1.layer.0.conv1`), DeepMind's
(`layer.0.block.0.conv_0`: SiLU, and images are normalised inside) and others. So a name has several `architectures`,
and the names of a file's tensors tell which of them it holds.

Sources: robustbench/model_zoo of RobustBench/robustbench, and core/models of wzekai99/DM-Improves-AT.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from timm.models import create_model, is_model
from torch import nn

from robustmail.models.resnet import ResNet
from robustmail.models.robustbench_networks import (
    STATISTICS,
    DMPreActResNet,
    DMWideResNet,
    Normalize,
    PreActResNet,
    Statistics,
    WideResNet,
)
from robustmail.models.robustbench_zoo import ZOO, zoo_entries
from robustmail.models.wide_resnet import WideResNet as OurWideResNet

__all__ = ["NAMES", "Architecture", "architectures"]


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
    if entries := zoo_entries(name):
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
        return nn.Sequential(OrderedDict(normalize=Normalize(statistics), model=net))

    return Architecture(f"XCiT-{size.upper()} (patches of 4, normalises images itself)", build)


# Networks
