"""What our networks share to be at home in timm: a configuration, a head, and the way they are built."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

__all__ = ["Network", "config", "make"]


def config(**changes: Any) -> dict[str, Any]:
    """timm's description of a network of ours: images in [0, 1] go in as they are."""
    return {
        "url": "", "num_classes": 10, "input_size": (3, 32, 32), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
        "first_conv": "conv1", "classifier": "linear", "pool_size": None, **changes,
    }  # fmt: skip


def make(cls: type[Network], name: str, pretrained: bool, **knobs: Any) -> nn.Module:
    """Build through timm's factory, which handles checkpoints, other class counts and other channels."""
    network: nn.Module = build_model_with_cfg(cls, name, pretrained, **knobs)
    return network


class Network(nn.Module):
    """The interface that timm expects: features, then global average pooling and a linear head."""

    def __init__(self, features: int, num_classes: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = features
        self.num_classes = num_classes
        self.drop = nn.Dropout(drop_rate)
        self.linear = nn.Linear(features, num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for another number of classes."""
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
