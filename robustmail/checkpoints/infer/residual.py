"""Residual networks: what structure, strides, pools and activations they may have, and the network itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

from torch import Tensor, nn
from torch.nn import functional as F

from robustmail.checkpoints.infer import prices
from robustmail.checkpoints.infer.layers import Layer, Proposal, activation, conv, dense, norm
from robustmail.checkpoints.infer.residual_structure import BlockLayout, Structure, resembles_chain, structures

__all__ = ["excludes_chain", "proposals"]

_UNUSED = "sub_block1"
"""a group of blocks in TRADES' WideResNet that its forward pass never uses"""
_MAX_CHOICES = 12
"""cheapest choices of strides and pools that are proposed for a structure"""
_MAX_CHOICES_WITH_ACTIVATIONS = 3
"""the cheapest of them, which are proposed with every activation"""
_MAX_FREE_STRIDES = 6
"""blocks whose strides are tried in all combinations"""


@dataclass(frozen=True)
class Choices:
    """What names and shapes do not tell of a residual network."""

    stem_stride: int = 1
    stem_pool: bool = False
    """a 3x3 max-pool of stride 2 behind the stem"""
    strides: tuple[int, ...] = ()
    """of each block"""
    side: int = 0
    """side of the image that is flattened for the head, in pixels; 0: a global average pool"""
    pool: int = 1
    """side of the average pool before flattening"""
    raw_shortcut: bool = False
    """a convolution in the shortcut of a pre-activation block takes the block's input, not the activated one"""
    zeros_last: bool = False
    """the zero channels of parameter-free shortcuts all come last, rather than on both sides"""
    strided_conv: int = 0
    """which convolution of a block has its stride, counted from 0"""
    same_padding: bool = False
    """padding as TensorFlow's SAME: with stride 2, right and below only"""
    act: str = "ReLU"
    size: int | None = None
    """side of the images, where the head fixes it"""


def proposals(layers: Sequence[Layer], size: int | None) -> list[Proposal]:
    """The residual networks that these layers may be; none where there are no blocks. size: side of the images."""
    results = []
    layers = [layer for layer in layers if _UNUSED not in layer.name.split(".")]
    for structure in structures(layers):
        doubt = prices.RESIDUAL_LIKE_CHAIN if resembles_chain(structure) else 0.0
        ranked = sorted(_choices(structure, size or 32), key=lambda pair: pair[0])[:_MAX_CHOICES]
        for rank, (cost, choices) in enumerate(ranked):
            results.append(_proposal(structure, choices, cost + doubt))
            if rank < _MAX_CHOICES_WITH_ACTIVATIONS:
                for act, price in prices.ACTIVATIONS.items():
                    if act != choices.act:
                        results.append(_proposal(structure, replace(choices, act=act), cost + doubt + price))
    return results


def excludes_chain(layers: Sequence[Layer]) -> bool:
    """Whether shortcuts with layers, or names like layer1.0.conv1, say that these layers are not a chain."""
    return any(not resembles_chain(structure) for structure in structures(layers))


# What names and shapes do not tell


def _choices(structure: Structure, size: int) -> Iterator[tuple[float, Choices]]:
    """All choices that the shapes allow, with their prices."""
    blocks = structure.blocks
    has_biases = structure.preact and "bias" in blocks[0].convs[0].tensors and bool(blocks[0].norms)
    is_haiku = any("batchnorm_" in layer.name for layer in blocks[0].norms)
    pads_channels = any(not block.shortcut and block.in_channels != block.out_channels for block in blocks)
    unlikely = prices.RESIDUAL_PREACT_WITHOUT_NORM if structure.preact and not structure.last_norm else 0.0

    shortcuts = {False: 0.0}
    if structure.preact and any(block.shortcut for block in blocks):
        odd = prices.RESIDUAL_ODD_SHORTCUT
        shortcuts = {True: 0.0, False: odd} if has_biases else {False: 0.0, True: odd}
    zeros = {False: 0.0, True: prices.RESIDUAL_ZEROS_LAST} if pads_channels else {False: 0.0}
    strided_convs = prices.RESIDUAL_STRIDED_CONV
    if len(blocks[0].convs) == 3:
        strided_convs = prices.RESIDUAL_STRIDED_CONV_BOTTLENECK
    elif has_biases:
        strided_convs = prices.RESIDUAL_STRIDED_CONV_BIASED
    paddings = prices.RESIDUAL_SAME_PADDING_HAIKU if is_haiku else prices.RESIDUAL_SAME_PADDING
    if not structure.preact:
        paddings = {False: paddings[False]}

    flags = product(shortcuts.items(), zeros.items(), strided_convs.items(), paddings.items())
    options = list(flags)
    for size_cost, sizes in _sizes(structure, size):
        for (raw, raw_cost), (last, last_cost), (strided, strided_cost), (same, same_cost) in options:
            choices = replace(
                sizes,
                act="SiLU" if is_haiku else "ReLU",
                raw_shortcut=raw,
                zeros_last=last,
                strided_conv=strided,
                same_padding=same,
            )
            yield size_cost + raw_cost + last_cost + strided_cost + same_cost + unlikely, choices


