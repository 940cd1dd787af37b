"""Residual networks whose stages, blocks, widths and shortcuts are read off names and shapes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.checkpoints.infer.layers import ACTIVATIONS, Layer, Proposal, activation, conv, dense, natural_key, norm

__all__ = ["excludes_chain", "proposals"]

_SHORTCUT = re.compile(r"short|skip|down|ident|proj|conv_?sc|adapt|match", re.IGNORECASE)
_UNUSED = "sub_block1"
_VARIED = 3
"""choices of strides and pools that are tried with every activation"""


@dataclass(frozen=True)
class BlockLayout:
    """The layers of one block: `convs` one after another beside a shortcut, which may have no layers."""

    convs: tuple[Layer, ...]
    norms: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]
    wide_in: int

    @property
    def wide_out(self) -> int:
        return self.convs[-1].wide_out

    @property
    def may_stride(self) -> bool:
        """Only a block whose shortcut is more than the identity can make the image smaller."""
        return bool(self.shortcut) or self.wide_in != self.wide_out


@dataclass(frozen=True)
class Structure:
    """What names and shapes say of a residual network."""

    stem: Layer
    stem_norm: Layer | None
    blocks: tuple[BlockLayout, ...]
    last_norm: Layer | None
    head: tuple[Layer, ...]
    preact: bool


@dataclass(frozen=True)
class Choices:
    """What they do not say."""

    stem_stride: int = 1
    stem_pool: bool = False
    strides: tuple[int, ...] = ()
    """of each block"""
    side: int = 0
    """of the image that is flattened for the head; 0 averages over all of it"""
    pool: int = 1
    """the average pool before flattening"""
    raw_shortcut: bool = False
    """a convolution in the shortcut of a pre-activation block takes the block's input, not the activated one"""
    zeros_last: bool = False
    """the zero channels of parameter-free shortcuts all come last, rather than on both sides"""
    strided: int = 0
    """which convolution of a block has its stride"""
    same: bool = False
    """padding as TensorFlow's SAME: with stride 2, right and below only"""
    act: str = "ReLU"
    size: int | None = field(default=None)


def proposals(layers: Sequence[Layer], size: int | None) -> list[Proposal]:
    """The residual networks that these layers may be; none where there are no blocks."""
    found = []
    layers = [layer for layer in layers if _UNUSED not in layer.name.split(".")]
    for structure in _structures(layers):
        doubt = 3.0 if _like_chain(structure) else 0.0
        ranked = sorted(_choices(structure, size or 32), key=lambda pair: pair[0])[:12]
        for rank, (cost, choices) in enumerate(ranked):
            found.append(_proposal(structure, choices, cost + doubt))
            others = [act for act in ACTIVATIONS if act != choices.act] if rank < _VARIED else []
            for act in others:
                dearer = cost + doubt + ACTIVATIONS[act][0]
                found.append(_proposal(structure, replace(choices, act=act), dearer))
    return found


def excludes_chain(layers: Sequence[Layer]) -> bool:
    """Do shortcuts with layers, or names like layer1.0.conv1, say that these layers are no chain?"""
    return any(not _like_chain(structure) for structure in _structures(layers))


def _like_chain(structure: Structure) -> bool:
    """No shortcut has layers, and the convolutions have numbers for names: rather an nn.Sequential in pieces."""
    convs = [layer for block in structure.blocks for layer in block.convs]
    return not any(b.shortcut for b in structure.blocks) and all(la.name.split(".")[-1].isdigit() for la in convs)


# What the names and shapes say


def _structures(layers: Sequence[Layer]) -> Iterator[Structure]:
    members = _members(layers)
    if not members:
        return
    inside = {layer.name for own in members.values() for layer in own}
    outside = [layer for layer in layers if layer.name not in inside]
    stems, norms, head = ([la for la in outside if la.kind == kind] for kind in ("conv", "norm", "linear"))
    if len(stems) != 1 or len(norms) > 2 or not head:
        return
    head = _in_a_row(head, None)
    blocks = _blocks(members, stems[0].wide_out)
    if not blocks or not head:
        return
    for preact in _preact(blocks, norms, stems[0]):
        yield from _with_norms(Structure(stems[0], None, tuple(blocks), None, tuple(head), preact), norms)


