"""All candidate networks for the tensors of a file, ranked; each loads strictly and has run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustmail.checkpoints.infer import prices, registered, residual, sequential
from robustmail.checkpoints.infer.layers import Proposal, grouped
from robustmail.checkpoints.names import canonical

__all__ = ["Candidate", "candidates"]

MAX_LAYERS = 5000


@dataclass(frozen=True)
class Candidate:
    """A network that fits the tensors of a file.

    name: what people would call it, "ResNet-18 (CIFAR stem, 10 classes)".
    classes, channels: of its output and its input.
    size: side of its images in pixels; None if the shapes do not fix it.
    assumptions: what neither names nor shapes say and was assumed, in words: activation, strides, pools, paddings.
    network: in eval mode and float32, with the file's weights, which it shares with other candidates; it takes images
    [B, C, H, W] that are normalised already, and returns logits [B, classes].
    """

    name: str
    classes: int
    channels: int
    size: int | None
    assumptions: tuple[str, ...]
    network: nn.Module = field(repr=False, compare=False)


def candidates(tensors: Mapping[str, Tensor], size: int | None = None) -> list[Candidate]:
    """The networks that fit the tensors of a state dict, likeliest first; an empty list if none does.

    The order of the tensors does not matter. Of several networks that compute the same, the likeliest stands for all.
    size: side of the images in pixels, if
    known.
    """
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    limit = prices.MAX_CANDIDATES if n_parameters < prices.LARGE_NETWORK else prices.MAX_CANDIDATES_LARGE
    results: list[Candidate] = []
    seen_logits: list[Tensor] = []
    for proposal in _proposals(tensors, size):
        try:
            network = proposal.make().eval().float()
            logits = _test_run(network, proposal, size)
        except Exception:  # a proposal is a guess: one that cannot be built or run is wrong
            continue
        if any(logits.shape == seen.shape and torch.allclose(logits, seen, 1e-4, 1e-5) for seen in seen_logits):
            continue
        seen_logits.append(logits)
        results.append(
            Candidate(proposal.name, logits.shape[1], proposal.channels, proposal.size, proposal.assumptions, network)
        )
        if len(results) == limit:
            break
    return results


def _proposals(tensors: Mapping[str, Tensor], size: int | None) -> Iterator[Proposal]:
    tensors = canonical(tensors)
    named = list(registered.proposals(tensors))
    yield from named
    layers = grouped(tensors)
    if not layers or len(layers) > MAX_LAYERS:
        return
    guesses = residual.proposals(layers, size)
    if not named and (not guesses or not residual.excludes_chain(layers)):
        guesses += sequential.proposals(layers, size)
    guesses.sort(key=lambda proposal: proposal.cost)
    extra = prices.MAX_EXTRA_COST_NAMED if named else prices.MAX_EXTRA_COST
    yield from (guess for guess in guesses if guess.cost <= guesses[0].cost + extra)


def _test_run(network: nn.Module, proposal: Proposal, size: int | None) -> Tensor:
    """Logits [2, classes] of two fixed noise images, one faint and one strong. Raises any exception if the network does
    not fit."""
    side = size or proposal.size or 32
    images = torch.randn(2, proposal.channels, side, side, generator=torch.Generator().manual_seed(0))
    images[1] *= 4  # ReLU6 and ReLU differ only on large values
    with torch.no_grad():
        logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
        raise ValueError("no finite logits [B, classes]")
    return logits
