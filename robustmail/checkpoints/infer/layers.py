"""Layers as a state dict shows them: tensors of one module together, told apart by their shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "Layer",
    "Proposal",
    "activation",
    "conv",
    "dense",
    "grouped",
    "linear",
    "natural_key",
    "norm",
]

WIDEST = 65536
"""channels; more are no image classifier's"""

ACTIVATIONS: dict[str, tuple[float, Callable[[], nn.Module]]] = {
    "ReLU": (0.0, nn.ReLU), "SiLU": (1.5, nn.SiLU), "GELU": (1.5, nn.GELU), "tanh": (1.5, nn.Tanh),
    "LeakyReLU 0.01": (1.6, nn.LeakyReLU), "LeakyReLU 0.1": (1.6, partial(nn.LeakyReLU, 0.1)),
    "LeakyReLU 0.2": (1.6, partial(nn.LeakyReLU, 0.2)), "ELU": (1.7, nn.ELU), "sigmoid": (1.7, nn.Sigmoid),
    "softplus": (1.8, nn.Softplus), "Mish": (1.9, nn.Mish), "SELU": (1.9, nn.SELU), "ReLU6": (1.9, nn.ReLU6),
    "Hardswish": (1.9, nn.Hardswish), "hardtanh": (1.9, nn.Hardtanh), "softsign": (1.9, nn.Softsign),
}  # fmt: skip
"""by name: the price, and how it is made"""


@dataclass(frozen=True)
class Layer:
    """A convolution, BatchNorm or linear layer: `tensors` by their last name (weight, bias, running_mean...)."""

    name: str
    kind: str
    tensors: dict[str, Tensor]

    @property
    def wide_out(self) -> int:
        """channels or features that come out"""
        return len(next(t for key, t in self.tensors.items() if key != "num_batches_tracked"))

    @property
    def wide_in(self) -> int:
        """channels or features that go in, for one group of a convolution"""
        return self.tensors["weight"].shape[1] if self.kind != "norm" else self.wide_out

    @property
    def kernel(self) -> int:
        """the side of a convolution's kernel; 0 for other layers"""
        return self.tensors["weight"].shape[-1] if self.kind == "conv" else 0


@dataclass(frozen=True)
class Proposal:
    """A network that might fit: `make` builds it with its weights; the cheaper, the likelier."""

    name: str
    channels: int
    size: int | None
    unwritten: tuple[str, ...]
    make: Callable[[], nn.Module]
    cost: float = 0.0


def grouped(tensors: Mapping[str, Tensor]) -> list[Layer] | None:
    """The layers in the order in which they appear; None where a tensor belongs to no layer of a known kind."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parent, _, last = key.rpartition(".")
        modules.setdefault(parent, {})[last] = tensor
    layers = [Layer(name, _kind(own), own) for name, own in modules.items()]
    fine = all(layer.kind and layer.wide_out <= WIDEST and layer.wide_in <= WIDEST * 16 for layer in layers)
    return layers if layers and fine else None


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


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """A key for sorting that puts conv2 before conv10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d{1,9})", name) if part]


def conv(layer: Layer, wide_in: int, stride: int = 1, padding: int | None = None) -> nn.Module:
    """The convolution with its weights; groups follow from the channels that come in."""
    weight = layer.tensors["weight"]
    padding = layer.kernel // 2 if padding is None else padding
    groups, rest = divmod(wide_in, weight.shape[1])
    if rest:
        raise ValueError(f"{layer.name} takes {weight.shape[1]} channels, gets {wide_in}")
    bias = "bias" in layer.tensors
    with torch.device("meta"):
        made = nn.Conv2d(wide_in, len(weight), layer.kernel, stride, padding, groups=groups, bias=bias)
    return _load(made, layer)


def norm(layer: Layer, dimensions: int = 2) -> nn.Module:
    """The BatchNorm with its weights and statistics; a counter that is not there is 0."""
    kind = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm1d
    return _load(kind(layer.wide_out, affine="weight" in layer.tensors), layer)


def linear(layer: Layer) -> nn.Module:
    """The linear layer with its weights."""
    with torch.device("meta"):
        made = nn.Linear(layer.wide_in, layer.wide_out, bias="bias" in layer.tensors)
    return _load(made, layer)


def dense(layers: Iterable[Layer], act: str) -> list[nn.Module]:
    """Linear layers with activations between them."""
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [activation(act), linear(layer)] if modules else [linear(layer)]
    return modules


def activation(name: str) -> nn.Module:
    """The activation of that name."""
    return ACTIVATIONS[name][1]()


def _load(module: nn.Module, layer: Layer) -> nn.Module:
    tensors = dict(layer.tensors)
    if "num_batches_tracked" in module.state_dict():
        tensors.setdefault("num_batches_tracked", torch.tensor(0))
    module.load_state_dict(tensors, strict=True, assign=True)  # readings share the file's tensors
    return module
