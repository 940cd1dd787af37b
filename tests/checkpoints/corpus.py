"""Small trained networks of known structure: are they read right, refused, or read wrong in silence?

    python -m tests.checkpoints.corpus HALF FOLDER [MINI]

trains the networks of HALF (`develop`, `held-out`, `fresh` or `fresh2`) into FOLDER, a few seconds each on one thread,
reads each file as `robustmail eval` does, and prints a table. MINI: cifar10-mini.npz, without which digits alone are
used.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustmail import PGD, digits
from robustmail.data.dataset import ImageData, to_float
from robustmail.data.file_sources import npz
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError
from robustmail.evaluation.model_loading import load_model
from robustmail.evaluation.normalization import NORMALIZATIONS
from robustmail.models.classifier import Classifier

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "leaky 0.01": nn.LeakyReLU, "leaky 0.1": partial(nn.LeakyReLU, 0.1),
    "leaky 0.2": partial(nn.LeakyReLU, 0.2), "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU, "softplus": nn.Softplus,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu6": nn.ReLU6, "selu": nn.SELU, "hardswish": nn.Hardswish,
    "mish": nn.Mish, "celu 0.3": partial(nn.CELU, 0.3), "softsign": nn.Softsign, "hardtanh": nn.Hardtanh,
    "tanhshrink": nn.Tanhshrink, "square": lambda: Square(), "swish 3": lambda: Swish(3.0), "sine": lambda: Sine(),
}  # fmt: skip
TRAININGS = ("well", "well", "well", "well", "briefly", "long", "against attacks")


class Square(nn.Module):
    """Half the square of what is positive."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * F.relu(x).square()


class Swish(nn.Module):
    """x times the sigmoid of beta x."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Sine(nn.Module):
    """sin x"""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class BothPools(nn.Module):
    """The sum of two pools, which nobody would guess."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) + F.avg_pool2d(x, 2)


@dataclass(frozen=True)
class Conv:
    """A convolution: channels, kernel, stride, padding, and the pool behind it ("", max, average, max 3, both)."""

    width: int
    kernel: int
    stride: int
    padding: int
    pool: str = ""


@dataclass(frozen=True)
class Spec:
    """A network, and how it is trained."""

    seed: int
    data: str
    act: str
    convs: tuple[Conv, ...]
    hidden: tuple[int, ...] = ()
    norm: str = ""
    """"", batch, batch late (behind the activation), group, layer or instance"""
    end: str = "flatten"
    """flatten, average, peak, adaptive (to 2x2) or conv (a convolution to the classes, averaged)"""
    blocks: str = ""
    """"", post or pre: residual blocks in place of the convolutions behind the first"""
    naming: str = "numbers"
    """numbers, names or pieces (features.0 and classifier.0)"""
    padding_mode: str = "zeros"
    bias: bool = True
    normalization: str = "none"
    inside: bool = False
    """is the normalisation in the file?"""
    training: str = "well"
    optimizer: str = "adam"
    surprise: str = ""
    """what no reader knows: another activation between linear layers, normalisation without tensors, dilation"""
    stores: str = ""
    """the name under which the file tells its accuracy: best_acc as a fraction, prec1 in percent"""

    @property
    def name(self) -> str:
        """A file's name."""
        return f"{self.seed:05d}"

    @property
    def told(self) -> str:
        """In a line."""
        convs = " ".join(
            f"{c.width}k{c.kernel}s{c.stride}p{c.padding}{f'[{c.pool}]' if c.pool else ''}" for c in self.convs
        )
        extra = [self.blocks, self.norm, self.padding_mode.replace("zeros", ""), "" if self.bias else "no bias",
                 self.surprise, self.stores, self.normalization.replace("none", ""), self.training]  # fmt: skip
        return f"{self.data}: {self.act}; {convs}; {self.end} {self.hidden}; {', '.join(filter(None, extra))}"


def _norm(kind: str, wide: int, flat: bool = False) -> nn.Module:
    if kind.startswith("batch"):
        return nn.BatchNorm1d(wide) if flat else nn.BatchNorm2d(wide)
    return {"group": lambda: nn.GroupNorm(2, wide), "layer": lambda: nn.GroupNorm(1, wide),
            "instance": lambda: nn.InstanceNorm2d(wide, affine=True)}[kind]()  # fmt: skip


def _pool(kind: str) -> list[nn.Module]:
    kinds: dict[str, Callable[[], nn.Module]] = {
        "max": lambda: nn.MaxPool2d(2), "average": lambda: nn.AvgPool2d(2), "both": BothPools,
        "max 3": lambda: nn.MaxPool2d(3, 2, 1), "average 3": lambda: nn.AvgPool2d(3, 2, 1),
    }  # fmt: skip
    return [kinds[kind]()] if kind else []


