"""How far rounding may carry a network's logits and gradients: the bound of a test that compares two kernels.

A kernel that conforms returns fl(x) = x (1 + d) of each number that it reads or writes, |d| <= u, and no more is known
of d on a machine of which nothing is known. So d is drawn at random, in float64, at every place where a tensor enters
or leaves a layer, on the way there and on the way back, and in every weight. What comes of it is what any processor
may show, relus that switch included; MARGIN allows for the draws being few.
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
needs_bf16 = pytest.mark.skipif(not BF16, reason="oneDNN has no bfloat16 on this CPU, so no twin while training")


class Apart(NamedTuple):
    """Two networks on the same images: |a - b| / |b|, of all logits and of all gradients."""

    logits: float
    gradients: float

    def within(self, most: Apart) -> bool:
        return self.logits <= most.logits and self.gradients <= most.gradients


def gradient(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of the cross-entropy, by the images."""
    return _answers(network, x, y)[1]


def apart(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Apart:
    return Apart(*(_share(mine, its) for mine, its in zip(_answers(a, x, y), _answers(b, x, y), strict=True)))


def allowed(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype, repeats: int = 1) -> Apart:
    """How far from the model a form of it may be that holds its numbers in `dtype` and sums in float32.

    repeats: more where a single relu that switches is much of the gradient, as in a network of a few channels.
    """
    exact, found = deepcopy(model).double().eval(), []
    x = x.double()
    right = _answers(exact, x, y)
    for seed in range(DRAWS):
        rough, rng = deepcopy(exact), torch.Generator().manual_seed(seed)
        for layer in rough.modules():
            if isinstance(layer, LAYERS):
                _roughen(layer, _unit(layer, dtype), rng)
        several = _answers(rough, x.repeat(repeats, 1, 1, 1), y.repeat(repeats))
        each = zip(*(part.split(len(x)) for part in several), strict=True)
        found += [[_share(*pair) for pair in zip(answers, right, strict=True)] for answers in each]
    return Apart(*(MARGIN * max(of_each) for of_each in zip(*found, strict=True)))


def _answers(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    logits = network(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)[0]


def _share(mine: Tensor, its: Tensor) -> float:
    return ((mine.double() - its.double()).norm() / its.double().norm()).item()


def _unit(layer: nn.Module, dtype: torch.dtype) -> float:
    """u = 2^-8 of a number in bfloat16, 2^-24 in float32; and K 2^-24 for a sum of K products, in whatever order.

    The latter is the worst case; the usual one, sqrt(K) 2^-24, might leave out the relu that switches on one machine.
    """
    weight = layer.weight
    terms = 1 if weight is None or weight.ndim == 1 else max(weight[0].numel(), weight[:, 0].numel())
    return (torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps) / 2


def _roughen(layer: nn.Module, unit: float, rng: torch.Generator) -> None:
    def rounded(x: Tensor) -> Tensor:
        return _Rounded.apply(x, unit, rng)

    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(rounded(parameter))
    layer.register_forward_pre_hook(lambda layer, x: rounded(*x))
    layer.register_forward_hook(lambda layer, x, y: rounded(y))


class _Rounded(torch.autograd.Function):
    """x (1 + d), and so the gradient."""

    @staticmethod
    def forward(ctx, x, unit, rng):
        ctx.unit, ctx.rng = unit, rng
        return x * _factors(x, unit, rng)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * _factors(gradient, ctx.unit, ctx.rng), None, None


def _factors(x: Tensor, unit: float, rng: torch.Generator) -> Tensor:
    return 1 + unit * (2 * torch.rand(x.shape, generator=rng, dtype=x.dtype) - 1)
