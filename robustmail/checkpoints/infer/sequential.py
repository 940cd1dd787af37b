"""Networks without branches: convolutions, BatchNorm and linear layers one after another.

Strides, paddings and pools leave no tensors. They are solved for: the image must have the side that the first linear
layer expects. Gaps in the numbering of an nn.Sequential tell where layers without parameters sit.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from robustmail.checkpoints.infer.layers import (
    ACTIVATIONS,
    Layer,
    Proposal,
    activation,
    conv,
    linear,
    natural_key,
    norm,
)
from robustmail.text import plural

__all__ = ["proposals"]

_SIDES = {1: (28, 32, 8, 64), 3: (32, 64, 28, 224, 96)}
"""image sides to try, by channels"""
_AVERAGE = 1.2
"""the price of average pools"""
_LONGEST = 24
"""convolutions; whoever has more has shortcuts"""
_KEPT = 16
"""partial solutions that are followed for each side an image can have"""


@dataclass(frozen=True)
class Link:
    """A convolution or linear layer with the BatchNorms that follow it."""

    layer: Layer
    norms: tuple[Layer, ...] = ()
    active_first: bool = False
    """the activation comes before the BatchNorm"""
    free: int | None = None
    """layers without parameters between this and the next link; None where the names do not say"""
    shortcut: str = ""
    """the module whose input is added to its output, if this link is in one"""


@dataclass(frozen=True)
class ConvStep:
    """How a convolution is applied, and what pools its result."""

    stride: int
    padding: int
    pool: int = 0
    """0 for none, 2 for 2x2, 3 for 3x3 with stride 2"""


@dataclass(frozen=True)
class PartialChain:
    """A step for each convolution, and what comes before the linear layers."""

    cost: float
    steps: tuple[ConvStep, ...]
    side: int
    """of the image after the last step"""
    last: int = 0
    """the side that the image is pooled to before it is flattened; 0 for no pool"""
    peak: bool = False
    """pooled by its maximum, not averaged"""


def proposals(layers: Sequence[Layer], size: int | None) -> list[Proposal]:
    """The chains that these layers may be, cheapest first; none where they do not follow one another."""
    for order in _orders(layers):
        links = _with_shortcuts(_links(order))
        if not links:
            continue
        convs = [link for link in links if link.layer.kind == "conv"]
        rest = links[len(convs) :]
        if any(link.layer.kind == "conv" for link in rest) or len(convs) > _LONGEST:
            continue
        found = list(_dense_only(links, size)) if not convs else list(_convolutional(links, convs, size))
        if found:
            return sorted(found, key=lambda proposal: proposal.cost)
    return []


# The order of layers


def _orders(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """As they appear; and, for files that sort their names, by number with the linear layers last."""
    yield list(layers)
    numbered = sorted(layers, key=lambda layer: natural_key(layer.name))
    yield numbered
    convs = [layer for layer in numbered if layer.kind != "linear"]
    linears = [layer for layer in numbered if layer.kind == "linear"]
    yield [*_interleaved(convs), *linears]


def _interleaved(layers: list[Layer]) -> Iterator[Layer]:
    """conv1, bn1, conv2, bn2, where the names alone would give bn1, bn2, conv1, conv2."""
    norms = [layer for layer in layers if layer.kind == "norm"]
    for layer in layers:
        if layer.kind == "conv":
            yield layer
            if norms and norms[0].wide_out == layer.wide_out:
                yield norms.pop(0)
    yield from norms


def _links(layers: Sequence[Layer]) -> list[Link]:
    """The layers as links, if each takes what the one before gives; or nothing."""
    links: list[Link] = []
    wide: int | None = None
    for i, layer in enumerate(layers):
        gap = _gap(layers[i - 1].name, layer.name) if i else None
        if layer.kind == "norm":
            if not links or layer.wide_out != wide:
                return []
            last = links[-1]
            active_first = last.active_first or bool(gap)
            links[-1] = replace(last, norms=(*last.norms, layer), active_first=active_first, free=gap)
            continue
        if links:
            flattened = layer.kind == "linear" and links[-1].layer.kind == "conv"
            ratio = divmod(layer.wide_in, wide or 1) if flattened else divmod(wide or 0, layer.wide_in)
            if ratio[1] or not ratio[0] or (layer.kind == "linear" and not flattened and ratio[0] != 1):
                return []
            slots = gap if gap is None else gap + int(links[-1].active_first)
            links[-1] = replace(links[-1], free=slots)
        links.append(Link(layer))
        wide = layer.wide_out
    return links


def _with_shortcuts(links: list[Link]) -> list[Link]:
    """A module called res1 or the like that gives as many channels as it takes is added to its input (ResNet-9)."""
    found: list[Link] = []
    for name, group in itertools.groupby(links, key=lambda link: _residual_module(link.layer.name)):
        run = list(group)
        whole = name and len(run) > 1 and {link.layer.kind for link in run} == {"conv"}
        equal = whole and run[0].layer.wide_in == run[-1].layer.wide_out
        found += [replace(link, shortcut=name) for link in run] if equal else run
    return found


def _residual_module(name: str) -> str:
    match = re.match(r"(?:[^.]+\.)*?res[a-z_]*\d*(?=\.)", name)
    return match[0] if match else ""


def _gap(before: str, after: str) -> int | None:
    """How many numbers of an nn.Sequential lie between two names."""
    (parent, _, first), (other, _, second) = before.rpartition("."), after.rpartition(".")
    if parent == other and first.isdigit() and second.isdigit() and len(first + second) < 9:
        return int(second) - int(first) - 1 if int(second) > int(first) else None
    return None


# Strides, paddings and pools


def _convolutional(links: Sequence[Link], convs: Sequence[Link], size: int | None) -> Iterator[Proposal]:
    channels = convs[0].layer.wide_in
    sides = [size] if size else _SIDES.get(channels, (32, 64, 224))
    for side in sides:
        solutions = sorted(_solutions(links, convs, side), key=lambda solution: solution.cost)[:10]
        for solution in solutions:
            pooled = any(step.pool for step in solution.steps)
            for act, (price, _) in ACTIVATIONS.items():
                for average in (False, True)[: 1 + pooled]:
                    cost = solution.cost + price + _AVERAGE * average
                    yield _proposal(links, replace(solution, cost=cost), side, act, average)
        if solutions:
            return


def _solutions(links: Sequence[Link], convs: Sequence[Link], side: int) -> Iterator[PartialChain]:
    """The cheapest ways to the side that the first linear layer expects."""
    partial = [PartialChain(0.0, (), side)]
    for i, link in enumerate(convs):
        following = links[i + 1] if i + 1 < len(links) else None
        grown: dict[int, list[PartialChain]] = {}
        for solution in partial:
            before = (convs[i - 1].layer, solution.steps[-1]) if i else None
            for cost, step in _steps(link, following, before):
                if (new := _shrunk(solution.side, link.layer.kernel, step)) >= 1:
                    grown.setdefault(new, []).append(PartialChain(solution.cost + cost, (*solution.steps, step), new))
        kept = [heapq.nsmallest(_KEPT, group, key=lambda solution: solution.cost) for group in grown.values()]
        partial = list(itertools.chain(*kept))
    expected = links[len(convs)].layer.wide_in // convs[-1].layer.wide_out if len(links) > len(convs) else 1
    target = round(expected**0.5)
    if target * target != expected:
        return
    room = 9 if convs[-1].free is None else convs[-1].free - 2  # beside an activation and nn.Flatten
    for solution in partial:
        price = _ending(solution.side, target, calm=4 if any(link.shortcut for link in convs) else 8)
        pools = bool(solution.steps[-1].pool) + (solution.side != target)
        if price is not None and pools <= room + (room < 0):
            unused = (
                1.0
                if pools < room < 9
                else 0.4
                if not solution.steps[-1].pool and any(s.pool for s in solution.steps)
                else 0.0
            )
            found = replace(
                solution, cost=solution.cost + price + unused, last=target if solution.side != target else 0
            )
            yield found
            if found.last == 1 and solution.side <= 8:
                yield replace(
                    found, cost=found.cost + (-0.1 if any(link.shortcut for link in convs) else 1.2), peak=True
                )


def _ending(side: int, target: int, calm: int) -> float | None:
    """The price of averaging an image of one side to another; None where nobody does."""
    if side == target:
        return 0.0
    if target == 1:
        return 0.4 + max(side - calm, 0) / 8
    if side % target == 0:
        return 2.0 + side / target / 8
    return 2.5 if target in (6, 7) and side < target else None


def _steps(
    link: Link, following: Link | None, before: tuple[Layer, ConvStep] | None
) -> Iterator[tuple[float, ConvStep]]:
    widens = (
        following is None
        or following.layer.kind == "linear"
        or following.layer.wide_out > link.layer.wide_out
        or bool(following.shortcut)
    )
    kernel = link.layer.kernel
    if link.shortcut:
        yield 0.0, ConvStep(1, kernel // 2)
        return
    for (stride_cost, stride), (padding_cost, padding) in itertools.product(_strides(kernel), _paddings(kernel)):
        cost = stride_cost + padding_cost
        if before is not None and before[0].kernel == kernel:
            cost += 0.8 * (before[1].padding != padding) + 0.2 * (before[1].stride != stride)
        for pool_cost, pool in _pools(link, following, widens, stride):
            yield cost + pool_cost, ConvStep(stride, padding, pool)


def _strides(kernel: int) -> list[tuple[float, int]]:
    if kernel == 1:
        return [(0.0, 1), (1.5, 2)]
    if kernel % 2 == 0:
        return [(0.0, 2), (0.8, 1), *([(0.4, kernel)] if kernel > 2 else [])]
    if kernel >= 7:
        return [(0.2, 2), (0.2, 1), (0.4, 4)]
    return [(0.0, 1), (0.7, 2)]


def _paddings(kernel: int) -> list[tuple[float, int]]:
    usual = {1: [(0.0, 0)], 2: [(0.0, 0)], 3: [(0.0, 1), (0.3, 0)], 4: [(0.0, 1), (0.3, 0), (0.8, 2)],
             5: [(0.0, 0), (0.2, 2), (1.0, 1)]}  # fmt: skip
    return usual.get(kernel) or [(0.0, kernel // 2), (0.3, 0), (1.0, 2)]


def _pools(link: Link, following: Link | None, widens: bool, stride: int) -> list[tuple[float, int]]:
    """Prices of no pool, 2x2 and 3x3, given how many layers without parameters there is room for."""
    if following is None:
        return [(0.0, 0)]
    if following.layer.kind == "linear" and link.free is not None:
        return [(0.0, 0), (0.0, 2), (1.0, 3)]  # _solutions knows how many there is room for
    if link.free is None:
        price = (0.3 if widens else 0.9) + 0.7 * (stride > 1)
        return [(0.0, 0), (price, 2), (price + 1.2, 3)]
    if link.free < 2:  # an activation is all
        return [(0.0, 0)]
    return [(1.0, 0), (0.0, 2), (1.0, 3)]


def _shrunk(side: int, kernel: int, step: ConvStep) -> int:
    side = (side + 2 * step.padding - kernel) // step.stride + 1
    if step.pool == 2:
        return side // 2
    return (side - 1) // 2 + 1 if step.pool == 3 and side > 1 else side if not step.pool else 0


def _dense_only(links: Sequence[Link], size: int | None) -> Iterator[Proposal]:
    """Images flattened at once: as many numbers as a square of 1 or 3 channels has."""
    features = links[0].layer.wide_in
    for channels in (3, 1) if features % 3 == 0 else (1,):
        side = round((features / channels) ** 0.5)
        if side * side * channels == features and size in (None, side):
            for act, (price, _) in ACTIVATIONS.items():
                yield _proposal(links, PartialChain(price, (), side), side, act, False, channels)
            return


# The network


def _proposal(
    links: Sequence[Link], solution: PartialChain, size: int, act: str, average: bool, channels: int | None = None
) -> Proposal:
    return Proposal(
        _name(links), channels or links[0].layer.wide_in, size, tuple(_unwritten(links, solution, act, average)),
        lambda: _network(links, solution, act, average), solution.cost,
    )  # fmt: skip


def _name(links: Sequence[Link]) -> str:
    convs = sum(link.layer.kind == "conv" for link in links)
    linears = len(links) - convs
    counted = [plural(n, word) for n, word in ((convs, "convolution"), (linears, "linear layer")) if n]
    shortcuts = len({link.shortcut for link in links} - {""})
    name = f"chain of {' and '.join(counted)}" + (f" with {shortcuts} shortcuts" if shortcuts else "")
    if shortcuts:
        return f"ResNet-{len(links)}, {name}"
    classic = convs in (8, 10, 13, 16) and all(link.layer.kernel == 3 for link in links[:convs])
    return f"VGG-{convs + 3}, {name}" if classic else name


def _unwritten(links: Sequence[Link], solution: PartialChain, act: str, average: bool) -> Iterator[str]:
    if solution.steps:
        yield "strides " + ", ".join(str(step.stride) for step in solution.steps)
        yield "paddings " + ", ".join(str(step.padding) for step in solution.steps)
    pools = [str(i) for i, step in enumerate(solution.steps, start=1) if step.pool]
    if pools:
        large = " 3x3" if any(step.pool == 3 for step in solution.steps) else ""
        yield f"{'average' if average else 'max'}-pool{large} after convolution {', '.join(pools)}"
    if solution.last:
        yield f"{'max-pooled' if solution.peak else 'averaged'} to {solution.last}x{solution.last}"
    if len(links) > 1:
        yield act


def _network(links: Sequence[Link], solution: PartialChain, act: str, average: bool) -> nn.Module:
    modules: list[nn.Module] = []
    outer: list[nn.Module] = []
    wide = links[0].layer.wide_in
    for i, link in enumerate(links):
        before = links[i - 1].shortcut if i else ""
        if before and link.shortcut != before:
            modules = [*outer, Added(modules)]
        if link.shortcut and link.shortcut != before:
            outer, modules = modules, []
        is_conv = link.layer.kind == "conv"
        if not is_conv and (i == 0 or links[i - 1].layer.kind == "conv"):
            modules += [*_ending_modules(solution), nn.Flatten()]
        step = solution.steps[i] if is_conv else None
        modules.append(conv(link.layer, wide, step.stride, step.padding) if step else linear(link.layer))
        norms = [norm(layer, 2 if is_conv else 1) for layer in link.norms]
        acts = [activation(act)] if i + 1 < len(links) and link.free != 0 else []
        modules += [*acts, *norms] if link.active_first else [*norms, *acts]
        modules += [_pool(step.pool, average)] if step and step.pool else []
        wide = link.layer.wide_out
    if links[-1].layer.kind == "conv":
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*modules)


class Added(nn.Module):
    """x plus what the modules make of it; any shape that they keep"""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        out: Tensor = x + self.inner(x)
        return out


def _ending_modules(solution: PartialChain) -> list[nn.Module]:
    kind = nn.AdaptiveMaxPool2d if solution.peak else nn.AdaptiveAvgPool2d
    return [kind(solution.last)] if solution.last else []


def _pool(side: int, average: bool) -> nn.Module:
    kind = nn.AvgPool2d if average else nn.MaxPool2d
    return kind(2) if side == 2 else kind(3, 2, 1)