def _members(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The layers of each block: the smallest numbered module with two convolutions or more in it."""
    counts: dict[str, list[Layer]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for depth in range(1, len(parts)):
            if parts[depth - 1][-1:].isdigit():
                counts.setdefault(".".join(parts[:depth]), []).append(layer)
    enough = {name: own for name, own in counts.items() if sum(la.kind == "conv" for la in own) >= 2}
    return {name: own for name, own in enough.items() if not any(o.startswith(f"{name}.") for o in enough)}


def _blocks(members: dict[str, list[Layer]], wide: int) -> list[BlockLayout]:
    """The blocks in a row: as they appear in the file, or else by their numbers."""
    for order in (list(members), sorted(members, key=natural_key)):
        blocks: list[BlockLayout] = []
        current = wide
        for name in order:
            block = _block(name, members[name], current)
            if block is None:
                break
            blocks.append(block)
            current = block.wide_out
        else:
            return blocks
    return []


def _block(prefix: str, own: list[Layer], wide_in: int) -> BlockLayout | None:
    side = [layer for layer in own if _SHORTCUT.search(layer.name[len(prefix) :])]
    main = [layer for layer in own if layer not in side]
    convs = _in_a_row([layer for layer in main if layer.kind == "conv"], wide_in)
    if not convs and not side:  # a shortcut that is not called one
        for layer in main:
            rest = [other for other in main if other is not layer and other.kind == "conv"]
            if (
                layer.kind == "conv"
                and layer.kernel == 1
                and layer.wide_in == wide_in
                and (row := _in_a_row(rest, wide_in))
            ):
                convs, side = row, [layer]
    norms = [layer for layer in main if layer.kind == "norm"]
    norms = sorted(norms, key=lambda layer: natural_key(layer.name))
    side.sort(key=lambda layer: layer.kind)  # "conv" before "norm"
    kinds = [layer.kind for layer in side]
    fits = kinds in ([], ["conv"], ["conv", "norm"]) and len(norms) in (0, len(convs))
    if not convs or not fits or any(layer.kind == "linear" for layer in own):
        return None
    if side and (side[0].wide_in != wide_in or side[0].wide_out != convs[-1].wide_out):
        return None
    return BlockLayout(tuple(convs), tuple(norms), tuple(side), wide_in)


def _in_a_row(layers: list[Layer], wide_in: int | None) -> list[Layer]:
    """The layers in the order in which each takes what the one before gives, by number or by appearance; or nothing."""
    for order in (sorted(layers, key=lambda layer: natural_key(layer.name)), layers):
        current = order[0].wide_in if wide_in is None and order else wide_in or 0
        widths = [current, *(layer.wide_out for layer in order)]
        if all(given % layer.wide_in == 0 if layer.kind == "conv" else given == layer.wide_in
               for given, layer in zip(widths[:-1], order, strict=True)):  # fmt: skip
            return order
    return []


def _preact(blocks: Sequence[BlockLayout], norms: Sequence[Layer], stem: Layer) -> list[bool]:
    """Does BatchNorm come before the convolutions? The widths of a block that widens tell."""
    said = {
        block.norms[0].wide_out == block.wide_in
        for block in blocks
        if block.norms and block.wide_in != block.convs[0].wide_out
    }
    if said:
        return list(said) if len(said) == 1 else []
    if not blocks[0].norms:
        return [False, True]
    return [True, False] if len(norms) == 2 else [False, True]


def _with_norms(structure: Structure, norms: Sequence[Layer]) -> Iterator[Structure]:
    """Say which BatchNorm outside the blocks follows the stem, and which ends the network."""
    first, last = structure.stem.wide_out, structure.blocks[-1].wide_out
    if not norms:
        yield structure
    elif len(norms) == 2:
        for a, b in (norms, norms[::-1]):
            if (a.wide_out, b.wide_out) == (first, last):
                yield replace(structure, stem_norm=a, last_norm=b)
                return
    elif structure.preact and norms[0].wide_out == last:
        yield replace(structure, last_norm=norms[0])
    elif norms[0].wide_out == first:
        yield replace(structure, stem_norm=norms[0])


# What they do not say


def _choices(structure: Structure, size: int) -> Iterator[tuple[float, Choices]]:
    """Everything that the shapes allow, with a price: how far it is from what people do."""
    convolves = any(block.shortcut for block in structure.blocks)
    pads = any(not block.shortcut and block.wide_in != block.wide_out for block in structure.blocks)
    bottleneck = len(structure.blocks[0].convs) == 3
    # One much copied implementation has biases, raw shortcuts and the stride in the second convolution.
    biased = structure.preact and "bias" in structure.blocks[0].convs[0].tensors and bool(structure.blocks[0].norms)
    unsaid = 0.6 if structure.preact and not structure.last_norm else 0.0  # rather post-activation, if nothing tells
    haiku = any("batchnorm_" in layer.name for layer in structure.blocks[0].norms)
    act = "SiLU" if haiku else "ReLU"
    raws = {False: 0.0, True: 1.0} if structure.preact and convolves else {False: 0.0}
    if biased and len(raws) == 2:
        raws = {True: 0.0, False: 1.0}
    flags = itertools.product(
        _sizes(structure, size), raws.items(), ((0.0, False), (1.0, True))[: 2 if pads else 1],
        [(0.0, 1), (1.1, 0)] if bottleneck else [(0.0, 1), (0.7, 0)] if biased else [(0.0, 0)],
        ((0.3 if haiku else 0.0, False), (0.0 if haiku else 2.5, True))[: 2 if structure.preact else 1],
    )  # fmt: skip
    for (cost, base), (raw, odd), (late_cost, late), (place_cost, strided), (same_cost, same) in flags:
        changed = replace(base, act=act, raw_shortcut=raw, zeros_last=late, strided=strided, same=same)
        yield cost + odd + late_cost + place_cost + same_cost + unsaid, changed


def _sizes(structure: Structure, size: int) -> Iterator[tuple[float, Choices]]:
    """Strides and pools that lead to the head's width."""
    features, wide = structure.head[0].wide_in, structure.blocks[-1].wide_out
    side = round((features / wide) ** 0.5)
    if side < 1 or side * side * wide != features:
        return
    free = [i for i, block in enumerate(structure.blocks) if block.may_stride]
    usual = {i: 1 if i == 0 else 2 for i in free}
    patterns = [usual] if side == 1 else [dict(zip(free, s, strict=True)) for s in _strides(len(free))]
    if side == 1 and 0 in free:
        patterns.append({**usual, 0: 2})
    for (stem_cost, stride, pool), pattern in itertools.product(_stems(structure.stem), patterns):
        now = -(-size // stride)
        now = -(-now // 2) if pool else now
        for step in pattern.values():
            now = -(-now // step)
        strides = tuple(pattern.get(i, 1) for i in range(len(structure.blocks)))
        cost = stem_cost + sum(step != usual[i] for i, step in pattern.items())
        if side == 1:
            yield cost, Choices(stride, pool, strides)
        elif now % side == 0:
            yield cost + 2.5 * (now > side), Choices(stride, pool, strides, side, now // side, size=size)


def _strides(count: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, 2), repeat=count)) if count <= 6 else [(1, *[2] * (count - 1)), (2,) * count]


def _stems(stem: Layer) -> list[tuple[float, int, bool]]:
    """(price, stride, with a max-pool)"""
    if stem.kernel >= 7:
        return [(0.0, 2, True), (1.2, 1, False), (1.5, 2, False)]
    return [(0.0, 1, False), (1.0, 2, False), (2.0, 1, True)]


# The network


def _proposal(structure: Structure, choices: Choices, cost: float) -> Proposal:
    size = choices.size
    return Proposal(
        _name(structure, choices), structure.stem.wide_in, size, tuple(_unwritten(structure, choices)),
        lambda: Residual(structure, choices), cost,
    )  # fmt: skip


def _name(structure: Structure, choices: Choices) -> str:
    blocks, stem = structure.blocks, structure.stem
    depth = sum(len(block.convs) for block in blocks) + 2
    widest, narrow = blocks[-1].wide_out, blocks[0].wide_out
    details = []
    groups = len({block.wide_out for block in blocks})
    if structure.preact and stem.wide_out == 16 and groups == 3 and narrow % 16 == 0 and widest == 4 * narrow:
        name = f"WRN-{depth + 2}-{narrow // 16}" if (depth - 2) % 6 == 0 and len(blocks[0].convs) == 2 else ""
    else:
        name = ""
    if not name:
        name = f"{'PreAct' if structure.preact else ''}ResNet-{depth}"
        details.append(f"width {stem.wide_out}" if stem.wide_out not in (16, 64) else "")
        details.append("" if structure.blocks[0].norms else "no BatchNorm")
    if not any(block.shortcut for block in blocks) and any(block.may_stride for block in blocks):
        name += ", option A shortcuts"
    details.append(
        "CIFAR stem" if stem.kernel < 7 and choices.stem_stride == 1 else f"{stem.kernel}x{stem.kernel} stem"
    )
    details.append(f"{structure.head[-1].wide_out} classes")
    return f"{name} ({', '.join(filter(None, details))})"


def _unwritten(structure: Structure, choices: Choices) -> Iterator[str]:
    pool = " and max-pool" if choices.stem_pool else ""
    strides = [choices.strides[i] for i, block in enumerate(structure.blocks) if block.may_stride or i == 0]
    yield f"stem of stride {choices.stem_stride}{pool}; strides {', '.join(map(str, strides))}"
    yield choices.act
    if choices.side:
        yield f"flattened at {choices.side}x{choices.side}" + (
            f" after average pool {choices.pool}" * (choices.pool > 1)
        )
    else:
        yield "global average pool"
    if structure.preact and any(block.shortcut for block in structure.blocks):
        yield f"shortcuts take the {'raw' if choices.raw_shortcut else 'activated'} input"
    if any(not block.shortcut and block.wide_in != block.wide_out for block in structure.blocks):
        yield "shortcuts take every second pixel, zero channels " + ("last" if choices.zeros_last else "on both sides")
    if len(structure.blocks[0].convs) == 3 or choices.strided:
        yield f"strides in convolution {choices.strided + 1} of a block"
    if choices.same:
        yield "padding as TensorFlow's SAME"
    if not structure.blocks[0].norms:
        yield "pre-activation" if structure.preact else "post-activation"


class Residual(nn.Module):
    """[B, C, H, W], normalised, -> [B, classes]"""

    def __init__(self, structure: Structure, choices: Choices) -> None:
        super().__init__()
        plain = structure.preact and structure.stem_norm is None  # the first block normalises
        self.stem = nn.Sequential(
            conv(structure.stem, structure.stem.wide_in, choices.stem_stride),
            *([norm(structure.stem_norm)] if structure.stem_norm else []),
            *([] if plain else [activation(choices.act)]),
            *([nn.MaxPool2d(3, 2, 1)] if choices.stem_pool else []),
        )
        pairs = zip(structure.blocks, choices.strides, strict=True)
        self.blocks = nn.Sequential(*(ResidualBlock(b, s, structure.preact, choices) for b, s in pairs))
        self.end = nn.Sequential(
            *([norm(structure.last_norm)] if structure.last_norm else []),
            *([activation(choices.act)] if structure.last_norm or not structure.blocks[0].norms else []),
            nn.AvgPool2d(choices.pool) if choices.side else nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Sequential(*dense(structure.head, choices.act))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        logits: Tensor = self.head(self.end(self.blocks(self.stem(x))))
        return logits


class ResidualBlock(nn.Module):
    """[B, in, H, W] -> [B, out, H / stride, W / stride], post- or pre-activation."""

    def __init__(self, block: BlockLayout, stride: int, preact: bool, choices: Choices) -> None:
        super().__init__()
        self.preact, self.raw = preact, choices.raw_shortcut
        norms = [norm(layer) for layer in block.norms] or [nn.Identity() for _ in block.convs]
        widths = [block.wide_in, *(layer.wide_out for layer in block.convs)]
        steps = [
            _padded(layer, wide, stride if i == choices.strided else 1, choices.same)
            for i, (layer, (wide, _)) in enumerate(zip(block.convs, pairwise(widths), strict=True))
        ]
        self.before = nn.Sequential(norms[0], activation(choices.act)) if preact else nn.Identity()
        self.after: nn.Module = nn.Identity() if preact else activation(choices.act)
        order = zip(steps, [*norms[1:], None] if preact else norms, strict=True)
        main: list[nn.Module] = []
        for i, (step, own) in enumerate(order):
            main += [step, *([own] if own else []), *([activation(choices.act)] if i < len(steps) - 1 else [])]
        self.main = nn.Sequential(*main)
        self.carries: nn.Module = nn.Identity()
        if block.shortcut:
            first, *rest = block.shortcut
            self.carries = nn.Sequential(conv(first, block.wide_in, stride), *map(norm, rest))
        elif block.may_stride:
            self.carries = Zeros(block.wide_in, block.wide_out, stride, choices.zeros_last)
        self.convolves = bool(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]"""
        active = self.before(x)
        carried = self.carries(active if self.preact and self.convolves and not self.raw else x)
        out: Tensor = self.after(self.main(active) + carried)
        return out


class Zeros(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, channels filled up with zeros."""

    def __init__(self, wide_in: int, wide_out: int, stride: int, last: bool) -> None:
        super().__init__()
        extra = wide_out - wide_in
        if extra < 0:
            raise ValueError("a shortcut without parameters cannot have fewer channels")
        self.stride, self.extra = stride, (0, extra) if last else (extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]"""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.extra))


def _padded(layer: Layer, wide_in: int, stride: int, same: bool) -> nn.Module:
    if not same or stride == 1:
        return conv(layer, wide_in, stride)
    below = max(layer.kernel - stride, 0)
    return nn.Sequential(nn.ZeroPad2d((below // 2, below - below // 2) * 2), conv(layer, wide_in, stride, 0))