class BasicBlock(nn.Module):
    """A residual block, post- or pre-activation, with BatchNorm or without."""

    def __init__(self, a: int, b: int, stride: int, spec: Spec) -> None:
        super().__init__()
        self.pre, self.act = spec.blocks == "pre", ACTIVATIONS[spec.act]()
        bn = spec.norm == "batch"
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=not bn, padding_mode=spec.padding_mode)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=not bn, padding_mode=spec.padding_mode)
        self.bn1 = nn.BatchNorm2d(a if self.pre else b) if bn else nn.Identity()
        self.bn2 = nn.BatchNorm2d(b) if bn else nn.Identity()
        if stride != 1 or a != b:
            self.shortcut = nn.Sequential(
                nn.Conv2d(a, b, 1, stride, bias=not bn), *([nn.BatchNorm2d(b)] if bn and not self.pre else [])
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            y = self.act(self.bn1(x))
            kept = self.shortcut(y) if hasattr(self, "shortcut") else x
            return kept + self.conv2(self.act(self.bn2(self.conv1(y))))
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + (self.shortcut(x) if hasattr(self, "shortcut") else x))


def made(spec: Spec, channels: int, size: int, classes: int = 10) -> nn.Module:
    """The network of a spec, untrained."""
    act = ACTIVATIONS[spec.act]
    modules: list[tuple[str, nn.Module]] = []
    wide = channels
    for i, c in enumerate(spec.convs):
        if i and spec.blocks:
            modules.append(
                (
                    f"layer{i}",
                    nn.Sequential(BasicBlock(wide, c.width, c.stride, spec), BasicBlock(c.width, c.width, 1, spec)),
                )
            )
        else:
            bias = spec.bias and not (spec.blocks and spec.norm == "batch")
            far = (
                2 if spec.surprise == "dilated" and i == len(spec.convs) - 1 and c.kernel == 3 and c.padding == 1 else 1
            )
            conv = nn.Conv2d(
                wide, c.width, c.kernel, c.stride, c.padding * far, far, bias=bias, padding_mode=spec.padding_mode
            )
            norms = [(f"bn{i + 1}", _norm(spec.norm, c.width))] if spec.norm and spec.blocks != "pre" else []
            if spec.surprise == "bare instance":
                norms = [*norms, (f"in{i + 1}", nn.InstanceNorm2d(c.width))]
            acts = [(f"act{i + 1}", act())] if spec.blocks != "pre" else []
            order = [*acts, *norms] if spec.norm == "batch late" else [*norms, *acts]
            modules += [(f"conv{i + 1}", conv), *order, *((f"pool{i + 1}", p) for p in _pool(c.pool))]
        wide = c.width
    if spec.blocks == "pre":
        modules += [*([("bn", nn.BatchNorm2d(wide))] if spec.norm == "batch" else []), ("act", act())]
    split = len(modules)
    ends: dict[str, list[nn.Module]] = {
        "flatten": [], "average": [nn.AdaptiveAvgPool2d(1)], "peak": [nn.AdaptiveMaxPool2d(1)],
        "adaptive": [nn.AdaptiveAvgPool2d(2)],
    }  # fmt: skip
    if spec.end == "conv":
        modules += [("last", nn.Conv2d(wide, classes, 1)), ("gap", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten())]
        return _named(spec, modules, len(modules))
    modules += [(f"end{i}", m) for i, m in enumerate(ends[spec.end])]
    modules.append(("flat", nn.Flatten()))
    with torch.no_grad():
        features = nn.Sequential(*(m for _, m in modules)).eval()(torch.zeros(1, channels, size, size)).shape[1]
    act = nn.Tanh if spec.surprise == "mixed" else act
    for i, width in enumerate(spec.hidden):
        modules += [(f"fc{i + 1}", nn.Linear(features, width, bias=spec.bias)), (f"fa{i + 1}", act())]
        features = width
    modules.append((f"fc{len(spec.hidden) + 1}", nn.Linear(features, classes, bias=spec.bias)))
    return _named(spec, modules, split)


def _named(spec: Spec, modules: list[tuple[str, nn.Module]], split: int) -> nn.Module:
    """As an nn.Sequential with numbers, with names, or in two pieces."""
    if spec.blocks or spec.naming == "names":
        network = nn.Sequential()
        for name, module in modules:
            network.add_module(name, module)
        return network
    if spec.naming == "pieces":
        pieces = nn.Sequential()
        pieces.add_module("features", nn.Sequential(*(m for _, m in modules[:split])))
        pieces.add_module("classifier", nn.Sequential(*(m for _, m in modules[split:])))
        return pieces
    return nn.Sequential(*(m for _, m in modules))


# Which networks there are


