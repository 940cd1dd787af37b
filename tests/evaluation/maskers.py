"""Planted maskers and clean models: which checks of the light speak, and do clean models stay green?

    python -m tests.evaluation.maskers [CHECKPOINTS CIFAR10]

trains small networks on digits, a few seconds each on one thread, plants each masker in one of them, and prints the
table of docs/believing.md. CHECKPOINTS: folder with networks for CIFAR-10 of other people, and CIFAR10: an npz file of
its images, which are measured as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail import PGD, Sigmoid, digits, evaluate
from robustmail.data.dataset import Split, to_float
from robustmail.errors import RobustmailError
from robustmail.evaluation.data_loading import load_data
from robustmail.evaluation.evaluator import batch_sizer
from robustmail.evaluation.model_loading import load_model
from robustmail.evaluation.sanity_checks import judge, measure
from robustmail.functional import gap
from robustmail.models.small import SmallCNN

EPS, N = 0.1, 128
ATTACKS = ("nat", "pgd10", "pgd100", "cw", "apgd-t(steps=10, n_classes=4)")
Forward = Callable[[nn.Module, Tensor], Tensor]


class Masked(nn.Module):
    """A model behind something that makes attacks fail without making it robust."""

    def __init__(self, model: nn.Module, how: Forward) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]"""
        return self.how(self.model, x)


@dataclass(frozen=True)
class Masker:
    """how: what is done to the model. cause: the check that must name it. labels: what is done to the data."""

    cause: str
    how: Forward = lambda model, x: model(x)
    data: Callable[[Split], Split] = lambda part: part


def straight_through(values: Tensor, levels: int) -> Tensor:
    """Rounded to levels; the backward pass does not see it."""
    return values + ((levels * values).round() / levels - values).detach()


def by_the_batch(model: nn.Module, x: Tensor) -> Tensor:
    """Logits whose mean over the batch is 0."""
    logits = model(x)
    return logits - logits.mean(0)


def in_place(model: nn.Module, x: Tensor) -> Tensor:
    """Write into the images."""
    return model(x.detach().clamp_(0.2, 0.8) if not x.requires_grad else x.clamp(0.2, 0.8))


def one_sided(model: nn.Module, x: Tensor) -> Tensor:
    """The largest logit has a large gradient that leads nowhere."""
    logits = model(x)
    waves = torch.sin(300 * x.flatten(1)).mean(1, keepdim=True)
    return logits + F.one_hot(logits.argmax(1), logits.shape[1]) * waves


def partly_flat(model: nn.Module, x: Tensor) -> Tensor:
    """Pixels near one half become one half, as MeanSparse does with features near their mean."""
    return model(torch.where((x - 0.5).abs() < 0.25, 0.5 + 0 * x, x))


def coin(model: nn.Module, x: Tensor) -> Tensor:
    """Another answer at one time in ten."""
    logits = model(x)
    turned = torch.rand(len(x), 1, device=x.device) < 0.1
    return torch.where(turned, logits.roll(1, 1), logits)


@cache
def known_images() -> Tensor:
    """All test images."""
    return to_float(digits()().test.x)


def remembers(model: nn.Module, x: Tensor) -> Tensor:
    """Images that are far from all it knows are replaced by the nearest that it knows."""
    known = known_images()
    distance = torch.cdist(x.flatten(1), known.flatten(1), p=float("inf"))
    nearest = known[distance.argmin(1)]
    return model(torch.where((distance.amin(1) > 0.15)[:, None, None, None], nearest, x))


def relabelled(part: Split) -> Split:
    """Labels in another order."""
    return Split(part.x, (part.y + 3) % 10)


def sorted_set(_: Split) -> Split:
    """The first images of the whole set, sorted by class."""
    whole = digits()().test
    order = whole.y.argsort(stable=True)[:N]
    return Split(whole.x[order], whole.y[order])


def mostly_threes(_: Split) -> Split:
    """Nearly all images of one class."""
    whole = digits()().test
    order = (whole.y != 3).long().argsort(stable=True)[: int(1.25 * (whole.y == 3).sum())]
    return Split(whole.x[order], whole.y[order])


def always_three(model: nn.Module, x: Tensor) -> Tensor:
    """The same answer to all."""
    return 0.01 * model(x) + 100 * F.one_hot(torch.full_like(x[:, 0, 0, 0], 3).long(), 10)


MASKERS = {
    "logits times 1000": Masker("zero-gradients", lambda m, x: 1000 * m(x)),
    "logits times 30": Masker("logit-scale", lambda m, x: 30 * m(x)),
    "logits divided by 100": Masker("logit-scale", lambda m, x: m(x) / 100),
    "softmax inside": Masker("probabilities", lambda m, x: m(x).softmax(1)),
    "rounded input": Masker("step-function", lambda m, x: m((8 * x).round() / 8)),
    "flat between steps": Masker("step-function", partly_flat),
    "rounded input, straight through": Masker("step-function", lambda m, x: m(straight_through(x, 8))),
    "detached": Masker("zero-gradients", lambda m, x: m(x.detach())),
    "waves on the largest logit": Masker("imbalanced-gradients", one_sided),
    "noise layer": Masker("randomised-output", lambda m, x: m(x + 0.05 * torch.randn_like(x))),
    "a coin": Masker("randomised-output", coin),
    "dropout left on": Masker("randomised-output", lambda m, x: F.dropout(m(x), 0.1)),
    "statistics of the batch": Masker("batch-dependent-output", by_the_batch),
    "writes into its images": Masker("alters-its-images", in_place),
    "sees known images from afar": Masker("larger-eps-does-not-help", remembers),
    "labels in another order": Masker("class-order", data=relabelled),
    "always the most frequent class": Masker("guessing", always_three, mostly_threes),
    "a sorted set's first images": Masker("label-space", data=sorted_set),
}


