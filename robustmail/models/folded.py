"""The fast form of a network for attacks: frozen, BatchNorm folded into the convolutions, channels-last; in bfloat16
while training, in float32 where an evaluation searches.

An attack passes a batch through the network twenty times between two updates of the weights, needs the gradient of
the image and none other, and wants eval mode. So the weights can be folded, cast and brought into the order that the
processor likes once a step, and each convolution can add its residual and take its relu while its output is still in
the cache. On a CPU the passes are oneDNN's fused operators with a backward pass written out below: as a convolution,
where the stride is one. Elsewhere they are torch's own, on a GPU recorded as CUDA graphs.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from robustmail.errors import ModelError, in_brief
from robustmail.models.classifier import Classifier, example_logits
from robustmail.models.cuda_graphs import CudaGraph
from robustmail.step import module_mode

__all__ = ["Autocast", "FoldedModel"]

ADDS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, torch.relu, torch.relu_)
NOTHINGS = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
onednn: Any = torch.ops.mkldnn
# How far the twin's logits, and gradients, may be from the model's, as a share of the largest, before it is refused.
CLOSE = {torch.bfloat16: 0.1, torch.float32: 1e-4}


class Autocast(nn.Module):
    """The live model in bfloat16 autocast: what the loss calls, and attacks where there is no twin."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes] float32"""
        with torch.autocast(x.device.type, torch.bfloat16):
            return cast(Tensor, self.model(x)).float()


