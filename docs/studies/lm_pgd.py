"""Which reading of the paper's LM-PGD breaks images that PGD-50 never breaks? (MAIL, Fig. 1a)

    python docs/studies/lm_pgd.py out.json NET.pth --data cifar10.npz --normalize cifar10 --eps 2/255 --name net

The paper says "line-searched learning rate" and "Nesterov's momentum", and no more. A reading here is a direction, a
search and a momentum; all start from the same noise as PGD-50. A pass is one image through the model, forward or
backward, so PGD-50 has 100. Controls spend more passes on plain PGD: 250 steps, or five starts of 50.

An image counts as broken at the first iterate that is misclassified; candidates that a search throws away do not count.
"""

import argparse
import functools
import itertools
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustmail import load_data, load_model
from robustmail.evaluation.evaluator import image_batch
from robustmail.runtime.provenance import provenance

STEPS, BATCH, SIZES = 50, 125, 7
NEVER = 10**9


@dataclass(frozen=True)
class Reading:
    """One reading of LM-PGD."""

    direction: str
    """sign: of the gradient; gradient: divided by its largest pixel"""
    search: str
    """best: the step size of the largest loss; first: the first one, from the longest, after which the loss has risen
    by at least 1e-4 of what the gradient promises (Armijo), else no step"""
    momentum: str
    """nesterov: (a_t - 1) / a_{t+1}, restarted where the loss did not rise; 0.9; none"""

    @property
    def name(self) -> str:
        return f"{self.direction}, {self.search}, momentum {self.momentum}"


DIRECTIONS, SEARCHES, MOMENTA = ("sign", "gradient"), ("best", "first"), ("nesterov", "0.9", "none")
READINGS = [Reading(*parts) for parts in itertools.product(DIRECTIONS, SEARCHES, MOMENTA)]


