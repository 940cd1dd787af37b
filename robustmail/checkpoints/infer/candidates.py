"""Which network has these tensors? Every answer loads strictly and has run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustmail.checkpoints.infer import registered, residual, sequential
from robustmail.checkpoints.infer.layers import Proposal, grouped

__all__ = ["Candidate", "candidates"]

MOST, MOST_LARGE, LARGE = 200, 6, 20_000_000
"""readings, as a caller tries them all on labelled images; fewer for networks of more numbers than LARGE"""

FARTHEST = 5.0
"""how much less likely than the first a proposal may be, in the prices of residual.py and chain.py"""

NEAREST = 1.5
"""the same, where names and shapes are those of a known network"""


@dataclass(frozen=True)
class Candidate:
    """A network that fits. What the shapes do not say, and was assumed, is `unwritten`.

    network has its weights, which it shares with other readings, is in eval mode and float32, and takes images already
    normalised.
    size: the side of the images, where the shapes fix it.
    """

    name: str
    classes: int
    channels: int
    size: int | None
    unwritten: tuple[str, ...]
    network: nn.Module = field(repr=False, compare=False)


def candidates(tensors: Mapping[str, Tensor], size: int | None = None) -> list[Candidate]:
    """The networks that fit, likeliest first; two that compute the same are one. Nothing fits: an empty list."""
    most = MOST if sum(tensor.numel() for tensor in tensors.values()) < LARGE else MOST_LARGE
    found: list[Candidate] = []
    seen: list[Tensor] = []
    for proposal in _proposals(tensors, size):
        try:
            network = proposal.make().eval().float()
            logits = _try(network, proposal, size)
        except Exception:  # a proposal is a guess: what cannot be built or run is none
            continue
        if any(logits.shape == other.shape and torch.allclose(logits, other, 1e-4, 1e-5) for other in seen):
            continue
        seen.append(logits)
        found.append(
            Candidate(proposal.name, logits.shape[1], proposal.channels, proposal.size, proposal.unwritten, network)
        )
        if len(found) == most:
            break
    return found


def _proposals(tensors: Mapping[str, Tensor], size: int | None) -> Iterator[Proposal]:
    named = list(registered.proposals(tensors, size))
    yield from named
    layers = grouped(tensors)
    if not layers or len(layers) > 5000:
        return
    guesses = residual.proposals(layers, size)
    if not named and (not guesses or not residual.excludes_chain(layers)):
        guesses += sequential.proposals(layers, size)
    guesses.sort(key=lambda proposal: proposal.cost)
    yield from (guess for guess in guesses if guess.cost <= guesses[0].cost + (NEAREST if named else FARTHEST))


def _try(network: nn.Module, proposal: Proposal, size: int | None) -> Tensor:
    """[2, classes] for fixed images of noise, a faint and a strong one. Raises whatever a network raises that does not
    fit."""
    side = size or proposal.size or 32
    image = torch.randn(2, proposal.channels, side, side, generator=torch.Generator().manual_seed(0))
    image[1] *= 4  # where ReLU6 is not ReLU
    with torch.no_grad():
        logits = network(image)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
        raise ValueError("no finite logits [B, classes]")
    return logits
