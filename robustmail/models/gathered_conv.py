"""A convolution as one matrix product, for layers of few pixels and many channels on a CPU with AMX.

There oneDNN's convolution of 512 channels at 4 x 4 pixels does 509 to 869 GFLOP/s (bfloat16, batch 128, two threads),
and 640 with stride 2; the neighbourhoods of all pixels, gathered and multiplied at once, do 1,462 and 1,526. At 8 x 8
pixels the copies cost more than they save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["gather_pays", "gathered_conv", "gathered_input_gradient", "gathering", "has_amx"]

MAX_PIXELS, MIN_CHANNELS = 4 * 4, 256  # of the output, and of the input, at which gathering pays


def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in tiles."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def gather_pays(shape: torch.Size, weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether a convolution of images of `shape` is faster as a matrix product.

    The rule reads the shapes and the kind of CPU and measures no time, so that equal recipes stay equal runs.
    shape: [B, in, H, W], of images that are multiplied in bfloat16.
    weight: [out, in, k, l]; a kernel of one pixel has no neighbourhoods and stays a convolution.
    stride, padding: of rows and columns; without groups and dilation.
    """
    out, channels, *kernel = weight.shape
    if min(out, channels) < MIN_CHANNELS or channels != shape[1] or kernel == [1, 1]:
        return False
    rows, columns = _output_size(shape, kernel, stride, padding)
    return 0 < rows * columns <= MAX_PIXELS and weight.device.type == "cpu" and has_amx()


def gathered_conv(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """The convolution of x [B, in, H, W] with weight [out, in, k, l], without bias: [B, out, h, w], channels last.

    Any number of derivatives of x and weight can be taken.
    """
    return cast(Tensor, _GatheredConv.apply(x, weight, stride, padding))  # type: ignore[no-untyped-call]


def gathered_input_gradient(
    gradient: Tensor, weight: Tensor, shape: torch.Size, stride: list[int], padding: list[int]
) -> Tensor:
    """The gradient of x [B, in, H, W], of `shape`, from the gradient of the output [B, out, h, w].

    With stride 1 it is the convolution with the flipped kernel; otherwise each neighbourhood's gradient is added, in
    float32 at least, where the neighbourhood lies.
    """
    _, _, *kernel = weight.shape
    turned = [kernel[i] - 1 - padding[i] for i in (0, 1)]
    if stride == [1, 1] and min(turned) >= 0:
        return gathered_conv(gradient, weight.flip(2, 3).transpose(0, 1), [1, 1], turned)
    columns = _rows(gradient) @ _matrix(weight).t()
    parts = columns.view(len(gradient), *gradient.shape[2:], -1).split(weight.shape[1], 3)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    batch, channels, height, width = shape
    padded = gradient.new_zeros(batch, height + 2 * padding[0], width + 2 * padding[1], channels, dtype=wide)
    for place, part in zip(_places(padded, kernel, stride, gradient.shape[2:]), parts, strict=True):
        place += part
    inner = padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    return inner.to(gradient.dtype).permute(0, 3, 1, 2)


def gathering(device: torch.device) -> AbstractContextManager[object]:
    """`GatherConvolutions` where it can pay: elsewhere each call of torch would be looked at for nothing."""
    return GatherConvolutions() if device.type == "cpu" and has_amx() else nullcontext()


class GatherConvolutions(TorchFunctionMode):
    """Inside it, and inside autocast to bfloat16, the convolutions for which `gather_pays` are `gathered_conv`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.conv2d and not kwargs and len(args) == 7:  # as nn.Conv2d calls it
            x, weight, bias, stride, padding, dilation, groups = args
            plain = groups == 1 and tuple(dilation) == (1, 1) and not isinstance(padding, str) and x.dim() == 4
            autocast = plain and torch.is_autocast_enabled(x.device.type)
            if autocast and gather_pays(x.shape, weight, [*stride], [*padding]):
                x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
                y = gathered_conv(x, weight, [*stride], [*padding])
                return y if bias is None else y + bias.to(torch.bfloat16)[:, None, None]
        return function(*args, **(kwargs or {}))


class _GatheredConv(torch.autograd.Function):
    """Keeps x for the backward pass, not its neighbourhoods, which are nine times as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        rows, columns = _output_size(x.shape, [*weight.shape[2:]], stride, padding)
        product = _neighbourhoods(x, [*weight.shape[2:]], stride, padding) @ _matrix(weight)
        return product.view(len(x), rows, columns, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = gathered_input_gradient(gradient, weight, x.shape, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            out, channels, *kernel = weight.shape
            gathered = _neighbourhoods(x, kernel, ctx.stride, ctx.padding)
            grad_weight = (_rows(gradient).t() @ gathered).view(out, *kernel, channels).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None


def _neighbourhoods(x: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """[B, in, H, W] -> [B h w, k l in]: what the kernel sees at each pixel of the output."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    places = _places(padded, kernel, stride, _output_size(x.shape, kernel, stride, padding))
    return torch.cat([*places], 3).flatten(0, 2)


def _places(padded: Tensor, kernel: list[int], stride: list[int], size: Any) -> Iterator[Tensor]:
    """For each place of the kernel, row by row, the pixels [B, h, w, in] of `padded` that it meets."""
    ends = [stride[i] * (size[i] - 1) + 1 for i in (0, 1)]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            yield padded[:, i : i + ends[0] : stride[0], j : j + ends[1] : stride[1]]


def _output_size(shape: torch.Size, kernel: list[int], stride: list[int], padding: list[int]) -> tuple[int, int]:
    rows, columns = ((shape[i + 2] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
    return rows, columns


def _matrix(weight: Tensor) -> Tensor:
    """[out, in, k, l] -> [k l in, out]; a view where the weight is channels last."""
    return weight.permute(0, 2, 3, 1).flatten(1).t()


def _rows(gradient: Tensor) -> Tensor:
    """[B, out, h, w] -> [B h w, out]; a view where the gradient is channels last."""
    return gradient.permute(0, 2, 3, 1).flatten(0, 2)
