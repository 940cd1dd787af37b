"""The logits of images that differ from known ones in a window only, without computing what the window cannot reach.

A convolution carries a change no further than its kernel reaches. So the activations of the known images are kept, and
of each layer only the region is computed in which the change can be seen, as long as that is a small part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from robustmail.models.folded import ADDITIONS, RELUS, FoldedConv, FoldedModel

__all__ = ["KnownImages", "Window", "at_least"]

POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.BatchNorm2d)  # in eval mode
MOST = 0.5  # share of a layer's pixels above which the layer is computed as a whole


class Window(NamedTuple):
    """A rectangle of pixels of an image or an activation."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The window of x, [B, H, W, C]."""
        return x[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def of_images(self, x: Tensor) -> Tensor:
        """The window of x, [B, C, H, W]."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def moved(self, down: int, right: int) -> Window:
        """The same rectangle at another place."""
        return Window(self.top + down, self.left + right, self.height, self.width)

    def union(self, other: Window) -> Window:
        """The smallest window that holds both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        bottom = max(self.top + self.height, other.top + other.height)
        right = max(self.left + self.width, other.left + other.width)
        return Window(top, left, bottom - top, right - left)


class Patch(NamedTuple):
    """New values of an activation in a window: [B, height, width, C]."""

    window: Window
    values: Tensor


class Reach(NamedTuple):
    """How far a layer looks in one dimension: output i sees `span` inputs, from i stride - padding on."""

    span: int
    stride: int
    padding: int

    def outputs(self, start: int, length: int, size: int) -> tuple[int, int]:
        """(start, length) of the outputs, of `size` in all, that see any of these inputs; the length does not depend on
        `start`, so that few shapes of convolutions occur."""
        long = min((length + self.span - 2) // self.stride + 1, size)
        first = -((self.span - 1 - self.padding - start) // self.stride)
        return min(max(first, 0), size - long), long

    def inputs(self, start: int, length: int) -> tuple[int, int]:
        """(start, length) of the inputs that these outputs see; start may be negative, in the padding."""
        return start * self.stride - self.padding, (length - 1) * self.stride + self.span


class KnownImages:
    """Images whose activations are known, and the logits of images that differ from them in a window.

    model: the folded network.
    x: the images, [M, C, H, W].
    side: most pixels of a window's side.
    least: rows that every pass has at least, so that an image's bits do not depend on the others.
    context: made anew around every pass.
    """

    def __init__(
        self,
        model: FoldedModel,
        x: Tensor,
        side: int,
        least: int = 1,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.least, self.context = model, least, context
        self.known: dict[fx.Node, Tensor] = {}  # [M, H + 2 border, W + 2 border, C], zeros in the border
        self.border: dict[fx.Node, int] = {}
        self.reach: dict[fx.Node, tuple[Reach, Reach]] = {}  # of a node's first input, in rows and columns
        self.patches: dict[fx.Node, Patch] = {}  # of the last call
        self.rows: Tensor | None = None  # of the last call; None: all
        with torch.no_grad(), context():
            self._learn(at_least(x, least), side)
        self.known = {node: activation[: len(x)] for node, activation in self.known.items()}
        self.rest, self.inputs = self._rest()

    @property
    def is_faster(self) -> bool:
        """Whether there are layers that need not be computed as a whole."""
        return any(node.op == "call_module" for node in self.known)

    def __call__(self, window: Window, values: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [K, classes] of the images `rows` [K], by default all, with `values` [K, C, height, width] in the
        window."""
        n = len(values)
        is_few = n < self.least
        self.rows = at_least(torch.arange(n) if rows is None else rows, self.least) if is_few else rows
        with torch.no_grad(), self.context():
            x = self.model.model.prepare(at_least(values, self.least))
            self.patches = {}
            for node in self.known:
                is_image = node.op == "placeholder"
                self.patches[node] = Patch(window, x.permute(0, 2, 3, 1)) if is_image else self._patch(node)
            logits: Tensor = self.rest(*map(self._whole, self.inputs))
            return logits[:n].float()

    def accept(self, which: Tensor) -> None:
        """Let the images of the last call at the positions `which` take the place of the known ones."""
        rows = which if self.rows is None else self.rows[which]
        for node, (window, values) in self.patches.items():
            border = self.border[node]
            window.moved(border, border).of(self.known[node])[rows] = values[which]

    def keep(self, which: Tensor) -> None:
        """Forget all images but those at the positions `which`, or where it is true."""
        self.known = {node: activation[which] for node, activation in self.known.items()}

    def _learn(self, x: Tensor, side: int) -> None:
        """Compute all activations, and keep those that a window cannot change but for a small part."""
        interpreter = fx.Interpreter(self.model.graph, garbage_collect_values=False)
        interpreter.run(self.model.model.prepare(x))
        windows: dict[fx.Node, Window] = {}
        for node in self.model.graph.graph.nodes:
            whole = interpreter.env[node]
            if node.op == "placeholder":
                window = Window(0, 0, side, side)
            elif self._is_local(node) and all(source in windows for source in node.all_input_nodes):
                self.reach[node] = self._reach(node)
                window = self._outputs(node, [windows[source] for source in node.all_input_nodes], whole.shape[2:])
            else:
                continue
            if window.height * window.width <= MOST * whole.shape[2] * whole.shape[3]:
                windows[node] = window
        for node in windows:
            reaches = [reach for user in node.users if user in windows for reach in self.reach[user]]
            border = max((reach.padding for reach in reaches), default=0)
            self.border[node] = border
            activation = interpreter.env[node].permute(0, 2, 3, 1)
            self.known[node] = nn.functional.pad(activation, (0, 0, border, border, border, border)).contiguous()

    def _rest(self) -> tuple[fx.GraphModule, list[fx.Node]]:
        """(the layers that are computed as a whole, the activations that they need)."""
        rest, inputs = fx.Graph(), [node for node in self.known if any(user not in self.known for user in node.users)]
        copies = {node: rest.placeholder(node.name) for node in inputs}
        for node in self.model.graph.graph.nodes:
            if node not in self.known:
                copies[node] = rest.node_copy(node, copies.__getitem__)
        return fx.GraphModule(self.model.graph, rest), inputs

    def _outputs(self, node: fx.Node, windows: list[Window], size: Sequence[int]) -> Window:
        """Where the node's output, of `size`, can change if its inputs change in their windows."""
        first, *others = windows
        rows, columns = self.reach[node]
        top, height = rows.outputs(first.top, first.height, size[0])
        left, width = columns.outputs(first.left, first.width, size[1])
        return functools.reduce(Window.union, others, Window(top, left, height, width))

    def _patch(self, node: fx.Node) -> Patch:
        """The node's new values, from the patches of its inputs."""
        first, *others = node.all_input_nodes
        windows = [self.patches[source].window for source in node.all_input_nodes]
        window = self._outputs(node, windows, self._size(node))
        rows, columns = self.reach[node]
        top, height = rows.inputs(window.top, window.height)
        left, width = columns.inputs(window.left, window.width)
        x = self._crop(first, Window(top, left, height, width)).permute(0, 3, 1, 2)
        summands = [self._crop(other, window).permute(0, 3, 1, 2) for other in others]
        layer = self._layer(node)
        if isinstance(layer, FoldedConv):
            y = layer.forward_valid(x, summands[0] if summands else None)
        elif layer is not None:
            y = layer(x)
        else:
            y = cast("Callable[..., Tensor]", node.target)(x, *summands)
        return Patch(window, y.permute(0, 2, 3, 1))

    def _crop(self, node: fx.Node, window: Window) -> Tensor:
        """The new activation in a window, which may reach into the border: [B, height, width, C]."""
        border = self.border[node]
        known = window.moved(border, border).of(self.known[node])
        crop = known.clone(memory_format=torch.contiguous_format) if self.rows is None else known[self.rows]
        changed, values = self.patches[node]
        top, left = max(changed.top, window.top), max(changed.left, window.left)
        height = min(changed.top + changed.height, window.top + window.height) - top
        width = min(changed.left + changed.width, window.left + window.width) - left
        if height > 0 and width > 0:
            both = Window(top, left, height, width)
            both.moved(-window.top, -window.left).of(crop).copy_(both.moved(-changed.top, -changed.left).of(values))
        return crop

    def _whole(self, node: fx.Node) -> Tensor:
        return self._crop(node, Window(0, 0, *self._size(node))).permute(0, 3, 1, 2)

    def _size(self, node: fx.Node) -> tuple[int, int]:
        """(height, width) of the node's output."""
        _, height, width, _ = self.known[node].shape
        return height - 2 * self.border[node], width - 2 * self.border[node]

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.model.graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_local(self, node: fx.Node) -> bool:
        """Whether an output pixel of the node depends on the input pixels near it only."""
        layer = self._layer(node)
        if isinstance(layer, nn.MaxPool2d):
            return layer.padding in (0, (0, 0)) and layer.dilation in (1, (1, 1)) and not layer.ceil_mode
        if isinstance(layer, nn.AvgPool2d):
            return layer.padding in (0, (0, 0)) and not layer.ceil_mode
        is_sum = node.target in ADDITIONS and len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs
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
            sizes, steps = (v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride))
            return Reach(sizes[0], steps[0], 0), Reach(sizes[1], steps[1], 0)
        return Reach(1, 1, 0), Reach(1, 1, 0)


def at_least(x: Tensor, n: int) -> Tensor:
    """x with its first row repeated at the end until there are n."""
    missing = n - len(x)
    return torch.cat([x, x[:1].detach().expand(missing, *x.shape[1:])]) if missing > 0 else x
