"""What names and shapes tell of a residual network: stem, blocks, shortcuts, order of BatchNorm, head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from robustmail.checkpoints.infer.layers import Layer, in_sequence
from robustmail.checkpoints.names import natural_key

__all__ = ["BlockLayout", "Structure", "resembles_chain", "structures"]

_SHORTCUT = re.compile(r"short|skip|down|ident|proj|conv_?sc|adapt|match", re.IGNORECASE)


@dataclass(frozen=True)
class BlockLayout:
    """The layers of one residual block.

    convs, norms: of the main branch, in the order of the forward pass. shortcut: none, a convolution, or a convolution
    and its BatchNorm. in_channels: of the block's input.
    """

    convs: tuple[Layer, ...]
    norms: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]
    in_channels: int

    @property
    def out_channels(self) -> int:
        return self.convs[-1].out_channels

    @property
    def may_stride(self) -> bool:
        """Whether the block can make the image smaller: not if its shortcut is the identity."""
        return bool(self.shortcut) or self.in_channels != self.out_channels


@dataclass(frozen=True)
class Structure:
    """A residual network as far as names and shapes tell it.

    stem: the first convolution. stem_norm: its BatchNorm. blocks: in the order of the forward pass. last_norm: the
    BatchNorm behind the last block. head: linear layers. preact: whether BatchNorm comes before convolutions.
    """

    stem: Layer
    stem_norm: Layer | None
    blocks: tuple[BlockLayout, ...]
    last_norm: Layer | None
    head: tuple[Layer, ...]
    preact: bool


def structures(layers: Sequence[Layer]) -> Iterator[Structure]:
    """The structures that the layers may have; none if they are not a residual network's."""
    members = _members(layers)
    if not members:
        return
    in_blocks = {layer.name for block in members.values() for layer in block}
    outside = [layer for layer in layers if layer.name not in in_blocks]
    stems, norms, head = ([layer for layer in outside if layer.kind == kind] for kind in ("conv", "norm", "linear"))
    if len(stems) != 1 or len(norms) > 2 or not head:
        return
    head = _in_order(head, None)
    blocks = _blocks(members, stems[0].out_channels)
    if not blocks or not head:
        return
    for preact in _preact_options(blocks, norms, stems[0]):
        yield from _with_norms(Structure(stems[0], None, tuple(blocks), None, tuple(head), preact), norms)


def _members(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """The layers of each block: the smallest numbered module with two convolutions or more in it."""
    counts: dict[str, list[Layer]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        for depth in range(1, len(parts)):
            if parts[depth - 1][-1:].isdigit():
                counts.setdefault(".".join(parts[:depth]), []).append(layer)
    blocks = {name: inner for name, inner in counts.items() if sum(layer.kind == "conv" for layer in inner) >= 2}
    return {
        name: inner for name, inner in blocks.items() if not any(deeper.startswith(f"{name}.") for deeper in blocks)
    }


def _blocks(members: dict[str, list[Layer]], in_channels: int) -> list[BlockLayout]:
    """The blocks in the order of the forward pass: by their numbers, or else so that their channels fit."""

    def step(name: str, channels: int) -> int | None:
        block = _block(name, members[name], channels)
        return block.out_channels if block else None

    blocks: list[BlockLayout] = []
    for name in in_sequence(sorted(members, key=natural_key), in_channels, step):
        block = _block(name, members[name], blocks[-1].out_channels if blocks else in_channels)
        blocks += [block] if block else []
    return blocks


def _block(prefix: str, layers: list[Layer], in_channels: int) -> BlockLayout | None:
    shortcut = [layer for layer in layers if _SHORTCUT.search(layer.name[len(prefix) :])]
    main = [layer for layer in layers if layer not in shortcut]
    convs = _in_order([layer for layer in main if layer.kind == "conv"], in_channels)
    if not convs and not shortcut:  # perhaps one of the 1x1 convolutions is the shortcut, under any name
        pointwise = [layer for layer in main if layer.kernel == 1 and layer.in_channels == in_channels]
        for layer in pointwise:
            rest = [conv for conv in main if conv is not layer and conv.kind == "conv"]
            if row := _in_order(rest, in_channels):
                convs, shortcut = row, [layer]
    norms = [layer for layer in main if layer.kind == "norm"]
    norms = sorted(norms, key=lambda layer: natural_key(layer.name))
    shortcut.sort(key=lambda layer: layer.kind)  # "conv" before "norm"
    kinds = [layer.kind for layer in shortcut]
    is_known = kinds in ([], ["conv"], ["conv", "norm"]) and len(norms) in (0, len(convs))
    if not convs or not is_known or any(layer.kind == "linear" for layer in layers):
        return None
    if shortcut and (shortcut[0].in_channels != in_channels or shortcut[0].out_channels != convs[-1].out_channels):
        return None
    return BlockLayout(tuple(convs), tuple(norms), tuple(shortcut), in_channels)


def _in_order(layers: list[Layer], in_channels: int | None) -> list[Layer]:
    """The layers in an order in which each takes the channels that the one before gives, by number where that fits; an
    empty list if there is none."""
    numbered = sorted(layers, key=lambda layer: natural_key(layer.name))
    starts = [layer.in_channels for layer in numbered] if in_channels is None else [in_channels]
    orders = (in_sequence(numbered, start, _step) for start in dict.fromkeys(starts))
    return next(filter(None, orders), [])


def _step(layer: Layer, width: int) -> int | None:
    return layer.out_channels if _takes(layer, width) else None


def _takes(layer: Layer, width: int) -> bool:
    """Whether a layer takes an input of so many channels; a convolution may be grouped."""
    return width % layer.in_channels == 0 if layer.kind == "conv" else width == layer.in_channels


def _preact_options(blocks: Sequence[BlockLayout], norms: Sequence[Layer], stem: Layer) -> list[bool]:
    """Whether BatchNorm comes before the convolutions, likelier answer first; the width of BatchNorm in a block that
    widens decides it."""
    answers = {
        block.norms[0].out_channels == block.in_channels
        for block in blocks
        if block.norms and block.in_channels != block.convs[0].out_channels
    }
    if answers:
        return list(answers) if len(answers) == 1 else []
    if not blocks[0].norms:
        return [False, True]
    return [True, False] if len(norms) == 2 else [False, True]


def _with_norms(structure: Structure, norms: Sequence[Layer]) -> Iterator[Structure]:
    """The structure with the BatchNorms outside of blocks in their places: behind the stem, or behind the last
    block."""
    first, last = structure.stem.out_channels, structure.blocks[-1].out_channels
    if not norms:
        yield structure
    elif len(norms) == 2:
        for a, b in (norms, norms[::-1]):
            if (a.out_channels, b.out_channels) == (first, last):
                yield replace(structure, stem_norm=a, last_norm=b)
                return
    elif structure.preact and norms[0].out_channels == last:
        yield replace(structure, last_norm=norms[0])
    elif norms[0].out_channels == first:
        yield replace(structure, stem_norm=norms[0])


def resembles_chain(structure: Structure) -> bool:
    """Whether the layers are rather those of an nn.Sequential: no shortcut has layers, and convolutions have numbers
    for names."""
    convs = [layer for block in structure.blocks for layer in block.convs]
    return not any(block.shortcut for block in structure.blocks) and all(
        conv.name.split(".")[-1].isdigit() for conv in convs
    )
