"""What our networks need to be registered in timm: a configuration, a head, and a factory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Network", "block_stage", "build_in_timm", "config"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
"""the activations of our networks by name; "silu" is that of Gowal et al. 2020 and their successors"""


def config(**changes: Any) -> dict[str, Any]:
    """timm's default_cfg of our networks, with `changes`; images in [0, 1] are not normalised."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv1",
        "classifier": "linear",
        "pool_size": None,
        **changes,
    }


def build_in_timm(cls: type[Network], name: str, pretrained: bool, **options: Any) -> nn.Module:
    """Build cls(**options) with timm's factory, which handles checkpoints and other numbers of classes and channels."""
    network: nn.Module = build_model_with_cfg(cls, name, pretrained, **options)
    return network


def block_stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, stride: int, depth: int
) -> nn.Sequential:
    """A stage of `depth` blocks, block(in, out, stride) each, of which the first changes channels and size."""
    rest = (block(out_channels, out_channels, 1) for _ in range(depth - 1))
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


class Network(nn.Module):
    """Base of our networks, with the interface that timm expects: features, global average pooling, a linear head."""

    def __init__(self, features: int, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = features
        self.num_classes = num_classes
        self.drop = nn.Dropout(drop_rate)
        self.linear = nn.Linear(features, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer, a nn.Linear."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one for another number of classes."""
        self.num_classes = num_classes
        self.linear = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, features, h, w]"""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, features, h, w] -> [B, classes]"""
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        return self.forward_head(self.forward_features(x))
