"""Chains: convolutions, BatchNorms and linear layers one after another, without branches.

Strides, paddings and pools leave no tensors. They are searched for: after them the image must have the side that the
first linear layer expects. Gaps in the numbering of an nn.Sequential show where layers without parameters are.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from robustmail.checkpoints.infer import prices
from robustmail.checkpoints.infer.layers import (
    Layer,
    Proposal,
    in_sequence,
)
from robustmail.checkpoints.infer.sequential_network import (
    ConvStep,
    Link,
    PartialChain,
    chain_assumptions,
    chain_name,
    chain_network,
)
from robustmail.checkpoints.names import natural_key

__all__ = ["proposals"]

_SIDES = {1: (28, 32, 8, 64), 3: (32, 64, 28, 224, 96)}
"""sides of images that are tried, by channels"""
_MAX_CONVS = 24
"""convolutions; networks with more have shortcuts"""
_BEAM = 16
"""partial chains that are followed for each side an image can have: the cheapest ones"""
_MAX_SOLUTIONS = 10
"""chains that are proposed with every activation: the cheapest ones"""
_NO_LIMIT = 9
"""room for pools where the names do not say how many there are"""


def proposals(layers: Sequence[Layer], size: int | None) -> list[Proposal]:
    """The chains that these layers may be, cheapest first; none if no order of the layers fits. size: side of the
    images."""
    for order in _orders(layers):
        links = _with_shortcuts(_links(order))
        if not links:
            continue
        convs = [link for link in links if link.layer.kind == "conv"]
        rest = links[len(convs) :]
        if any(link.layer.kind == "conv" for link in rest) or len(convs) > _MAX_CONVS:
            continue
        results = list(_convolutional(links, convs, size)) if convs else list(_dense_only(links, size))
        if results:
            return sorted(results, key=lambda proposal: proposal.cost)
    return []


# The order of layers


def _orders(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers by number; by number with the linear layers last; and so that each takes what the one before gives."""
    numbered = sorted(layers, key=lambda layer: natural_key(layer.name))
    yield numbered
    convs, norms, linears = ([layer for layer in numbered if layer.kind == kind] for kind in ("conv", "norm", "linear"))
    yield [*_interleaved([layer for layer in numbered if layer.kind != "linear"]), *linears]
    first = min((layer.in_channels for layer in convs), default=0)
    fitting = in_sequence(convs, first, _step)
    starts = dict.fromkeys(layer.in_channels for layer in linears)
    chains = filter(None, (in_sequence(linears, start, _step) for start in starts))
    yield from ([*_interleaved([*fitting, *norms]), *chain] for chain in chains)


def _step(layer: Layer, width: int) -> int | None:
    return layer.out_channels if layer.in_channels == width else None


def _interleaved(layers: list[Layer]) -> Iterator[Layer]:
    """conv1, bn1, conv2, bn2, where the names alone would give bn1, bn2, conv1, conv2: behind each convolution the norm
    of its width whose name is most alike."""
    norms = [layer for layer in layers if layer.kind == "norm"]
    for layer in layers:
        if layer.kind == "conv":
            yield layer
            fitting = [norm for norm in norms if norm.out_channels == layer.out_channels]
            if fitting and (norm := max(fitting, key=partial(_likeness, layer.name))):
                norms.remove(norm)
                yield norm
    yield from norms


def _likeness(name: str, norm: Layer) -> tuple[int, bool]:
    """How alike the names of a convolution and of a norm are: the parts that they share, and the number at the end."""
    parts = list(zip(name.split("."), norm.name.split("."), strict=False))
    shared = next((i for i, (a, b) in enumerate(parts) if a != b), len(parts))
    return shared, _number(name) == _number(norm.name)


def _number(name: str) -> str:
    return name[len(name.rstrip("0123456789")) :]


def _links(layers: Sequence[Layer]) -> list[Link]:
    """The layers as links of a chain; an empty list if one does not take what the one before gives."""
    links: list[Link] = []
    width: int | None = None
    for i, layer in enumerate(layers):
        gap = _gap(layers[i - 1].name, layer.name) if i else None
        if layer.kind == "norm":
            if not links or layer.out_channels != width:
                return []
            last = links[-1]
            active_first = last.active_first or bool(gap)
            links[-1] = replace(last, norms=(*last.norms, layer), active_first=active_first, gap=gap)
            continue
        if links:
            flattened = layer.kind == "linear" and links[-1].layer.kind == "conv"
            if flattened:  # each channel becomes pixels
                times, rest = divmod(layer.in_channels, width or 1)
            else:  # each group of a convolution takes its share
                times, rest = divmod(width or 0, layer.in_channels)
            if rest or not times or (layer.kind == "linear" and not flattened and times != 1):
                return []
            slots = gap if gap is None else gap + int(links[-1].active_first)
            links[-1] = replace(links[-1], gap=slots)
        links.append(Link(layer))
        width = layer.out_channels
    return links


