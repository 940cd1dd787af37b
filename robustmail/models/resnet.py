"""ResNet-18 in its CIFAR form (3x3 stem, no max-pool), post- and pre-activation, at full or narrow width."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.models.timm_interface import Network, config, make

__all__ = [
    "cifar_preact_resnet18",
    "cifar_preact_resnet18_w16",
    "cifar_resnet18",
    "cifar_resnet18_w16",
    "cifar_resnet18_w32",
    "cifar_resnet18_w8",
]

default_cfgs = generate_default_cfgs({f"{name}.none": config() for name in __all__})


class ResNet(Network):
    """Four stages of two blocks, widths w, 2w, 4w, 8w, strides 1, 2, 2, 2."""

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, width: int = 64, preact: bool = False,
        global_pool: str = "avg", drop_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(8 * width, num_classes, drop_rate)
        self.conv1 = _conv3(in_chans, width)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(width)
        block = PreActBlock if preact else Block
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for i, (wide_in, wide_out) in enumerate(pairwise(widths), start=1):
            stage = nn.Sequential(block(wide_in, wide_out, 1 if i == 1 else 2), block(wide_out, wide_out, 1))
            self.add_module(f"layer{i}", stage)
        self.bn = nn.BatchNorm2d(8 * width) if preact else nn.Identity()
        self.preact = preact

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 8 width, H/8, W/8]"""
        x = self.conv1(x)
        x = x if self.preact else F.relu(self.bn1(x))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return F.relu(self.bn(x)) if self.preact else x


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))"""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3(wide_in, wide_out, stride), nn.BatchNorm2d(wide_out)
        self.conv2, self.bn2 = _conv3(wide_out, wide_out), nn.BatchNorm2d(wide_out)
        same = stride == 1 and wide_in == wide_out
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """conv(relu(bn(conv(relu(bn(x)))))) + shortcut(x); a shortcut that convolves takes the activated input."""

    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(wide_in), _conv3(wide_in, wide_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(wide_out), _conv3(wide_out, wide_out)
        self.shortcut: nn.Module | None = None
        if stride != 1 or wide_in != wide_out:
            self.shortcut = nn.Conv2d(wide_in, wide_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H/stride, W/stride]"""
        active = F.relu(self.bn1(x))
        carried = self.shortcut(active) if self.shortcut else x
        out: Tensor = carried + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out


def _conv3(wide_in: int, wide_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)


@register_model
def cifar_resnet18(pretrained: bool = False, **knobs: Any) -> nn.Module:
    """ResNet-18 of the MAIL, MART and GAIRAT papers: 11,173,962 parameters with 10 classes."""
    return make(ResNet, "cifar_resnet18", pretrained, **knobs)


@register_model
def cifar_resnet18_w32(pretrained: bool = False, **knobs: Any) -> nn.Module:
    """ResNet-18 at half the width: a quarter of the work."""
    return make(ResNet, "cifar_resnet18_w32", pretrained, **{"width": 32, **knobs})


@register_model
def cifar_resnet18_w16(pretrained: bool = False, **knobs: Any) -> nn.Module:
    """ResNet-18 at a quarter of the width, for CPUs: a sixteenth of the work."""
    return make(ResNet, "cifar_resnet18_w16", pretrained, **{"width": 16, **knobs})


@register_model
def cifar_resnet18_w8(pretrained: bool = False, **knobs: Any) -> nn.Module:
    """ResNet-18 at an eighth of the width, for tests."""
    return make(ResNet, "cifar_resnet18_w8", pretrained, **{"width": 8, **knobs})


@register_model
def cifar_preact_resnet18(pretrained: bool = False, **knobs: Any) -> nn.Module:
    """Pre-activation ResNet-18 of the AWP and robust-overfitting papers."""
    return make(ResNet, "cifar_preact_resnet18", pretrained, **{"preact": True, **knobs})


@register_model
def cifar_preact_resnet18_w16(pretrained: bool = False, **knobs: Any) -> nn.Module:
    """Pre-activation ResNet-18 at a quarter of the width, for CPUs."""
    return make(ResNet, "cifar_preact_resnet18_w16", pretrained, **{"preact": True, "width": 16, **knobs})
