"""Evidence on candidate networks: labelled images, and the statistics that BatchNorm keeps.

docs/reading-checkpoints.md tells why these tests, and what they found on networks of known structure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from robustmail.runtime.devices import wide

__all__ = ["excludes", "batchnorm_misfit", "recalibrated", "predict_differently"]

SAME = 0.01  # share of images on which two readings may answer otherwise and yet count as one
PRIOR = 0.01  # of the class biases: none grows without end
GAP, SIGMAS = 0.01, 3.0  # nats and standard errors by which a rival's cross-entropy must be larger


class Moments:
    """Sum, sum of squares and count of what reaches each BatchNorm, per channel."""

    def __init__(self) -> None:
        self.sums: dict[_BatchNorm, list[Tensor]] = {}

    def see(self, module: _BatchNorm, given: tuple[Tensor, ...]) -> None:
        x = wide(given[0].detach().transpose(0, 1).flatten(1))
        new = [x.sum(1), x.square().sum(1), torch.tensor(float(x.shape[1]), device=x.device)]
        known = self.sums.get(module, [torch.zeros_like(part) for part in new])
        self.sums[module] = [a + b for a, b in zip(known, new, strict=True)]

    @property
    def misfit(self) -> float | None:
        """Nats from the normal distribution of a channel to the one that its BatchNorm expects: the median of a
        layer, and of the layer where it is largest. None without a BatchNorm."""
        nats = []
        for module, (total, squares, count) in self.sums.items():
            assert module.running_mean is not None
            assert module.running_var is not None
            mean = total / count
            expected = wide(module.running_var) + module.eps
            ratio = ((squares / count - mean.square()).clamp(min=0) + module.eps) / expected
            shift = (mean - wide(module.running_mean)).square() / expected
            nats.append((0.5 * (ratio + shift - 1 - ratio.log())).median().item())
        return max(nats, default=None)


@contextmanager
def batchnorm_misfit(model: nn.Module) -> Iterator[Moments]:
    """Record the statistics of what reaches the model's BatchNorms, in each pass within the context."""
    moments = Moments()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [m.register_forward_pre_hook(lambda m, given: moments.see(m, given)) for m in norms]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def recalibrated(logits: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """(cross-entropy [N] after the best temperature and class biases, by how much the logits had to be multiplied).

    logits: [N, classes]. A trained network that is calibrated has the least expected cross-entropy of all: any other
    pays the divergence between the two. Fitting the same few numbers for each makes up for those that are not.
    """
    from scipy.optimize import minimize

    scale = wide(logits).std().clamp(min=1e-12)
    z, n = wide(logits) / scale, len(y)
    truth = F.one_hot(y, z.shape[1]).double()

    def loss(parameters: Any) -> tuple[float, Any]:
        factor, biases = float(parameters[0]), torch.from_numpy(parameters[1:])
        logp = F.log_softmax(factor * z + biases, 1)
        slope = (logp.exp() - truth) / n
        value = -(truth * logp).sum() / n + PRIOR * biases.square().sum() / n
        slopes = torch.cat([(slope * z).sum().view(1), slope.sum(0) + 2 * PRIOR * biases / n])
        return value.item(), slopes.numpy()

    start = torch.cat([scale.view(1), torch.zeros(z.shape[1], dtype=torch.double)]).numpy()
    fitted = torch.from_numpy(minimize(loss, start, jac=True, method="L-BFGS-B").x)
    return F.cross_entropy(fitted[0] * z + fitted[1:], y, reduction="none"), float(fitted[0] / scale)


def predict_differently(a: Tensor, b: Tensor) -> bool:
    """Whether two networks predict other classes on more than 1 % of the images, and on 2 at least; a, b: classes,
    [N]."""
    differ = int((a != b).sum())
    return differ >= 2 and differ > SAME * len(a)


def excludes(a: Tensor, b: Tensor) -> bool:
    """Whether recalibrated cross-entropies a, b, [N] each, leave no doubt that a's network is likelier than b's."""
    more = b - a
    gap, error = more.mean().item(), more.std().item() / math.sqrt(len(more))
    return gap >= GAP and gap >= SIGMAS * error
