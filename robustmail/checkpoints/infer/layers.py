"""Layers of a state dict: the tensors of one module, whose kind follows from their names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "Layer",
    "Proposal",
    "WithShortcut",
    "activation",
    "conv",
    "dense",
    "grouped",
    "in_sequence",
    "linear",
    "norm",
]

T = TypeVar("T")
MAX_WIDTH = 65536
"""channels or features; no image classifier has more"""
_MAX_TRIED = 2000
"""partial orders that are tried"""
_MAX_SEARCHED = 300
"""items that are put in order, below Python's limit of recursion"""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU, "SiLU": nn.SiLU, "GELU": nn.GELU, "tanh": nn.Tanh,
    "LeakyReLU 0.01": nn.LeakyReLU, "LeakyReLU 0.1": partial(nn.LeakyReLU, 0.1),
    "LeakyReLU 0.2": partial(nn.LeakyReLU, 0.2), "ELU": nn.ELU, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "Mish": nn.Mish, "SELU": nn.SELU, "ReLU6": nn.ReLU6,
    "Hardswish": nn.Hardswish, "hardtanh": nn.Hardtanh, "softsign": nn.Softsign,
}  # fmt: skip
"""by the name that prices.py has for them"""


@dataclass(frozen=True)
class Layer:
    """A layer of a state dict.

    name: of its module. kind: "conv", "norm" (BatchNorm) or "linear". tensors: by the last part of their names: weight,
    bias, running_mean, ...
    """

    name: str
    kind: str
    tensors: dict[str, Tensor]

    @property
    def out_channels(self) -> int:
        """channels, or features of a linear layer, that come out"""
        return len(next(t for key, t in self.tensors.items() if key != "num_batches_tracked"))

    @property
    def in_channels(self) -> int:
        """channels or features that go in; those of one group of a grouped convolution"""
        return self.tensors["weight"].shape[1] if self.kind != "norm" else self.out_channels

    @property
    def kernel(self) -> int:
        """side of a convolution's kernel, in pixels; 0 for other layers"""
        return self.tensors["weight"].shape[-1] if self.kind == "conv" else 0


@dataclass(frozen=True)
class Proposal:
    """A network that may fit; it is not built yet.

    name, channels, size, assumptions: as in `Candidate`. make: builds the network with its weights; it may fail.
    cost: the sum of the prices of what was assumed (prices.py); the cheaper, the likelier.
    """

    name: str
    channels: int
    size: int | None
    assumptions: tuple[str, ...]
    make: Callable[[], nn.Module]
    cost: float = 0.0


def grouped(tensors: Mapping[str, Tensor]) -> list[Layer] | None:
    """The layers of a state dict in the order of their names; None if a tensor belongs to no layer of a known
    kind."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parent, _, last = key.rpartition(".")
        modules.setdefault(parent, {})[last] = tensor
    layers = [Layer(name, _kind(own), own) for name, own in modules.items()]
    is_known = all(
        layer.kind and layer.out_channels <= MAX_WIDTH and layer.in_channels <= MAX_WIDTH * 16 for layer in layers
    )
    return layers if layers and is_known else None


def _kind(own: Mapping[str, Tensor]) -> str:
    names = set(own) - {"num_batches_tracked"}
    if {"running_mean", "running_var"} <= names <= {"running_mean", "running_var", "weight", "bias"}:
        return "norm" if len({tuple(own[name].shape) for name in names}) == 1 and own["running_mean"].ndim == 1 else ""
    if not {"weight"} <= names <= {"weight", "bias"}:
        return ""
    weight = own["weight"]
    if "bias" in own and own["bias"].shape != weight.shape[:1]:
        return ""
    square = weight.ndim == 4 and weight.shape[2] == weight.shape[3] <= 64
    return "conv" if square else "linear" if weight.ndim == 2 else ""


def in_sequence(items: Sequence[T], width: int, step: Callable[[T, int], int | None]) -> list[T]:
    """The items in the first order in which each takes what the one before gives: as they are, else by a search that
    prefers what comes first; [] if there is none.

    width: that the first one gets. step: the width that an item gives for the one that it gets; None if it cannot take
    that.
    """
    tried = 0

    def extend(order: list[T], rest: list[T], width: int) -> list[T]:
        nonlocal tried
        tried += 1
        if not rest or tried > _MAX_TRIED:
            return [] if rest else order
        for i, item in enumerate(rest):
            given = step(item, width)
            if given is not None and (found := extend([*order, item], [*rest[:i], *rest[i + 1 :]], given)):
                return found
        return []

    return extend([], list(items), width) if len(items) <= _MAX_SEARCHED else []


def conv(layer: Layer, in_channels: int, stride: int = 1, padding: int | None = None) -> nn.Module:
    """An nn.Conv2d with the weights of `layer`; the groups follow from `in_channels`, the channels of its input.

    padding: in pixels, by default half of the kernel. Raises ValueError if the channels do not fit.
    """
    weight = layer.tensors["weight"]
    padding = layer.kernel // 2 if padding is None else padding
    groups, rest = divmod(in_channels, weight.shape[1])
    if rest:
        raise ValueError(f"{layer.name} takes {weight.shape[1]} channels, gets {in_channels}")
    bias = "bias" in layer.tensors
    with torch.device("meta"):
        module = nn.Conv2d(in_channels, len(weight), layer.kernel, stride, padding, groups=groups, bias=bias)
    return _load(module, layer)


def norm(layer: Layer, dimensions: int = 2) -> nn.Module:
    """An nn.BatchNorm1d or 2d (`dimensions`) with the weights and statistics of `layer`."""
    kind = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm1d
    return _load(kind(layer.out_channels, affine="weight" in layer.tensors), layer)


def linear(layer: Layer) -> nn.Module:
    """An nn.Linear with the weights of `layer`."""
    with torch.device("meta"):
        module = nn.Linear(layer.in_channels, layer.out_channels, bias="bias" in layer.tensors)
    return _load(module, layer)


def dense(layers: Iterable[Layer], act: str) -> list[nn.Module]:
    """The modules of linear layers with an activation between each two."""
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [activation(act), linear(layer)] if modules else [linear(layer)]
    return modules


def activation(name: str) -> nn.Module:
    """A module of ACTIVATIONS by its name."""
    return ACTIVATIONS[name]()


class WithShortcut(nn.Module):
    """x + modules(x)"""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        out: Tensor = x + self.branch(x)
        return out


def _load(module: nn.Module, layer: Layer) -> nn.Module:
    tensors = dict(layer.tensors)
    if "num_batches_tracked" in module.state_dict():
        tensors.setdefault("num_batches_tracked", torch.tensor(0))  # some files leave it out
    module.load_state_dict(tensors, strict=True, assign=True)  # all candidates share the file's tensors
    return module
