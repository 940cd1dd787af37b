"""How much rounding may change a network's logits and gradients: the bound of tests that compare two kernels.

A kernel that conforms to the standard returns fl(x) = x (1 + d) of each number that it reads or writes, |d| <= u. About
d nothing more is known on an unknown machine. So d is drawn at random, in float64, wherever a tensor enters or leaves a
layer, in the forward and in the backward pass, and for every weight. The largest change over a few draws is what any
processor may show, relus that switch included; the factor MARGIN allows for the small number of draws.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DRAWS, MARGIN = 4, 2
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)

BF16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
HALF = torch.bfloat16 if BF16 else torch.float32
needs_bf16 = pytest.mark.skipif(not BF16, reason="oneDNN has no bfloat16 on this CPU, so training folds no model")


class RelativeErrors(NamedTuple):
    """|a - b| / |b| of two networks on the same images, over all logits and over all gradients."""

    logits: float
    gradients: float

    def within(self, bound: RelativeErrors) -> bool:
        return self.logits <= bound.logits and self.gradients <= bound.gradients


def gradient(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the cross-entropy with respect to the images, in the shape of x."""
    return _logits_and_gradient(network, x, y)[1]


def relative_errors(
    network: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> RelativeErrors:
    pairs = zip(_logits_and_gradient(network, x, y), _logits_and_gradient(reference, x, y), strict=True)
    return RelativeErrors(*(_relative_error(a, b) for a, b in pairs))


def error_bound(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, repeats: int = 1) -> RelativeErrors:
    """The largest errors of a form of the model that holds its numbers in `dtype` and sums in float32.

    repeats: more where a single relu that switches is much of the gradient, as in a network of a few channels.
    """
    exact, errors = deepcopy(model).double().eval(), []
    x = x.double()
    expected = _logits_and_gradient(exact, x, y)
    for seed in range(DRAWS):
        rounded, rng = deepcopy(exact), torch.Generator().manual_seed(seed)
        for layer in rounded.modules():
            if isinstance(layer, LAYERS):
                _add_rounding(layer, _unit(layer, dtype), rng)
        results = _logits_and_gradient(rounded, x.repeat(repeats, 1, 1, 1), y.repeat(repeats))
        copies = zip(*(part.split(len(x)) for part in results), strict=True)
        errors += [[_relative_error(*pair) for pair in zip(copy, expected, strict=True)] for copy in copies]
    return RelativeErrors(*(MARGIN * max(column) for column in zip(*errors, strict=True)))


def _logits_and_gradient(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    logits = network(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)[0]


def _relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _unit(layer: nn.Module, dtype: torch.dtype) -> float:
    """u = 2^-8 of a number in bfloat16, 2^-24 in float32; and K 2^-24 for a sum of K products, in whatever order.

    The latter is the worst case; the usual one, sqrt(K) 2^-24, might miss the relu that switches on one machine.
    """
    weight = layer.weight
    terms = 1 if weight is None or weight.ndim == 1 else max(weight[0].numel(), weight[:, 0].numel())
    return (torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps) / 2


def _add_rounding(layer: nn.Module, unit: float, rng: torch.Generator) -> None:
    def rounded(x: Tensor) -> Tensor:
        return _Rounded.apply(x, unit, rng)

    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(rounded(parameter))
    layer.register_forward_pre_hook(lambda layer, x: rounded(*x))
    layer.register_forward_hook(lambda layer, x, y: rounded(y))


class _Rounded(torch.autograd.Function):
    """x (1 + d), and the same for its gradient."""

    @staticmethod
    def forward(ctx, x, unit, rng):
        ctx.unit, ctx.rng = unit, rng
        return x * _factors(x, unit, rng)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * _factors(gradient, ctx.unit, ctx.rng), None, None


def _factors(x: Tensor, unit: float, rng: torch.Generator) -> Tensor:
    return 1 + unit * (2 * torch.rand(x.shape, generator=rng, dtype=x.dtype) - 1)
