"""A faster form of a network for attacks: eval mode, fixed weights, BatchNorm folded into the convolutions; in bfloat16
for training, in float32 for the search of an evaluation.

Between two updates of the weights an attack passes a batch through the network about twenty times, in eval mode, and
needs the gradient of the images only. So once per step the weights are folded, cast and packed in the processor's
layout, and each convolution adds its residual and applies its relu while its output is still in the cache. On a CPU
the passes are oneDNN's fused operators, with a backward pass written out below: a convolution, where the stride is one.
Layers of few pixels and many channels are matrix products on a CPU with AMX, see `gathered_conv`. Elsewhere the passes
are torch's own operators, on a GPU captured as CUDA graphs.
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
from robustmail.models.gathered_conv import gather_pays, gathered_conv, gathered_input_gradient, gathering
from robustmail.step import module_mode

__all__ = ["CLOSE", "Autocast", "FoldedConv", "FoldedLinear", "FoldedModel"]

ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
onednn: Any = torch.ops.mkldnn
# Largest accepted error of the folded model's logits, as a share of the model's largest logit.
CLOSE = {torch.bfloat16: 0.1, torch.float32: 1e-4}


class Autocast(nn.Module):
    """The live model in bfloat16 autocast: for the loss, and for attacks where the model cannot be folded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes] float32"""
        with torch.autocast(x.device.type, torch.bfloat16), gathering(x.device):
            return cast(Tensor, self.model(x)).float()


class FoldedModel(nn.Module):
    """A copy of a model in eval mode, with BatchNorm folded into its convolutions: float32 logits, gradients of x only.

    `refresh` computes its folded weights from the model's; `parameters()` and modes are the model's own.
    model: the live model. sample: two or more images [B, C, H, W], on which both must agree. dtype: of the
    convolutions, bfloat16 or float32. Raises ModelError, with the reason, for a network that cannot be folded.
    """

    def __init__(self, model: Classifier, sample: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.cuda_graph: CudaGraph | None = None
        if model.memory_format != torch.channels_last:
            raise ModelError(type(model.net).__name__, "needs plain strides, a folded model is channels-last")
        try:
            with module_mode(model, "eval"):
                self.graph = _fold(model.net, dtype)
                self.refresh()
                self._compare(sample)
        except ModelError:
            raise
        except Exception as error:  # a network may resist tracing in any way
            raise ModelError(type(model.net).__name__, f"folding failed ({in_brief(error)})") from error

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, classes] float32"""
        if self.cuda_graph is not None and self.cuda_graph.accepts(x):
            return self.cuda_graph(x)
        return self._eager(x)

    def capture(self, sample: Tensor) -> None:
        """Capture the passes of batches in the shape of `sample` as CUDA graphs. Raises ModelError if that fails."""
        with module_mode(self.model, "eval"):
            self.cuda_graph = CudaGraph(self._eager, sample)
        self.addresses = self._addresses()

    def refresh(self) -> None:
        """Compute the folded weights from the live weights and BatchNorm statistics."""
        if self.cuda_graph is not None and self._addresses() != self.addresses:  # it would read the old tensors
            self.cuda_graph = None
        # In eval mode: reading a weight with spectral norm in train mode would update the estimate of its norm.
        with module_mode(self.model, "eval"):
            for module in self.graph.modules():
                if isinstance(module, FoldedConv):
                    module.refresh()

    def _eager(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.graph(self.model.prepare(x))).float()

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]

    def _compare(self, sample: Tensor) -> None:
        # A gradient that cannot be computed also fails here, instead of in the first step.
        logits, gradient = example_logits(self, sample)
        expected, expected_gradient = example_logits(self.model, sample)
        close, who = CLOSE[self.dtype], type(self.model.net).__name__
        if not (logits - expected).abs().max() <= close * expected.abs().max():
            raise ModelError(who, "other logits when folded")
        # A hook that changes gradients is not in the graph; bfloat16 is too coarse to notice it.
        error = (gradient - expected_gradient).norm()
        if self.dtype == torch.float32 and not error <= 100 * close * expected_gradient.norm():
            raise ModelError(who, "other gradients when folded")


