"""The logits, on a CPU, of images that differ from known ones in a square only, without what the square cannot reach.

A convolution carries a change no further than its kernel reaches. So the activations of the known images are kept, and
of each layer only the region is computed in which the change can be seen, as long as that is a small part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from robustmail.models.folded import ADDITIONS, RELUS, FoldedConv, FoldedModel

__all__ = ["KnownImages", "at_least", "filled_up"]

POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.BatchNorm2d)  # in eval mode
MOST = 0.5  # share of a layer's pixels above which the layer is computed as a whole


class Span(NamedTuple):
    """An interval of rows, or of columns, for each place of the square in the image: starts [places], one length."""

    start: Tensor
    length: int

    def moved(self, by: Tensor | int) -> Span:
        """The same interval elsewhere."""
        return Span(self.start + by, self.length)

    def union(self, other: Span, size: int) -> Span:
        """The smallest span within `size` that holds both."""
        start = self.start.minimum(other.start)
        end = (self.start + self.length).maximum(other.start + other.length)
        length = int((end - start).max())
        return Span(start.clamp(max=size - length), length)


class Region(NamedTuple):
    """Rows and columns of an activation."""

    rows: Span
    columns: Span

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)"""
        return self.rows.length, self.columns.length

    def moved(self, rows: Tensor | int, columns: Tensor | int) -> Region:
        """The same rectangle elsewhere."""
        return Region(self.rows.moved(rows), self.columns.moved(columns))