def _with_shortcuts(links: list[Link]) -> list[Link]:
    """The links; those in a module called res1 or the like that keeps the number of channels have a shortcut
    (ResNet-9)."""
    results: list[Link] = []
    for name, group in itertools.groupby(links, key=lambda link: _residual_module(link.layer.name)):
        run = list(group)
        is_branch = name and len(run) > 1 and {link.layer.kind for link in run} == {"conv"}
        has_shortcut = is_branch and run[0].layer.in_channels == run[-1].layer.out_channels
        results += [replace(link, shortcut=name) for link in run] if has_shortcut else run
    return results


def _residual_module(name: str) -> str:
    match = re.match(r"(?:[^.]+\.)*?res[a-z_]*\d*(?=\.)", name)
    return match[0] if match else ""


def _gap(before: str, after: str) -> int | None:
    """How many layers of an nn.Sequential are between two names, by their numbers; None if the names do not say."""
    (parent, _, first), (next_parent, _, second) = before.rpartition("."), after.rpartition(".")
    if parent == next_parent and first.isdigit() and second.isdigit() and len(first + second) < 9:
        return int(second) - int(first) - 1 if int(second) > int(first) else None
    return None


# Strides, paddings and pools


def _convolutional(links: Sequence[Link], convs: Sequence[Link], size: int | None) -> Iterator[Proposal]:
    sides = [size] if size else _SIDES.get(convs[0].layer.in_channels, (32, 64, 224))
    for side in sides:
        solutions = sorted(_solutions(links, convs, side), key=lambda solution: solution.cost)[:_MAX_SOLUTIONS]
        for solution in solutions:
            has_pools = any(step.pool for step in solution.steps)
            for act, price in prices.ACTIVATIONS.items():
                for average in (False, True) if has_pools else (False,):
                    cost = solution.cost + price + prices.CHAIN_AVERAGE_POOLS * average
                    yield _proposal(links, replace(solution, cost=cost), side, act, average)
        if solutions:
            return


def _solutions(links: Sequence[Link], convs: Sequence[Link], side: int) -> Iterator[PartialChain]:
    """The cheapest steps, and endings, that lead to the side that the first linear layer expects."""
    expected = links[len(convs)].layer.in_channels // convs[-1].layer.out_channels if len(links) > len(convs) else 1
    target = round(expected**0.5)
    if target * target != expected:
        return
    for chain in _partial_chains(links, convs, side):
        yield from _endings(chain, convs, target)


def _partial_chains(links: Sequence[Link], convs: Sequence[Link], side: int) -> list[PartialChain]:
    """Steps for all convolutions: for each side of the image after each convolution, the cheapest ones."""
    chains = [PartialChain(0.0, (), side)]
    for i, link in enumerate(convs):
        following = links[i + 1] if i + 1 < len(links) else None
        by_side: dict[int, list[PartialChain]] = {}
        for chain in chains:
            before = (convs[i - 1].layer, chain.steps[-1]) if i else None
            for cost, step in _steps(link, following, before):
                if (new_side := _side_after(chain.side, link.layer.kernel, step)) >= 1:
                    longer = PartialChain(chain.cost + cost, (*chain.steps, step), new_side)
                    by_side.setdefault(new_side, []).append(longer)
        cheapest = [heapq.nsmallest(_BEAM, group, key=lambda chain: chain.cost) for group in by_side.values()]
        chains = list(itertools.chain(*cheapest))
    return chains


def _endings(chain: PartialChain, convs: Sequence[Link], target: int) -> Iterator[PartialChain]:
    """The chain with what pools its image to the side `target`, if anything does."""
    shortcuts = "with shortcuts" if any(link.shortcut for link in convs) else "without"
    price = _ending_price(chain.side, target, prices.CHAIN_AVERAGED_SIDE[shortcuts])
    gap = convs[-1].gap
    room = _NO_LIMIT if gap is None else gap - 2  # beside an activation and nn.Flatten
    last_pool = bool(chain.steps[-1].pool)
    pools = last_pool + (chain.side != target)
    if price is None or pools > room + (room < 0):
        return
    unused = 0.0
    if pools < room < _NO_LIMIT:
        unused = prices.CHAIN_GAP_UNUSED
    elif not last_pool and any(step.pool for step in chain.steps):
        unused = prices.CHAIN_NO_LAST_POOL
    ended = replace(chain, cost=chain.cost + price + unused, pooled_to=target if chain.side != target else 0)
    yield ended
    if ended.pooled_to == 1 and chain.side <= prices.MAX_SIDE_FOR_MAXIMUM:
        yield replace(ended, cost=ended.cost + prices.CHAIN_GLOBAL_MAXIMUM[shortcuts], by_maximum=True)