class FoldedConv(nn.Module):
    """relu(bn(conv(x)) + residual), each of bn, residual and relu optional, with weights of `dtype`; a linear layer is
    a convolution of 1 x 1."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.source = (layer, bn)  # in a tuple, so that they are not registered as submodules
        if isinstance(layer, nn.Linear):
            self.geometry, self.groups = [[0, 0], [1, 1], [1, 1]], 1
        else:
            if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
                raise ModelError(f"convolution with padding {layer.padding!r}", "not foldable")
            self.geometry = [list(cast("tuple[int, int]", v)) for v in (layer.padding, layer.stride, layer.dilation)]
            self.groups = layer.groups
        self.relu = False
        kernel = _as_kernel(layer.weight)
        self.weight = torch.empty_like(kernel, dtype=dtype, memory_format=torch.channels_last)
        self.bias: Tensor | None = None
        self.packed: dict[str, tuple[torch.Size, Tensor]] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[B, in, H, W], and a residual in the shape of the output or None -> [B, out, h, w]"""
        x = x.to(self.weight.dtype)
        if x.device.type == "cpu":
            return cast(Tensor, _CPUConv.apply(x, residual, self))  # type: ignore[no-untyped-call]
        return self.forward_torch(x, residual)

    def forward_torch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The forward pass in torch's own operators."""
        padding, stride, dilation = self.geometry
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, self.groups)
        y = y if residual is None else y + residual
        return y.relu() if self.relu else y

    @torch.no_grad()
    def refresh(self) -> None:
        """weight <- weight * scale, bias <- beta + (bias - mean) * scale, scale = gamma / sqrt(var + eps)."""
        layer, bn = self.source
        weight, bias = _as_kernel(layer.weight), layer.bias
        if bn is not None:
            assert bn.running_mean is not None
            assert bn.running_var is not None
            scale = (bn.running_var + bn.eps).rsqrt() * (1 if bn.weight is None else bn.weight)
            shift = -bn.running_mean if bias is None else bias - bn.running_mean
            bias = shift * scale + (0 if bn.bias is None else bn.bias)  # type: ignore[assignment]
            weight = weight * scale[:, None, None, None]  # type: ignore[assignment]
        self.weight.copy_(weight)  # in place: a CUDA graph stores the address
        if bias is not None:
            self.bias = bias.detach().to(self.weight.dtype, copy=True) if self.bias is None else self.bias.copy_(bias)
        self.packed.clear()

    def forward_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The forward pass in one operator of oneDNN."""
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self._pack("forward", x)
        settings = (weight, self.bias, *self.geometry, self.groups)
        relu = "relu" if self.relu else None
        if residual is None:
            return cast(Tensor, onednn._convolution_pointwise(x, *settings, relu or "none", [], ""))
        residual = residual.to(x.dtype)
        return cast(Tensor, onednn._convolution_pointwise.binary(x, residual, *settings, "add", None, relu, [], ""))

    def forward_valid(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The forward pass without padding, for a part of an input."""
        _, stride, dilation = self.geometry
        y = F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, stride, 0, dilation, self.groups)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.relu else y

    def gathers(self, shape: torch.Size) -> bool:
        """Whether inputs of this shape are gathered and multiplied instead of convolved."""
        padding, stride, dilation = self.geometry
        plain = self.groups == 1 and dilation == [1, 1] and self.weight.dtype == torch.bfloat16
        return plain and gather_pays(shape, self.weight, stride, padding)

    def forward_gathered(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The forward pass as one matrix product."""
        padding, stride, _ = self.geometry
        y = gathered_conv(x, self.weight, stride, padding)
        y = y if self.bias is None else y.add_(self.bias[:, None, None])
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.relu else y

    def input_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input, of `shape`, from the gradient of the convolution's output."""
        padding, stride, dilation = self.geometry
        if self.groups > 1 or dilation != [1, 1]:
            x = gradient.new_empty(shape).contiguous(memory_format=torch.channels_last)
            only_x = [True, False, False]
            settings = (None, stride, padding, dilation, False, [0, 0], self.groups, only_x)
            return cast(Tensor, torch.ops.aten.convolution_backward(gradient, x, self.weight, *settings)[0])
        kernel = self.weight.shape[2:]
        full = [kernel[i] - 1 - padding[i] for i in (0, 1)]
        if stride == [1, 1] and min(full) >= 0:  # the transpose is a convolution with the flipped kernel
            if self.gathers(shape):
                return gathered_conv(gradient, self._pack("flipped", gradient), stride, full)
            weight = self._pack("backward", gradient, full)
            settings = (None, full, [1, 1], [1, 1], 1, "none", [], "")  # type: ignore[assignment]
            return cast(Tensor, onednn._convolution_pointwise(gradient, weight, *settings))
        if self.gathers(shape):
            return gathered_input_gradient(gradient, self.weight, shape, stride, padding)
        # Rows and columns at the lower and right edge that the kernel did not reach.
        rest = [shape[i + 2] - (gradient.shape[i + 2] - 1) * stride[i] + 2 * padding[i] - kernel[i] for i in (0, 1)]
        weight = self._pack("strided", gradient, rest)
        settings = (None, padding, rest, stride, dilation, 1, "none", [], "")  # type: ignore[assignment]
        return cast(Tensor, onednn._convolution_transpose_pointwise(gradient, weight, *settings))

    def _pack(self, operator: str, x: Tensor, extra: list[int] | None = None) -> Tensor:
        """The weight in oneDNN's layout for inputs like x, cached until another shape comes or `refresh` is called.

        operator: "forward"; "backward", a convolution with padding `extra`; "strided", a transposed convolution with
        output padding `extra`; or "flipped", the weight of "backward" in torch's own layout.
        """
        if operator not in self.packed or self.packed[operator][0] != x.shape:
            self.packed[operator] = (x.shape, self._packed(operator, [*x.shape], extra))
        return self.packed[operator][1]

    def _packed(self, operator: str, shape: list[int], extra: list[int] | None) -> Tensor:
        weight, (padding, stride, dilation) = self.weight, self.geometry
        if operator == "strided":
            settings = (padding, extra, stride, dilation, 1, shape)
            return cast(Tensor, onednn._reorder_convolution_transpose_weight(weight, *settings))
        if operator != "forward":
            weight = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        if operator == "flipped":
            return weight
        padding = padding if extra is None else extra
        return cast(Tensor, onednn._reorder_convolution_weight(weight, padding, stride, dilation, self.groups, shape))


def _as_kernel(weight: Tensor) -> Tensor:
    """The weight of a convolution as it is, that of a linear layer [out, in] as [out, in, 1, 1]."""
    return weight[:, :, None, None] if weight.ndim == 2 else weight


class FoldedLinear(nn.Module):
    """A linear layer as a convolution of 1 x 1, in which the rows of x are the pixels of one image.

    A library for matrix products chooses its order of summation by the number of rows. A convolution does not choose it
    by the number of pixels, so the bits of a row do not depend on how many others there are.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = FoldedConv(linear, None, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        outputs, inputs, *_ = self.conv.weight.shape
        if not x.numel():  # a convolution refuses images of no pixels
            return F.linear(x, self.conv.weight.flatten(1))
        pixels = x.reshape(1, x.numel() // inputs, 1, inputs).permute(0, 3, 1, 2)
        return cast(Tensor, self.conv(pixels)).permute(0, 2, 3, 1).reshape(*x.shape[:-1], outputs)


class _CPUConv(torch.autograd.Function):
    """The passes of a FoldedConv on a CPU, with the gradients of x and residual."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, conv: FoldedConv) -> Tensor:
        y = conv.forward_gathered(x, residual) if conv.gathers(x.shape) else conv.forward_onednn(x, residual)
        ctx.conv, ctx.shape, ctx.has_residual = conv, x.shape, residual is not None
        ctx.save_for_backward(y if conv.relu else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (y,) = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if y is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, y, 0)
        grad_x = ctx.conv.input_gradient(gradient, ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, gradient if ctx.has_residual else None, None


def _fold(net: nn.Module, dtype: torch.dtype) -> fx.GraphModule:
    """Trace the network, and let each convolution do what follows it: BatchNorm, an addition, a relu.

    Everything else stays as it is, also a BatchNorm that follows no convolution; linear layers compute in float32, on a
    CPU as a FoldedLinear where all is in float32.
    """
    traced = fx.symbolic_trace(net)
    _remove_identities(traced)
    _fold_batchnorms(traced, dtype)
    if dtype == torch.float32:
        _fold_linears(traced)
    else:
        _cast_inputs_of_linear(traced)
    _fold_additions(traced)
    _fold_relus(traced)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
    _check_layers(traced, type(net).__name__)
    return traced


def _remove_identities(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if isinstance(_layer(traced, node), IDENTITIES):
            _replace(node, node.args[0])


def _fold_batchnorms(traced: fx.GraphModule, dtype: torch.dtype) -> None:
    """Replace every convolution, with the BatchNorm that follows it, by a FoldedConv."""
    for node in list(traced.graph.nodes):
        conv = _layer(traced, node)
        if not isinstance(conv, nn.Conv2d):
            continue
        user = next(iter(node.users)) if len(node.users) == 1 else None
        bn = _layer(traced, user)
        bn = bn if type(bn) is nn.BatchNorm2d and bn.track_running_stats else None
        name = f"{node.target}_folded".replace(".", "_")
        if hasattr(traced, name):
            raise ModelError(str(node.target), "used twice, so not foldable")
        traced.add_submodule(name, FoldedConv(conv, bn, dtype))
        node.target = name
        if bn is not None:
            _replace(cast(fx.Node, user), node)


def _fold_linears(traced: fx.GraphModule) -> None:
    """Replace every linear layer on a CPU by a FoldedLinear."""
    for node in list(traced.graph.nodes):
        linear = _layer(traced, node)
        if type(linear) is nn.Linear and linear.weight.device.type == "cpu":
            node.target = f"{node.target}_folded"
            traced.add_submodule(node.target, FoldedLinear(linear, torch.float32))


def _cast_inputs_of_linear(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if isinstance(_layer(traced, node), nn.Linear):
            with traced.graph.inserting_before(node):
                node.args = (traced.graph.call_method("float", (node.args[0],)),)


def _fold_additions(traced: fx.GraphModule) -> None:
    """Let a FoldedConv add the other summand, where its output is used for nothing but the sum."""
    for node in list(traced.graph.nodes):
        if node.target not in ADDITIONS or len(node.args) != 2 or node.kwargs:
            continue
        for conv, summand in (node.args, node.args[::-1]):
            is_folded = isinstance(_layer(traced, conv), FoldedConv)
            if is_folded and len(conv.users) == 1 and len(conv.args) == 1 and isinstance(summand, fx.Node):
                with traced.graph.inserting_before(node):
                    _replace(node, traced.graph.call_module(conv.target, (conv.args[0], summand)))
                traced.graph.erase_node(conv)
                break


def _fold_relus(traced: fx.GraphModule) -> None:
    """Let a FoldedConv apply the relu, where its output is used for nothing but the relu."""
    for node in list(traced.graph.nodes):
        is_relu = node.target in RELUS or isinstance(_layer(traced, node), nn.ReLU)
        before = node.args[0] if is_relu else None
        if isinstance(conv := _layer(traced, before), FoldedConv) and len(cast(fx.Node, before).users) == 1:
            conv.relu = True
            _replace(node, cast(fx.Node, before))


def _layer(traced: fx.GraphModule, node: Any) -> nn.Module | None:
    """The layer that a node of the graph calls, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return traced.get_submodule(str(node.target))


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _check_layers(traced: fx.GraphModule, name: str) -> None:
    """Refuse parameters outside convolutions, BatchNorm and linear layers: they would have to be cast too."""
    layers = list(traced.modules())
    if not any(isinstance(layer, FoldedConv) for layer in traced.children()):  # deeper are those of linear layers
        raise ModelError(name, "no convolutions to fold")
    for layer in layers:
        if isinstance(layer, (nn.BatchNorm2d, nn.Linear)) or not list(layer.parameters(recurse=False)):
            continue
        is_container = type(layer) is nn.Module or isinstance(layer, fx.GraphModule)
        part = "parameters of its own" if is_container else f"a {type(layer).__name__}"
        raise ModelError(name, f"not foldable because of {part}")