def loss_and_right(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, whether it is right), [B] each."""
    with torch.no_grad():
        logits = model(x)
    return cross_entropy(logits, y, reduction="none"), logits.argmax(1) == y


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the loss [B, C, H, W], the loss [B], whether it is right [B])"""
    x = x.detach().requires_grad_()
    logits = model(x)
    losses = cross_entropy(logits, y, reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    return grad, losses.detach(), logits.argmax(1) == y


def clip(x: Tensor, x_adv: Tensor, eps: float) -> Tensor:
    """The nearest point in the ball around x and in [0, 1]."""
    return (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)


def per_image(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return values.view(-1, 1, 1, 1)


def pgd(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, steps: int) -> Tensor:
    """Passes until PGD (eps/4) has a misclassified iterate, [B]; NEVER where it has none."""
    x_adv, passes = start, torch.full_like(y, NEVER)
    for step in range(steps + 1):
        _, right = loss_and_right(model, x_adv, y)
        passes = torch.where(~right, passes.clamp(max=2 * step), passes)
        if step < steps:
            x_adv = clip(x, x_adv + eps / 4 * gradient(model, x_adv, y)[0].sign(), eps)
    return passes


def search(model: nn.Module, reading: Reading, eps: float, x: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """One step from u: (the next iterate, its loss, whether it is right, the passes it took), [B] but the first."""
    grad, loss_u, right_u = gradient(model, u, y)
    direction = grad.sign()
    if reading.direction == "gradient":
        direction = grad / grad.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    first = reading.search == "first"
    point, loss, right = u, loss_u if first else torch.full_like(loss_u, -torch.inf), right_u
    taken, passes = torch.zeros_like(right_u), torch.full_like(y, 2)
    for s in sorted([*(2 * eps / 2**j for j in range(SIZES)), eps / 4], reverse=True):
        candidate = clip(x, u + s * direction, eps)
        candidate_loss, candidate_right = loss_and_right(model, candidate, y)
        passes = passes + ~taken
        better = candidate_loss > loss
        if first:
            promised = (grad * (candidate - u)).sum((1, 2, 3))
            better = ~taken & (candidate_loss > loss_u + 1e-4 * promised)
            taken = taken | better
        point = torch.where(per_image(better), candidate, point)
        loss, right = torch.where(better, candidate_loss, loss), torch.where(better, candidate_right, right)
    return point, loss, right, passes


def lm_pgd(
    model: nn.Module, reading: Reading, eps: float, x: Tensor, y: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """(passes, steps) until a misclassified iterate, [B] each; NEVER where there is none in 50 steps."""
    passes_to, steps_to = torch.full_like(y, NEVER), torch.full_like(y, NEVER)
    loss, right = loss_and_right(model, start, y)
    passes_to[~right], steps_to[~right] = 0, 0
    left = right.nonzero().squeeze(1)  # images that still stand, and their state
    here, before, a, spent = start, start, torch.ones_like(loss), torch.zeros_like(y)
    for step in range(1, STEPS + 1):
        here, before, loss, a, spent = (part[right] for part in (here, before, loss, a, spent))
        if not len(left):
            break
        a_next = (1 + (1 + 4 * a * a).sqrt()) / 2
        factor = {"nesterov": (a - 1) / a_next, "0.9": torch.full_like(a, 0.9), "none": torch.zeros_like(a)}
        u = clip(x[left], here + per_image(factor[reading.momentum]) * (here - before), eps)
        before, loss_before = here, loss
        here, loss, right, passes = search(model, reading, eps, x[left], y[left], u)
        spent = spent + passes
        passes_to[left[~right]], steps_to[left[~right]] = spent[~right], step
        a = torch.where(loss > loss_before, a_next, torch.ones_like(a))
        left = left[right]
    return passes_to, steps_to


def in_batches(function, *tensors: Tensor):
    """Apply a function to batches of tensors and join what it returns."""
    parts = [function(*batch) for batch in zip(*(t.split(BATCH) for t in tensors), strict=True)]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))
    return torch.cat(parts)


def compare(model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int = 0) -> dict[str, Any]:
    """Counts of images for PGD-50, the controls and every reading."""
    right = in_batches(lambda x, y: loss_and_right(model, x, y)[1], x, y)
    x, y = x[right], y[right]
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return clip(x, x + (2 * torch.rand(x.shape, generator=generator) - 1) * eps, eps)

    def plain(start: Tensor, steps: int = STEPS) -> Tensor:
        return in_batches(lambda x, y, start: pgd(model, x, y, start, eps, steps), x, y, start)

    start = noise()
    stands = plain(start) == NEVER
    long, restarted = plain(start, 250), torch.stack([plain(noise()) for _ in range(4)]).amin(0)
    rows = {
        "PGD-250": {"more_500": int((long < NEVER)[stands].sum())},
        "PGD-50, five starts": {"more_500": int((restarted < NEVER)[stands].sum())},
    }
    for reading in READINGS:
        passes, steps = in_batches(functools.partial(lm_pgd, model, reading, eps), x, y, start)
        limits = {"100": passes <= 100, "500": passes <= 500, "50_steps": steps <= STEPS}
        rows[reading.name] = {
            f"{word}_{limit}": int(counted.sum())
            for limit, broken in limits.items()
            for word, counted in (("more", broken & stands), ("fewer", ~broken & ~stands))
        }
        print(reading.name, rows[reading.name], flush=True)
    return {"right": len(y), "stand_under_pgd_50": int(stands.sum()), "rows": rows}


def options() -> argparse.ArgumentParser:
    """The options of this study."""
    parser = argparse.ArgumentParser(description="Which reading of LM-PGD breaks images that PGD-50 never breaks?")
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--normalize")
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the starts")
    parser.add_argument("--name", help="of the network in the file; by default that of its file")
    return parser


def main() -> None:
    """Measure one network and add it to the file."""
    given = options().parse_args()
    data = load_data(given.data)
    model = load_model(given.checkpoint, data, normalize=given.normalize).model.eval()
    x, y = image_batch(model, data.part, slice(given.n))
    results = compare(model, x, y, float(Fraction(given.eps)), given.seed)
    networks = json.loads(given.out.read_text()) if given.out.exists() else {}
    setting = {"eps": given.eps, "n": given.n, "seed": given.seed, "provenance": provenance(torch.device("cpu"))}
    networks[given.name or Path(given.checkpoint).name] = {**results, **setting}
    given.out.write_text(json.dumps(networks, indent=1) + "\n")


if __name__ == "__main__":
    main()