def _sizes(structure: Structure, size: int) -> Iterator[tuple[float, Choices]]:
    """Strides and pools that lead to the head's width, with their prices."""
    features, width = structure.head[0].in_channels, structure.blocks[-1].out_channels
    side = round((features / width) ** 0.5)
    if side < 1 or side * side * width != features:
        return
    free = [i for i, block in enumerate(structure.blocks) if block.may_stride]
    usual = {i: 1 if i == 0 else 2 for i in free}
    if side == 1:  # a global average fits any strides
        patterns = [usual, {**usual, 0: 2}] if 0 in free else [usual]
    else:
        patterns = [dict(zip(free, strides, strict=True)) for strides in _stride_patterns(len(free))]
    stems = prices.RESIDUAL_STEMS_LARGE if structure.stem.kernel >= 7 else prices.RESIDUAL_STEMS_SMALL
    for ((stride, pool), stem_cost), pattern in product(stems.items(), patterns):
        strides = tuple(pattern.get(i, 1) for i in range(len(structure.blocks)))
        side_before = _side_after(size, [stride, 2 if pool else 1, *pattern.values()])
        cost = stem_cost + prices.RESIDUAL_OTHER_STRIDE * sum(step != usual[i] for i, step in pattern.items())
        if side == 1:
            yield cost, Choices(stride, pool, strides)
        elif side_before % side == 0:
            cost += prices.RESIDUAL_AVERAGED_BEFORE_FLATTEN * (side_before > side)
            yield cost, Choices(stride, pool, strides, side, side_before // side, size=size)


def _side_after(side: int, strides: Sequence[int]) -> int:
    for stride in strides:
        side = -(-side // stride)
    return side


def _stride_patterns(count: int) -> list[tuple[int, ...]]:
    if count <= _MAX_FREE_STRIDES:
        return list(product((1, 2), repeat=count))
    return [(1, *[2] * (count - 1)), (2,) * count]


# The network


def _proposal(structure: Structure, choices: Choices, cost: float) -> Proposal:
    return Proposal(
        _name(structure, choices),
        structure.stem.in_channels,
        choices.size,
        tuple(_assumptions(structure, choices)),
        lambda: Residual(structure, choices),
        cost,
    )


def _name(structure: Structure, choices: Choices) -> str:
    blocks, stem = structure.blocks, structure.stem
    depth = sum(len(block.convs) for block in blocks) + 2
    details = []
    name = _wide_resnet_name(structure, depth)
    if not name:
        name = f"{'PreAct' if structure.preact else ''}ResNet-{depth}"
        details.append(f"width {stem.out_channels}" if stem.out_channels not in (16, 64) else "")
        details.append("" if structure.blocks[0].norms else "no BatchNorm")
    if not any(block.shortcut for block in blocks) and any(block.may_stride for block in blocks):
        name += ", option A shortcuts"
    is_cifar_stem = stem.kernel < 7 and choices.stem_stride == 1
    details.append("CIFAR stem" if is_cifar_stem else f"{stem.kernel}x{stem.kernel} stem")
    details.append(f"{structure.head[-1].out_channels} classes")
    return f"{name} ({', '.join(filter(None, details))})"


def _wide_resnet_name(structure: Structure, depth: int) -> str:
    """WRN-depth-width, or "" if the widths are not those of a wide residual network."""
    blocks, last, first = structure.blocks, structure.blocks[-1].out_channels, structure.blocks[0].out_channels
    has_widths = structure.stem.out_channels == 16 and first % 16 == 0 and last == 4 * first
    has_groups = len({block.out_channels for block in blocks}) == 3 and len(blocks[0].convs) == 2
    if structure.preact and has_widths and has_groups and (depth - 2) % 6 == 0:
        return f"WRN-{depth + 2}-{first // 16}"
    return ""


def _assumptions(structure: Structure, choices: Choices) -> Iterator[str]:
    max_pool = " and max-pool" if choices.stem_pool else ""
    strides = [choices.strides[i] for i, block in enumerate(structure.blocks) if block.may_stride or i == 0]
    yield f"stem of stride {choices.stem_stride}{max_pool}; strides {', '.join(map(str, strides))}"
    yield choices.act
    if choices.side:
        average_pool = f" after average pool {choices.pool}" if choices.pool > 1 else ""
        yield f"flattened at {choices.side}x{choices.side}{average_pool}"
    else:
        yield "global average pool"
    if structure.preact and any(block.shortcut for block in structure.blocks):
        yield f"shortcuts take the {'raw' if choices.raw_shortcut else 'activated'} input"
    if any(not block.shortcut and block.in_channels != block.out_channels for block in structure.blocks):
        yield "shortcuts take every second pixel, zero channels " + ("last" if choices.zeros_last else "on both sides")
    if len(structure.blocks[0].convs) == 3 or choices.strided_conv:
        yield f"strides in convolution {choices.strided_conv + 1} of a block"
    if choices.same_padding:
        yield "padding as TensorFlow's SAME"
    if not structure.blocks[0].norms:
        yield "pre-activation" if structure.preact else "post-activation"


class Residual(nn.Module):
    """Images [B, C, H, W], normalised -> logits [B, classes]"""

    def __init__(self, structure: Structure, choices: Choices) -> None:
        super().__init__()
        is_plain = structure.preact and structure.stem_norm is None  # the first block normalises and activates
        self.stem = nn.Sequential(
            conv(structure.stem, structure.stem.in_channels, choices.stem_stride),
            *([norm(structure.stem_norm)] if structure.stem_norm else []),
            *([] if is_plain else [activation(choices.act)]),
            *([nn.MaxPool2d(3, 2, 1)] if choices.stem_pool else []),
        )
        pairs = zip(structure.blocks, choices.strides, strict=True)
        self.blocks = nn.Sequential(
            *(ResidualBlock(block, stride, structure.preact, choices) for block, stride in pairs)
        )
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
    """A residual block, post- or pre-activation: [B, in, H, W] -> [B, out, H / stride, W / stride]"""

    def __init__(self, block: BlockLayout, stride: int, preact: bool, choices: Choices) -> None:
        super().__init__()
        self.preact, self.raw_shortcut = preact, choices.raw_shortcut
        norms = [norm(layer) for layer in block.norms] or [nn.Identity() for _ in block.convs]
        widths = [block.in_channels, *(layer.out_channels for layer in block.convs)]
        convs = [
            _padded_conv(layer, wide, stride if i == choices.strided_conv else 1, choices.same_padding)
            for i, (layer, (wide, _)) in enumerate(zip(block.convs, pairwise(widths), strict=True))
        ]
        self.before = nn.Sequential(norms[0], activation(choices.act)) if preact else nn.Identity()
        self.after: nn.Module = nn.Identity() if preact else activation(choices.act)
        pairs = zip(convs, [*norms[1:], None] if preact else norms, strict=True)
        main: list[nn.Module] = []
        for i, (convolution, batch_norm) in enumerate(pairs):
            main += [convolution, *([batch_norm] if batch_norm else [])]
            main += [activation(choices.act)] if i < len(convs) - 1 else []
        self.main = nn.Sequential(*main)
        self.shortcut: nn.Module = nn.Identity()
        if block.shortcut:
            first, *rest = block.shortcut
            self.shortcut = nn.Sequential(conv(first, block.in_channels, stride), *map(norm, rest))
        elif block.may_stride:
            self.shortcut = ZeroPaddedShortcut(block.in_channels, block.out_channels, stride, choices.zeros_last)
        self.has_conv_shortcut = bool(block.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]"""
        active = self.before(x)
        shortcut = self.shortcut(active if self.preact and self.has_conv_shortcut and not self.raw_shortcut else x)
        out: Tensor = self.after(self.main(active) + shortcut)
        return out


class ZeroPaddedShortcut(nn.Module):
    """A shortcut without parameters (option A): every `stride`-th pixel, channels filled up with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, last: bool) -> None:
        super().__init__()
        extra = out_channels - in_channels
        if extra < 0:
            raise ValueError("a shortcut without parameters cannot have fewer channels")
        self.stride, self.extra = stride, (0, extra) if last else (extra // 2, extra - extra // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / stride, W / stride]"""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.extra))


def _padded_conv(layer: Layer, in_channels: int, stride: int, same_padding: bool) -> nn.Module:
    if not same_padding or stride == 1:
        return conv(layer, in_channels, stride)
    below = max(layer.kernel - stride, 0)
    return nn.Sequential(nn.ZeroPad2d((below // 2, below - below // 2) * 2), conv(layer, in_channels, stride, 0))