class Reach(NamedTuple):
    """How far a layer looks in one dimension: output i sees `span` inputs, from i stride - padding on."""

    span: int
    stride: int
    padding: int

    def outputs(self, inputs: Span, size: int) -> Span:
        """The outputs, of `size` in all, that see any of these inputs."""
        length = min((inputs.length + self.span - 2) // self.stride + 1, size)
        first = -((self.span - 1 - self.padding - inputs.start) // self.stride)
        return Span(first.clamp(0, size - length), length)

    def inputs(self, outputs: Span) -> Span:
        """The inputs that these outputs see; the start may be negative, in the padding."""
        return Span(outputs.start * self.stride - self.padding, (outputs.length - 1) * self.stride + self.span)


class Rectangles(NamedTuple):
    """One rectangle for each place of the square, as positions in activations [M, H, W, C] flattened to [M H W, C].

    corner: the upper left one in the first activation, [places]. inside: all others from there, [height width].
    pixels: of an activation.
    """

    corner: Tensor
    inside: Tensor
    pixels: int

    @staticmethod
    def of(region: Region, size: Sequence[int]) -> Rectangles:
        """size: height and width of the activation."""
        rows, columns = region
        corner = rows.start[:, None] * size[1] + columns.start
        inside = torch.arange(rows.length)[:, None] * size[1] + torch.arange(columns.length)
        return Rectangles(corner.flatten(), inside.flatten(), size[0] * size[1])

    def at(self, activation: Tensor, place: Tensor) -> Tensor:
        """The positions for activations [R] and places [R], [R height width]."""
        return ((activation * self.pixels + self.corner[place])[:, None] + self.inside).flatten()


class Crop(NamedTuple):
    """What a layer reads of an activation, in rows or columns.

    read: the interval that it needs, which may reach into the padding, and more, so that it holds all that changes.
    trim: where the needed part lies in `read`.
    """

    read: Span
    trim: slice

    @staticmethod
    def of(needed: Span, changed: Span) -> Crop:
        """changed: the interval of the activation that has new values."""
        before = max(int((needed.start - changed.start).max()), 0)
        ends = changed.start + changed.length - needed.start - needed.length
        read = Span(needed.start - before, needed.length + before + max(int(ends.max()), 0))
        return Crop(read, slice(before, before + needed.length))

    def border(self, size: int) -> int:
        """How many pixels beyond an activation of `size` are read, at most."""
        return max(-int(self.read.start.min()), int(self.read.start.max()) + self.read.length - size, 0)


class Reading(NamedTuple):
    """How a layer reads an activation: `old` in the known activation, `new` where the new values go in what was read.

    shape: (height, width) of what is read. trim: the part of it that the layer needs.
    """

    old: Rectangles
    new: Rectangles
    shape: tuple[int, int]
    trim: tuple[slice, slice]


class KnownImages:
    """Images whose activations are known, and the logits of images that differ from them in a square.

    model: the folded network.
    x: the images, [M, C, H, W].
    side: of the squares, in pixels.
    least: every pass has a multiple of so many rows, so that an image's bits do not depend on the others.
    most: images whose activations are computed in one pass.
    context: made anew around layers that are computed as a whole.
    """

    def __init__(
        self,
        model: FoldedModel,
        x: Tensor,
        side: int,
        least: int = 1,
        most: int = 128,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.side, self.least, self.context = model, side, least, context
        self.known: dict[fx.Node, Tensor] = {}  # [M, H + 2 border, W + 2 border, C]
        self.changed: dict[fx.Node, Region] = {}  # where a square can be seen
        self.border: dict[fx.Node, int] = {}  # zeros around an activation
        self.changed_at: dict[fx.Node, Rectangles] = {}  # `changed` in the known activation
        self.readings: dict[tuple[fx.Node | None, fx.Node], Reading] = {}  # by (reader, what is read); None: all of it
        self.values: dict[fx.Node, Tensor] = {}  # of the last call, [R, height, width, C]
        self.place = self.rows = self.order = torch.empty(0, dtype=torch.int64)  # of the last call, [R]
        with torch.no_grad():
            parts = [self._learn(part, side) for part in x.split(most)]
            self.known = {node: self._bordered(node, [part[node] for part in parts]) for node in self.changed}
        self.rest, self.inputs = self._rest()

    @property
    def is_faster(self) -> bool:
        """Whether there are layers that need not be computed as a whole."""
        return any(node.op == "call_module" for node in self.known)

    def __call__(self, place: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        """Logits [R, classes] of the images `rows` [R], each with `values` [R, C, side, side] in a square.

        place: (top, left) of each square, [R, 2].
        """
        place, self.rows = (filled_up(part, self.least) for part in (place, rows))
        self.place = place[:, 0] * self.columns + place[:, 1]  # as tables count them
        self.order = torch.arange(len(self.rows))
        with torch.no_grad():
            x = self.model.model.prepare(filled_up(values, self.least))
            self.values = {}
            for node in self.known:
                y = x if node.op == "placeholder" else self._new_values(node)
                self.values[node] = y.permute(0, 2, 3, 1)
            whole = [self._read(None, node) for node in self.inputs]
            with self.context():
                logits: Tensor = self.rest(*whole)
            return logits[: len(rows)].float()

    def accept(self, which: Tensor) -> None:
        """Let the images of the last call at the positions `which`, of different rows, take the place of the known."""
        for node, values in self.values.items():
            known, at = self.known[node], self.changed_at[node].at(self.rows[which], self.place[which])
            known.view(-1, known.shape[3]).index_copy_(0, at, values[which].flatten(0, 2))

    def keep(self, which: Tensor) -> None:
        """Forget all images but those at the positions `which`, or where it is true."""
        self.known = {node: activation[which] for node, activation in self.known.items()}

    def _learn(self, x: Tensor, side: int) -> dict[fx.Node, Tensor]:
        """The activations [M, C, H, W] that are kept of images [M, C, H, W]; the first time, choose them."""
        interpreter = fx.Interpreter(self.model.graph, garbage_collect_values=False)
        with self.context():
            interpreter.run(self.model.model.prepare(filled_up(x, self.least)))
        values = {node: interpreter.env[node] for node in self.model.graph.graph.nodes}
        images = {node: value for node, value in values.items() if isinstance(value, Tensor) and value.ndim == 4}
        if not self.changed:
            self._plan({node: value.shape[2:] for node, value in images.items()}, side)
        return {node: images[node][: len(x)] for node in self.changed}

    def _bordered(self, node: fx.Node, parts: list[Tensor]) -> Tensor:
        """An activation as it is kept."""
        border = self.border[node]
        activation = torch.cat(parts).permute(0, 2, 3, 1)
        return nn.functional.pad(activation, (0, 0, border, border, border, border)).contiguous()

    def _plan(self, sizes: dict[fx.Node, torch.Size], side: int) -> None:
        """Choose the activations that a square cannot change but for a small part, and how they are read."""
        for node, size in sizes.items():
            if node.op == "placeholder":
                rows, columns = (Span(torch.arange(length - side + 1), side) for length in size)
                region, self.columns = Region(rows, columns), len(columns.start)
            elif self._is_local(node) and all(source in self.changed for source in node.all_input_nodes):
                region = self._region(node, size)
            else:
                continue
            if region.rows.length * region.columns.length <= MOST * size[0] * size[1]:
                self.changed[node] = region
        for node in self.changed:
            self._plan_readings(node, sizes[node])

    def _region(self, node: fx.Node, size: Sequence[int]) -> Region:
        """Where the node's output, of `size`, can change."""
        first, *others = (self.changed[source] for source in node.all_input_nodes)
        spans = [reach.outputs(span, n) for reach, span, n in zip(self._reach(node), first, size, strict=True)]
        for other in others:
            spans = [mine.union(its, n) for mine, its, n in zip(spans, other, size, strict=True)]
        return Region(*spans)

    def _plan_readings(self, source: fx.Node, size: Sequence[int]) -> None:
        """Choose how an activation of `size` is read, and so how wide a border it needs."""
        changed, crops = self.changed[source], {}
        for user in source.users:
            reader = user if user in self.changed else None
            needed = self._needed(reader, source, size)
            crops[reader] = [Crop.of(*spans) for spans in zip(needed, changed, strict=True)]
        border = max((crop.border(n) for pair in crops.values() for crop, n in zip(pair, size, strict=True)), default=0)
        self.border[source], bordered = border, [n + 2 * border for n in size]
        self.changed_at[source] = Rectangles.of(changed.moved(border, border), bordered)
        for reader, (rows, columns) in crops.items():
            read = Region(rows.read, columns.read)
            new = changed.moved(-read.rows.start, -read.columns.start)
            old = Rectangles.of(read.moved(border, border), bordered)
            trim = (rows.trim, columns.trim)
            self.readings[reader, source] = Reading(old, Rectangles.of(new, read.shape), read.shape, trim)

    def _needed(self, reader: fx.Node | None, source: fx.Node, size: Sequence[int]) -> Region:
        """What a layer needs of an activation of `size`, so that its output is known where it changes."""
        if reader is None:
            starts = (torch.zeros_like(span.start) for span in self.changed[source])
            return Region(*(Span(start, n) for start, n in zip(starts, size, strict=True)))
        region = self.changed[reader]
        if source is not reader.all_input_nodes[0]:  # a summand
            return region
        return Region(*(reach.inputs(span) for reach, span in zip(self._reach(reader), region, strict=True)))

    def _rest(self) -> tuple[fx.GraphModule, list[fx.Node]]:
        """(the layers that are computed as a whole, the activations that they need)."""
        rest, inputs = fx.Graph(), [node for node in self.known if (None, node) in self.readings]
        copies = {node: rest.placeholder(node.name) for node in inputs}
        for node in self.model.graph.graph.nodes:
            if node not in self.known:
                copies[node] = rest.node_copy(node, copies.__getitem__)
        return fx.GraphModule(self.model.graph, rest), inputs

    def _new_values(self, node: fx.Node) -> Tensor:
        """The node's output where it changes, [R, C, height, width], from the new values of its inputs."""
        x, *summands = (self._read(node, source) for source in node.all_input_nodes)
        layer = self._layer(node)
        if isinstance(layer, FoldedConv):
            return layer.forward_valid(x, summands[0] if summands else None)
        if layer is not None:
            return cast(Tensor, layer(x))
        return cast("Callable[..., Tensor]", node.target)(x, *summands)

    def _read(self, reader: fx.Node | None, source: fx.Node) -> Tensor:
        """What a layer reads of an activation, with its new values, [R, C, height, width]; None: all of it."""
        reading, known, new = self.readings[reader, source], self.known[source], self.values[source]
        channels = known.shape[3]
        x = known.view(-1, channels).index_select(0, reading.old.at(self.rows, self.place))
        x.index_copy_(0, reading.new.at(self.order, self.place), new.reshape(-1, channels))
        rows, columns = reading.trim
        return x.view(-1, *reading.shape, channels)[:, rows, columns].permute(0, 3, 1, 2)

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.model.graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_local(self, node: fx.Node) -> bool:
        """Whether an output pixel of the node depends on the input pixels near it only."""
        layer = self._layer(node)
        if isinstance(layer, nn.MaxPool2d):
            return layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1)) and not layer.ceil_mode
        if isinstance(layer, nn.AvgPool2d):
            return layer.padding in (0, (0, 0)) and not layer.ceil_mode
        if len(node.all_input_nodes) != len(node.args):  # a constant, or an activation twice
            return False
        is_sum = node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs
        is_relu = node.op == "call_function" and node.target in RELUS and len(node.args) == 1
        return isinstance(layer, (FoldedConv, *POINTWISE)) or is_sum or is_relu

    def _reach(self, node: fx.Node) -> tuple[Reach, Reach]:
        """How far a local node looks at its first input, in rows and columns."""
        layer = self._layer(node)
        if isinstance(layer, FoldedConv):
            padding, stride, dilation = layer.geometry
            spans = [(layer.weight.shape[i + 2] - 1) * dilation[i] + 1 for i in (0, 1)]
            return Reach(spans[0], stride[0], padding[0]), Reach(spans[1], stride[1], padding[1])
        if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
            sizes, steps = ((v, v) if isinstance(v, int) else v for v in (layer.kernel_size, layer.stride))
            return Reach(sizes[0], steps[0], 0), Reach(sizes[1], steps[1], 0)
        return Reach(1, 1, 0), Reach(1, 1, 0)


def at_least(x: Tensor, n: int) -> Tensor:
    """x with its first row repeated at the end until there are n."""
    missing = n - len(x)
    return torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])]) if missing > 0 else x


def filled_up(x: Tensor, multiple: int) -> Tensor:
    """x with its first row repeated at the end, up to a multiple of so many rows."""
    return at_least(x, len(x) + -len(x) % multiple)