class FoldedModel(nn.Module):
    """A model's frozen likeness in eval mode, in bfloat16 or float32; float32 logits, gradients of the image alone.

    It holds weights of its own, made from the model's by `refresh`; its parameters and modes are the model's.
    Raises ModelError for a network that cannot be folded, with the reason.
    """

    def __init__(self, model: Classifier, sample: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.recorded: CudaGraph | None = None
        try:
            with module_mode(model, "eval"):
                self.graph = _folded(model.net, dtype)
                self.refresh()
                self._compare(sample)
        except ModelError:
            raise
        except Exception as error:  # a network may resist tracing in any way
            raise ModelError(type(model.net).__name__, f"cannot be folded ({in_brief(error)})") from error

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes] float32"""
        return self.recorded(x) if self.recorded is not None and self.recorded.takes(x) else self._pass(x)

    def record(self, sample: Tensor) -> None:
        """Record the passes of batches like this one as CUDA graphs; raises ModelError where that fails."""
        with module_mode(self.model, "eval"):
            self.recorded = CudaGraph(self._pass, sample)
        self.addresses = self._addresses()

    def refresh(self) -> None:
        """Follow the live weights and statistics."""
        if self.recorded is not None and self._addresses() != self.addresses:  # it would go on with the old ones
            self.recorded = None
        with module_mode(
            self.model, "eval"
        ):  # a spectral norm is estimated anew whenever its weight is read in train mode
            for module in self.graph.modules():
                if isinstance(module, FoldedConv):
                    module.refresh()

    def _pass(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.graph(self.model.prepare(x))).float()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def _compare(self, sample: Tensor) -> None:
        # Also so that a gradient that cannot be had is met here, not in the first step.
        (mine, slope), (its, its_slope) = example_logits(self, sample), example_logits(self.model, sample)
        close, who = CLOSE[self.dtype], type(self.model.net).__name__
        if not (mine - its).abs().max() <= close * its.abs().max():
            raise ModelError(who, "gives other logits when folded")
        # A hook that bends gradients is not in the graph; bfloat16 is too coarse to tell.
        if self.dtype == torch.float32 and not (slope - its_slope).norm() <= 100 * close * its_slope.norm():
            raise ModelError(who, "gives other gradients when folded")


class FoldedConv(nn.Module):
    """relu(bn(conv(x)) + other), where bn, other and relu may be missing, with weights of `dtype`."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> None:
        super().__init__()
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise ModelError(f"a convolution with padding {conv.padding!r}", "cannot be folded")
        self.source = (conv, bn)  # a tuple hides them: their parameters stay the model's
        self.geometry = [list(cast("tuple[int, int]", v)) for v in (conv.padding, conv.stride, conv.dilation)]
        self.groups = conv.groups
        self.relu = False
        self.weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=torch.channels_last)
        self.bias: Tensor | None = None
        self.packed: dict[str, tuple[torch.Size, Tensor]] = {}

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.device.type == "cpu":
            return cast(Tensor, _Fused.apply(x, other, self))  # type: ignore[no-untyped-call]
        return self.plain(x, other)

    def plain(self, x: Tensor, other: Tensor | None) -> Tensor:
        """The same in torch's own operators."""
        padding, stride, dilation = self.geometry
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, self.groups)
        y = y if other is None else y + other
        return y.relu() if self.relu else y

    @torch.no_grad()
    def refresh(self) -> None:
        """scale = gamma / sqrt(var + eps); weight * scale, beta + (bias - mean) * scale."""
        conv, bn = self.source
        weight, bias = conv.weight, conv.bias
        if bn is not None:
            assert bn.running_mean is not None
            assert bn.running_var is not None
            scale = (bn.running_var + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight)
            shift = -bn.running_mean if bias is None else bias - bn.running_mean
            bias = shift * scale + (0 if bn.bias is None else bn.bias)  # type: ignore[assignment]
            weight = weight * scale[:, None, None, None]  # type: ignore[assignment]
        self.weight.copy_(weight)  # in place: a CUDA graph remembers the address
        if bias is not None:
            self.bias = bias.detach().to(self.weight.dtype, copy=True) if self.bias is None else self.bias.copy_(bias)
        self.packed.clear()

    def fused(self, x: Tensor, other: Tensor | None) -> Tensor:
        """The forward pass in one operator of oneDNN."""
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self._pack("forward", x)
        rest = (weight, self.bias, *self.geometry, self.groups)
        after = "relu" if self.relu else None
        if other is None:
            return cast(Tensor, onednn._convolution_pointwise(x, *rest, after or "none", [], ""))
        other = other.to(x.dtype)
        return cast(Tensor, onednn._convolution_pointwise.binary(x, other, *rest, "add", None, after, [], ""))

    def pull_back(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of x, of `shape`, from that of the convolution's output."""
        padding, stride, dilation = self.geometry
        if self.groups > 1 or dilation != [1, 1]:
            x = gradient.new_empty(shape).contiguous(memory_format=torch.channels_last)
            only_x = [True, False, False]
            settings = (None, stride, padding, dilation, False, [0, 0], self.groups, only_x)
            return cast(Tensor, torch.ops.aten.convolution_backward(gradient, x, self.weight, *settings)[0])
        kernel = self.weight.shape[2:]
        turned = [kernel[i] - 1 - padding[i] for i in (0, 1)]
        if stride == [1, 1] and min(turned) >= 0:  # the transpose of a convolution: one with the kernel turned around
            weight = self._pack("backward", gradient, turned)
            settings = (None, turned, [1, 1], [1, 1], 1, "none", [], "")  # type: ignore[assignment]
            return cast(Tensor, onednn._convolution_pointwise(gradient, weight, *settings))
        # What the kernel did not reach, on the lower and right edge.
        rest = [shape[i + 2] - (gradient.shape[i + 2] - 1) * stride[i] + 2 * padding[i] - kernel[i] for i in (0, 1)]
        weight = self._pack("strided", gradient, rest)
        settings = (None, padding, rest, stride, dilation, 1, "none", [], "")  # type: ignore[assignment]
        return cast(Tensor, onednn._convolution_transpose_pointwise(gradient, weight, *settings))

    def _pack(self, way: str, x: Tensor, extra: list[int] | None = None) -> Tensor:
        """The weight in oneDNN's order for inputs like x; the last one is kept, until `refresh`."""
        if way in self.packed and self.packed[way][0] == x.shape:
            return self.packed[way][1]
        weight, (padding, stride, dilation) = self.weight, self.geometry
        if way == "strided":
            settings = (padding, extra, stride, dilation, 1, [*x.shape])
            packed = onednn._reorder_convolution_transpose_weight(weight, *settings)
        else:
            if way == "backward":
                weight = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            around = padding if extra is None else extra
            packed = onednn._reorder_convolution_weight(weight, around, stride, dilation, self.groups, [*x.shape])
        self.packed[way] = (x.shape, packed)
        return cast(Tensor, packed)


class _Fused(torch.autograd.Function):
    """A FoldedConv on a CPU, with the gradients of x and other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, conv: FoldedConv) -> Tensor:
        y = conv.fused(x, other)
        ctx.conv, ctx.shape, ctx.adds = conv, x.shape, other is not None
        ctx.save_for_backward(y if conv.relu else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (y,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        x = ctx.conv.pull_back(gradient, ctx.shape) if ctx.needs_input_grad[0] else None
        return x, gradient if ctx.adds else None, None


def _folded(net: nn.Module, dtype: torch.dtype) -> fx.GraphModule:
    """The network as a graph in which each convolution has taken in what comes after it.

    Everything else stays as it is, a BatchNorm in front of a relu, too; linear layers are left in float32.
    """
    graph_module = fx.symbolic_trace(net)
    graph, modules = graph_module.graph, dict(graph_module.named_modules())

    def module(node: Any) -> nn.Module | None:
        return modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None

    def swap(old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        graph.erase_node(old)

    for node in list(graph.nodes):
        if isinstance(module(node), NOTHINGS):
            swap(node, node.args[0])
    for node in list(graph.nodes):
        if isinstance(conv := module(node), nn.Conv2d):
            after = next(iter(node.users)) if len(node.users) == 1 else None
            bn = module(after)
            bn = bn if type(bn) is nn.BatchNorm2d and bn.track_running_stats else None
            name = f"{node.target}_folded".replace(".", "_")
            if name in modules:
                raise ModelError(str(node.target), "is used twice, so it cannot be folded")
            modules[name] = FoldedConv(conv, bn, dtype)
            graph_module.add_submodule(name, modules[name])
            node.target = name
            if bn is not None:
                swap(cast(fx.Node, after), node)
        elif isinstance(conv, nn.Linear):
            with graph.inserting_before(node):
                node.args = (graph.call_method("float", (node.args[0],)),)
    for node in list(graph.nodes):
        if node.target in ADDS and len(node.args) == 2 and not node.kwargs:
            for mine, other in (node.args, node.args[::-1]):
                free = isinstance(module(mine), FoldedConv) and len(mine.users) == 1 and len(mine.args) == 1
                if free and isinstance(other, fx.Node):
                    with graph.inserting_before(node):
                        swap(node, graph.call_module(mine.target, (mine.args[0], other)))
                    graph.erase_node(mine)
                    break
    for node in list(graph.nodes):
        if node.target in RELUS or node.target in ("relu", "relu_") or isinstance(module(node), nn.ReLU):
            before = node.args[0]
            if isinstance(folded := module(before), FoldedConv) and len(before.users) == 1:
                folded.relu = True
                swap(node, before)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    _check(graph_module, type(net).__name__)
    return graph_module


def _check(graph: fx.GraphModule, who: str) -> None:
    """Refuse what is not made of convolutions, BatchNorm and linear layers: its parts would have to be cast, too."""
    parts = list(graph.modules())
    if not any(isinstance(part, FoldedConv) for part in parts):
        raise ModelError(who, "has no convolutions to fold")
    for part in parts:
        strange = not isinstance(part, (nn.BatchNorm2d, nn.Linear)) and any(
            True for _ in part.parameters(recurse=False)
        )
        if strange:
            foreign = type(part) is not nn.Module and not isinstance(part, fx.GraphModule)
            what = f"a {type(part).__name__}" if foreign else "parameters of its own"
            raise ModelError(who, f"has {what}, so it cannot be folded")