def examined(
    model: nn.Module,
    part: Split,
    eps: float = EPS,
    norm: Any = "linf",
    attacks: tuple[str, ...] = ("nat", "pgd10", "pgd100"),
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is measured of a model, the verdict of the light)"""
    found = evaluate(model, part, attacks, eps, norm, seed=seed)
    sizer = batch_sizer(model, part)
    *_, measured = measure(model, part, found.ledger, eps, norm, seed, sizer)
    pgd = [name for name in attacks if name.startswith("pgd")]
    return measured, judge(measured, found.ledger, pgd, measured["classes"])


def cnn(act: Callable[[], nn.Module]) -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), act(), nn.Conv2d(8, 16, 3, 2, 1), act(), nn.Flatten(), nn.Linear(256, 10)
    )


def mlp(act: Callable[[], nn.Module]) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), act(), nn.Linear(128, 10))


@dataclass(frozen=True)
class Clean:
    """network: makes it. attack: what it is trained against. loss: of (logits, labels). norm, eps: of evaluation."""

    network: Callable[[], nn.Module]
    attack: Any = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    norm: str = "linf"
    eps: float = EPS
    epochs: int = 15


def weighted(logits: Tensor, y: Tensor) -> Tensor:
    """MAIL: weights from the probabilistic margin."""
    weights = Sigmoid(slope=10.0, bias=0.0)(gap(logits.detach().softmax(1), y))
    return (weights * F.cross_entropy(logits, y, reduction="none")).mean()


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    """Label smoothing."""
    return F.cross_entropy(logits, y, label_smoothing=0.1)


STRONG = PGD(eps=EPS, alpha=0.04, steps=5)
RELU = partial(mlp, nn.ReLU)
CLEAN = {
    "two layers, against PGD": Clean(RELU, STRONG),
    "two layers, no attack": Clean(RELU),
    "two layers, against PGD on the KL": Clean(RELU, PGD(eps=EPS, alpha=0.04, steps=5, loss="kl", start="gaussian")),
    "two layers, against PGD on the margin": Clean(RELU, PGD(eps=EPS, alpha=0.04, steps=5, loss="margin")),
    "two layers, against PGD, MAIL's weights": Clean(RELU, STRONG, weighted),
    "two layers, against one step": Clean(RELU, PGD(eps=EPS, alpha=EPS, steps=1)),
    "two layers, against PGD in l2": Clean(RELU, PGD(eps=0.5, alpha=0.2, steps=5, norm="l2"), norm="l2", eps=0.5),
    "two layers, label smoothing": Clean(RELU, None, smoothed),
    "two layers, GELU, against PGD": Clean(partial(mlp, nn.GELU), STRONG),
    "two layers, SiLU, no attack": Clean(partial(mlp, nn.SiLU)),
    "two layers, tanh, against PGD": Clean(partial(mlp, nn.Tanh), STRONG),
    "two layers, sigmoid, no attack": Clean(partial(mlp, nn.Sigmoid)),
    "a linear layer": Clean(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))),
    "convolutions, against PGD": Clean(partial(cnn, nn.ReLU), STRONG, epochs=8),
    "convolutions, no attack": Clean(partial(cnn, nn.ReLU), epochs=8),
    "convolutions with BatchNorm, no attack": Clean(lambda: SmallCNN(10, 1, 8), epochs=8),
}


def trained(clean: Clean) -> nn.Module:
    """The network, trained on digits."""
    torch.manual_seed(0)
    part, model = digits()().train, clean.network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for epoch in range(clean.epochs):
        for batch in torch.randperm(len(part.y), generator=torch.Generator().manual_seed(epoch)).split(128):
            x, y = to_float(part.x[batch]), part.y[batch]
            x = clean.attack(model, x, y).x if clean.attack else x
            optimizer.zero_grad()
            clean.loss(model.train()(x), y).backward()
            optimizer.step()
    return model.eval()


def of_others(checkpoints: Path, images: Path) -> Iterator[tuple[str, nn.Module, Split]]:
    """Networks of other people for CIFAR-10, with its first test images."""
    data = load_data(str(images), 1000)
    for file in sorted(checkpoints.glob("*.pth")) + sorted(checkpoints.glob("*.th")):
        try:
            model = load_model(str(file), data, probe=True, accept_reading=True).model
        except RobustmailError as error:
            print(f"{file.name}: {error}", file=sys.stderr)
            continue
        yield file.name, model, data.part.first(N)


def line(name: str, expected: str, measured: dict[str, Any], verdict: dict[str, Any]) -> str:
    """A row of the table."""
    flags = ", ".join(f"{flag['name']} ({flag['light']})" for flag in verdict["flags"]) or "none"
    return f"| {name} | {expected} | {verdict['light']} | {flags} |"


def main(arguments: list[str]) -> None:
    """Print the table."""
    print("| model | planted | light | flags |\n|---|---|---|---|")
    part = digits()().test.first(N)
    models = {name: trained(clean) for name, clean in CLEAN.items()}
    for name, clean in CLEAN.items():
        print(line(name, "", *examined(models[name], part, clean.eps, clean.norm, ATTACKS)), flush=True)
    for name, model, images in of_others(*map(Path, arguments)) if arguments else ():
        print(line(name, "", *examined(model, images, 2 / 255, attacks=ATTACKS)), flush=True)
    sound = next(iter(models.values()))
    for name, masker in MASKERS.items():
        found = examined(Masked(sound, masker.how), masker.data(part), attacks=ATTACKS)
        print(line(name, masker.cause, *found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