def _ending_price(side: int, target: int, usual_side: int) -> float | None:
    """The price of averaging an image of one side to another; None if nobody does."""
    if side == target:
        return 0.0
    if target == 1:
        return prices.CHAIN_GLOBAL_AVERAGE + max(side - usual_side, 0) / 8
    if side % target == 0:
        return prices.CHAIN_PARTIAL_AVERAGE + side / target / 8
    grows = target in prices.CHAIN_ADAPTIVE_SIDES and side < target
    return prices.CHAIN_ADAPTIVE_AVERAGE if grows else None


def _steps(
    link: Link, following: Link | None, before: tuple[Layer, ConvStep] | None
) -> Iterator[tuple[float, ConvStep]]:
    """(price, step) of every way to apply a convolution. before: the convolution before and its step."""
    kernel = link.layer.kernel
    if link.shortcut:
        yield 0.0, ConvStep(1, kernel // 2)
        return
    choices = itertools.product(_strides(kernel).items(), _paddings(kernel).items())
    for (stride, stride_cost), (padding, padding_cost) in choices:
        cost = stride_cost + padding_cost
        if before is not None and before[0].kernel == kernel:
            other_padding, other_stride = before[1].padding != padding, before[1].stride != stride
            cost += prices.CHAIN_OTHER_PADDING * other_padding + prices.CHAIN_OTHER_STRIDE * other_stride
        for pool, pool_cost in _pools(link, following, stride).items():
            yield cost + pool_cost, ConvStep(stride, padding, pool)


def _strides(kernel: int) -> Mapping[int, float]:
    if kernel == 1:
        return prices.CHAIN_STRIDES["1x1"]
    if kernel % 2 == 0:
        own_size = {kernel: prices.CHAIN_STRIDE_OF_KERNEL} if kernel > 2 else {}
        return {**prices.CHAIN_STRIDES["even"], **own_size}
    return prices.CHAIN_STRIDES["large" if kernel >= 7 else "odd"]


def _paddings(kernel: int) -> Mapping[int, float]:
    if kernel in prices.CHAIN_PADDINGS:
        return prices.CHAIN_PADDINGS[kernel]
    large = prices.CHAIN_PADDINGS_LARGE
    return {kernel // 2: large["half"], 0: large["none"], 2: large["two"]}


def _pools(link: Link, following: Link | None, stride: int) -> Mapping[int, float]:
    """Prices of no pool (0), 2x2 (2) and 3x3 (3) behind a convolution."""
    if following is None:
        return {0: 0.0}
    if following.layer.kind == "linear" and link.gap is not None:
        return prices.CHAIN_POOLS_LAST  # _endings knows how many there is room for
    if link.gap is None:
        table = prices.CHAIN_POOLS_UNNUMBERED
        widens = following.layer.out_channels > link.layer.out_channels
        widens = widens or following.layer.kind == "linear" or bool(following.shortcut)
        price = table["widening" if widens else "not widening"] + table["strided"] * (stride > 1)
        return {0: 0.0, 2: price, 3: price + table["3x3"]}
    if link.gap < 2:  # there is room for an activation only
        return {0: 0.0}
    return prices.CHAIN_POOLS_NUMBERED


def _side_after(side: int, kernel: int, step: ConvStep) -> int:
    """Side of the image after a convolution and its pool, in pixels; 0 or less if nothing is left."""
    side = (side + 2 * step.padding - kernel) // step.stride + 1
    if step.pool == 0:
        return side
    if step.pool == 2:
        return side // 2
    return (side - 1) // 2 + 1 if side > 1 else 0


def _dense_only(links: Sequence[Link], size: int | None) -> Iterator[Proposal]:
    """Linear layers only: the first takes as many features as a square image of 1 or 3 channels has pixels."""
    features = links[0].layer.in_channels
    for channels in (3, 1) if features % 3 == 0 else (1,):
        side = round((features / channels) ** 0.5)
        if side * side * channels == features and size in (None, side):
            for act, price in prices.ACTIVATIONS.items():
                yield _proposal(links, PartialChain(price, (), side), side, act, False, channels)
            return


# The network


def _proposal(
    links: Sequence[Link], solution: PartialChain, size: int, act: str, average: bool, channels: int | None = None
) -> Proposal:
    assumptions = tuple(chain_assumptions(links, solution, act, average))
    make = partial(chain_network, links, solution, act, average)
    return Proposal(chain_name(links), channels or links[0].layer.in_channels, size, assumptions, make, solution.cost)
