"""A chain of layers as a network, and what was assumed of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from robustmail.checkpoints.infer.layers import (
    Layer,
    WithShortcut,
    activation,
    conv,
    linear,
    norm,
)
from robustmail.text import plural

__all__ = ["ConvStep", "Link", "PartialChain", "chain_assumptions", "chain_name", "chain_network"]


@dataclass(frozen=True)
class Link:
    """A convolution or linear layer of a chain, with the BatchNorms that follow it."""

    layer: Layer
    norms: tuple[Layer, ...] = ()
    active_first: bool = False
    """the activation comes before the BatchNorm"""
    gap: int | None = None
    """layers without parameters between this and the next link; None if the names do not say"""
    shortcut: str = ""
    """the module whose input is added to its output, if this link is in one"""


@dataclass(frozen=True)
class ConvStep:
    """How a convolution is applied, and the pool behind it."""

    stride: int
    padding: int
    pool: int = 0
    """0: none, 2: 2x2, 3: 3x3 with stride 2"""


@dataclass(frozen=True)
class PartialChain:
    """Steps for the first convolutions of a chain, or for all; then also what comes before the linear layers.

    cost: price of the steps. side: of the image after the last step, in pixels.
    """

    cost: float
    steps: tuple[ConvStep, ...]
    side: int
    pooled_to: int = 0
    """side that the image is pooled to before it is flattened; 0: no pool"""
    by_maximum: bool = False
    """whether that pool takes the maximum, not the average"""


def chain_name(links: Sequence[Link]) -> str:
    """What the chain is called, for people."""
    convs = sum(link.layer.kind == "conv" for link in links)
    linears = len(links) - convs
    counts = [plural(n, word) for n, word in ((convs, "convolution"), (linears, "linear layer")) if n]
    shortcuts = len({link.shortcut for link in links} - {""})
    name = f"chain of {' and '.join(counts)}" + (f" with {shortcuts} shortcuts" if shortcuts else "")
    if shortcuts:
        return f"ResNet-{len(links)}, {name}"
    is_vgg = convs in (8, 10, 13, 16) and all(link.layer.kernel == 3 for link in links[:convs])
    return f"VGG-{convs + 3}, {name}" if is_vgg else name


def chain_assumptions(links: Sequence[Link], solution: PartialChain, act: str, average: bool) -> Iterator[str]:
    """What no tensor says and was assumed, in words."""
    if solution.steps:
        yield "strides " + ", ".join(str(step.stride) for step in solution.steps)
        yield "paddings " + ", ".join(str(step.padding) for step in solution.steps)
    pools = [str(i) for i, step in enumerate(solution.steps, start=1) if step.pool]
    if pools:
        large = " 3x3" if any(step.pool == 3 for step in solution.steps) else ""
        yield f"{'average' if average else 'max'}-pool{large} after convolution {', '.join(pools)}"
    if side := solution.pooled_to:
        yield f"{'max-pooled' if solution.by_maximum else 'averaged'} to {side}x{side}"
    if len(links) > 1:
        yield act


def chain_network(links: Sequence[Link], solution: PartialChain, act: str, average: bool) -> nn.Module:
    """The network with this activation; average: pool by the mean, else by the maximum."""
    modules: list[nn.Module] = []
    outer: list[nn.Module] = []
    width = links[0].layer.in_channels
    for i, link in enumerate(links):
        before = links[i - 1].shortcut if i else ""
        if before and link.shortcut != before:
            modules = [*outer, WithShortcut(modules)]
        if link.shortcut and link.shortcut != before:
            outer, modules = modules, []
        is_conv = link.layer.kind == "conv"
        if not is_conv and (i == 0 or links[i - 1].layer.kind == "conv"):
            modules += [*_ending_modules(solution), nn.Flatten()]
        step = solution.steps[i] if is_conv else None
        modules.append(conv(link.layer, width, step.stride, step.padding) if step else linear(link.layer))
        norms = [norm(layer, 2 if is_conv else 1) for layer in link.norms]
        acts = [activation(act)] if i + 1 < len(links) and link.gap != 0 else []
        modules += [*acts, *norms] if link.active_first else [*norms, *acts]
        modules += [_pool(step.pool, average)] if step and step.pool else []
        width = link.layer.out_channels
    if links[-1].layer.kind == "conv":
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*modules)


def _ending_modules(solution: PartialChain) -> list[nn.Module]:
    kind = nn.AdaptiveMaxPool2d if solution.by_maximum else nn.AdaptiveAvgPool2d
    return [kind(solution.pooled_to)] if solution.pooled_to else []


def _pool(kernel: int, average: bool) -> nn.Module:
    kind = nn.AvgPool2d if average else nn.MaxPool2d
    return kind(2) if kernel == 2 else kind(3, 2, 1)