def specs(half: str, colour: bool = True) -> list[Spec]:
    """The networks of one half: drawn at random from a grammar, by seed, and some that no grammar draws."""
    first, count = {"develop": (0, 64), "held-out": (50_000, 64), "fresh": (60_000, 64), "fresh2": (70_000, 64)}[half]
    usual = list(ACTIVATIONS)[:14] if half == "develop" else [*list(ACTIVATIONS)[:14], "hardtanh", "sine", "swish 3"]
    drawn = [_varied(_drawn(first + i, usual), surprises=half != "develop") for i in range(count)]
    return [spec for spec in drawn if colour or spec.data == "digits"]


def _varied(spec: Spec, surprises: bool) -> Spec:
    """Some files tell their accuracy, and some networks of the held-out half have what the other half does not."""
    draw = random.Random(spec.seed + 1_000_000)
    stores = draw.choice(["", "", "best_acc", "prec1"])
    kinds = ["mixed", "mixed", "bare instance", "dilated"] if spec.convs and not spec.blocks else []
    surprise = draw.choice(kinds) if surprises and kinds and draw.random() < 0.25 else ""
    return replace(spec, stores=stores, surprise=surprise)


def _drawn(seed: int, usual: list[str]) -> Spec:
    draw = random.Random(seed)
    act = draw.choice(usual[:-1]) if draw.random() < 0.85 else draw.choice(list(ACTIVATIONS)[13:])
    data = draw.choice(["digits", "digits", "mini"])
    side = {"digits": 8, "mini": 32}[data]
    kind = draw.choices(["chain", "residual", "dense"], [0.7, 0.2, 0.1])[0]
    norm = draw.choices(["", "batch", "batch late", "group", "layer", "instance"], [0.55, 0.3, 0.06, 0.03, 0.03, 0.03])[
        0
    ]
    convention = "none" if draw.random() < 0.6 else draw.choice(
        ["half", "mnist"] if data == "digits" else ["cifar10", "imagenet", "half"]
    )  # fmt: skip
    common: dict[str, Any] = {
        "seed": seed, "data": data, "act": act, "normalization": convention, "inside": draw.random() < 0.3,
        "training": draw.choice(TRAININGS), "optimizer": draw.choice(["adam", "sgd", "decay"]),
        "naming": draw.choice(["numbers", "names", "pieces"]), "bias": draw.random() < 0.9,
        "padding_mode": draw.choices(["zeros", "circular", "reflect", "replicate"], [0.88, 0.04, 0.04, 0.04])[0],
    }  # fmt: skip
    if kind == "dense":
        return Spec(convs=(), hidden=tuple(draw.choice([24, 32, 64]) for _ in range(draw.choice([1, 2, 3]))), **common)
    if kind == "residual":
        widths = draw.choice([(8, 16), (8, 8, 16), (8, 16, 32)])
        convs = tuple(
            Conv(w, 3, 1 if i == 0 else 2 if i > 1 or draw.random() < 0.5 else 1, 1) for i, w in enumerate(widths)
        )
        return Spec(convs=convs, blocks=draw.choice(["post", "pre"]), norm="batch" if draw.random() < 0.7 else "",
                    end="average", hidden=() if draw.random() < 0.7 else (32,), **common)  # fmt: skip
    convs_ = []
    for i in range(draw.choice([1, 2, 2, 3, 3, 4])):
        kernel = draw.choice([3, 3, 3, 4, 5, 2])
        padding = draw.choice([0, (kernel - 1) // 2, (kernel - 1) // 2])
        stride = draw.choice([1, 1, 2] if kernel != 4 else [2, 1])
        pool = draw.choices(["", "max", "average", "max 3", "both"], [0.5, 0.25, 0.17, 0.05, 0.03])[0]
        after = (side + 2 * padding - kernel) // stride + 1
        if after < 2 or (pool and after < 3):
            pool, stride, padding, kernel = "", 1, 1, 3
            after = side
        side = {"": after, "max": after // 2, "average": after // 2, "both": after // 2, "max 3": (after - 1) // 2 + 1}[
            pool
        ]
        convs_.append(Conv(draw.choice([8, 12, 16]) * (1 + (i > 1)), kernel, stride, padding, pool))
    end = draw.choices(["flatten", "average", "peak", "adaptive", "conv"], [0.6, 0.2, 0.06, 0.06, 0.08])[0]
    if side % 2 and end == "adaptive":
        end = "flatten"
    hidden = draw.choice([(), (32,), (32,), (48, 24)])
    return Spec(convs=tuple(convs_), norm=norm, end=end, hidden=hidden if end != "conv" else (), **common)


# Training


def images_of(data: str, mini: Path | None) -> ImageData:
    """digits, or the CIFAR-10 of 2,000 + 1,000 images."""
    return digits()() if data == "digits" else npz(str(mini))()


def trained(spec: Spec, images: ImageData) -> Classifier:
    """The network of a spec after some seconds of training."""
    torch.manual_seed(spec.seed)
    channels, size, _ = images.shape
    normalize = NORMALIZATIONS[spec.normalization]
    model = Classifier(made(spec, channels, size), normalize)
    x, y = to_float(images.train.x), images.train.y
    epochs = {"well": 20, "briefly": 6, "long": 60, "against attacks": 15}[spec.training] // (
        1 if spec.data == "digits" else 2
    )
    rate = {"adam": 3e-3, "decay": 3e-3, "sgd": 0.05}[spec.optimizer]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4) if spec.optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05 if spec.optimizer == "decay" else 0.0)
    )  # fmt: skip
    steps = epochs * math.ceil(len(y) / 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    attack = PGD(
        eps=0.1 if spec.data == "digits" else 8 / 255, alpha=0.05 if spec.data == "digits" else 4 / 255, steps=3
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(64):
            if len(batch) < 8:
                continue
            some = attack(model.eval(), x[batch], y[batch]).x if spec.training == "against attacks" else x[batch]
            optimizer.zero_grad()
            F.cross_entropy(model.train()(some), y[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def logits_of(model: nn.Module, images: ImageData) -> Tensor:
    """[N, classes] of the test images"""
    with torch.no_grad():
        return torch.cat([model(to_float(x)) for x in images.test.x.split(250)])


def save(spec: Spec, model: Classifier, images: ImageData, path: Path) -> float:
    """Write the file as its author would, and return the accuracy on the test images."""
    tensors = dict(model.net.state_dict())
    if spec.inside and spec.normalization != "none":
        tensors = {"0.mean": model.mean, "0.std": model.std, **{f"1.{k}": v for k, v in tensors.items()}}
    accuracy = float((logits_of(model, images).argmax(1) == images.test.y).float().mean())
    told = {"best_acc": accuracy, "prec1": 100 * accuracy}
    torch.save({"state_dict": tensors, "epoch": 3, **({spec.stores: told[spec.stores]} if spec.stores else {})}, path)
    return accuracy


def train_all(half: str, folder: Path, mini: Path | None) -> None:
    """Train what is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {data: images_of(data, mini) for data in (["digits", "mini"] if mini else ["digits"])}
    for spec in specs(half, mini is not None):
        path = folder / f"{spec.name}.pt"
        if path.exists():
            continue
        try:
            model = trained(spec, sets[spec.data])
        except (RuntimeError, ValueError) as error:
            print(f"{spec.name} cannot be: {str(error)[:80]}", flush=True)
            continue
        accuracy = save(spec, model, sets[spec.data], path)
        torch.save(logits_of(model, sets[spec.data]), folder / f"{spec.name}.logits")
        print(f"{spec.name} {100 * accuracy:5.1f} %  {spec.told}", flush=True)


# How they are read


def outcome(spec: Spec, folder: Path, test: TestSet) -> tuple[str, str]:
    """(what becomes of a file in the hands of `robustmail eval`, why).

    `accepted` is evaluated without a word, `in doubt` only with --accept-reading, `unknown` fits no network. Right: the
    classes said are the trained network's, but for one image in a hundred.
    """
    path = folder / f"{spec.name}.pt"
    normalize = None if spec.inside and spec.normalization != "none" else spec.normalization
    why = ""
    try:
        subject = load_model(path, test, normalize=normalize)
    except ModelError as error:
        why = str(error.wrong)
        if "in doubt" not in why:
            return "unknown", why
        subject = load_model(path, test, normalize=normalize, accept_reading=True)
    with torch.no_grad():
        said = torch.cat([subject.model(to_float(x)) for x in test.part.x.split(250)]).argmax(1)
    true = torch.load(folder / f"{spec.name}.logits", weights_only=True).argmax(1)
    right = bool((said != true).double().mean() <= 0.01)
    return f"{'in doubt' if why else 'accepted'}, {'right' if right else 'WRONG'}", why


def read_all(half: str, folder: Path, mini: Path | None) -> None:
    """Read what was trained, and print a line for each file and the counts."""
    sets = {data: images_of(data, mini) for data in (["digits", "mini"] if mini else ["digits"])}
    counts: Counter[str] = Counter()
    for spec in specs(half, mini is not None):
        if (folder / f"{spec.name}.logits").exists():
            kind, why = outcome(spec, folder, TestSet(spec.data, sets[spec.data].test, 10))
            counts[kind] += 1
            print(f"{kind:16} {spec.name} {spec.told}  {why}", flush=True)
    print(json.dumps(counts))


if __name__ == "__main__":
    asked = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None
    train_all(*asked)
    read_all(*asked)
