"""A network is read back from its tensors, computes the same, and says what was assumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from robustmail.checkpoints import candidates
from robustmail.checkpoints.infer import prices
from robustmail.checkpoints.infer.search import _proposals
from robustmail.models.classifier import build
from tests.checkpoints import networks as n

FIRST = {
    "kuangliu's ResNet": (lambda: n.ResNet(n.Basic), 3, 32),
    "kuangliu's ResNet with 4 stages": (lambda: n.ResNet(n.Basic, (4, 8, 16, 32)), 3, 32),
    "kuangliu's bottlenecks": (lambda: n.ResNet(n.Bottleneck, (4, 8, 16, 32), grow=4), 3, 32),
    "torchvision's names with a small stem": (lambda: n.ResNet(partial(n.Basic, side="downsample"), head="fc"), 3, 32),
    "torchvision's names with a large stem": (
        lambda: n.ResNet(partial(n.Bottleneck, side="downsample"), (4, 8, 16, 32), 2, 4, head="fc", large=True), 3, 64,
    ),
    "He's option A": (lambda: n.ResNet(partial(n.Basic, option="A"), depth=3), 3, 32),
    "He's option A in grey": (lambda: n.ResNet(partial(n.Basic, option="A"), channels=1, classes=7), 1, 32),
    "a verifier's residual network": (n.Small2b, 3, 32),
    "PreActResNet": (lambda: n.PreActNet(last=True), 3, 32),
    "PreActResNet without a last BatchNorm": (lambda: n.PreActNet(last=False), 3, 32),
    "TRADES' WRN": (lambda: n.WideNet(2), 3, 32),
    "TRADES' WRN with the unused group": (lambda: n.WideNet(2, unused=True), 3, 32),
    "TRADES' WRN of width 1": (n.WideNet, 3, 32),
    "meliketoy's WRN": (n.BiasedWideNet, 3, 32),
    "LeNet": (n.LeNet, 3, 32),
    "the MNIST example": (n.MnistNet, 1, 28),
    "TRADES' MNIST network": (n.SmallTrades, 1, 28),
    "VGG": (lambda: n.Vgg(bn=False, hidden=False), 3, 32),
    "VGG with BatchNorm": (lambda: n.Vgg(bn=True, hidden=False), 3, 32),
    "VGG with hidden layers": (lambda: n.Vgg(bn=True, hidden=True), 3, 32),
    "a verifier's small chain": (n.conv_small, 3, 32),
    "a verifier's wide chain": (n.conv_wide, 3, 32),
    "BatchNorm behind the activation": (n.conv_bn_late, 3, 32),
    "DeepMind's WRN": (n.SameNet, 3, 32),
    "ResNet-9": (n.ResNet9, 3, 32),
    "strides before a global average": (n.strided, 3, 32),
    "an MLP on MNIST": (n.mlp, 1, 28),
    "an MLP on CIFAR-10": (lambda: n.mlp((3072, 40, 20, 10)), 3, 32),
    "ours": (lambda: build("cifar_resnet18_w8", 10, 3).net, 3, 32),
    "our pre-activation network": (lambda: build("cifar_preact_resnet18_w16", 10, 3).net, 3, 32),
    "our WRN": (lambda: build("cifar_wrn16_2", 10, 3).net, 3, 32),
    "our CNN on digits": (lambda: build("small_cnn", 10, 1).net, 1, 8),
    "timm's ResNet": (lambda: timm.create_model("resnet18", num_classes=7), 3, 64),
    "timm's ViT for small images": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10), 3, 32,
    ),
}  # fmt: skip

LATER = {
    "SiLU": (lambda: n.WideNet(2, act=F.silu), 3, 32),
    "LeakyReLU": (lambda: n.WideNet(2, act=partial(F.leaky_relu, negative_slope=0.1)), 3, 32),
}


def place(network: nn.Module, channels: int, size: int, tensors: dict[str, torch.Tensor] | None = None) -> int:
    """Which reading computes the same as the network?"""
    tensors = tensors or network.state_dict()
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(x)
        found = candidates(tensors, size)
        for i, reading in enumerate(found):
            read = reading.network
            assert not read.training
            assert reading.classes == expected.shape[1]
            assert reading.channels == channels
            if torch.allclose(read(x), expected, rtol=1e-3, atol=1e-4):
                return i
    raise AssertionError(f"none of {[(r.name, r.assumptions) for r in found]}")


@pytest.fixture
def first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings but the first are not built, which takes ten times as long."""
    for limit in ("MAX_CANDIDATES", "MAX_CANDIDATES_LARGE"):
        monkeypatch.setattr(prices, limit, 1)


@pytest.mark.usefixtures("first_alone")
@pytest.mark.parametrize("name", FIRST)
def test_the_first_reading_computes_what_the_network_does(name: str) -> None:
    make, channels, size = FIRST[name]
    assert place(n.seasoned(make()), channels, size) == 0


@pytest.mark.long
@pytest.mark.parametrize("name", LATER)
def test_what_no_tensor_says_is_among_the_readings(name: str) -> None:
    make, channels, size = LATER[name]
    assert place(n.seasoned(make()), channels, size) > 0


@pytest.mark.parametrize("name", FIRST)
def test_the_order_of_names_does_not_matter(name: str) -> None:
    tensors = FIRST[name][0]().state_dict()
    first = [(p.name, p.cost, p.assumptions) for p in _proposals(tensors, None)]
    names = random.Random(0).sample(list(tensors), len(tensors))
    found = _proposals({key: tensors[key] for key in names}, None)
    assert [(p.name, p.cost, p.assumptions) for p in found] == first


@pytest.mark.usefixtures("first_alone")
def test_counters_of_batches_may_be_absent() -> None:
    network = n.seasoned(n.ResNet(n.Basic))
    tensors = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert place(network, 3, 32, tensors) == 0


@pytest.mark.usefixtures("first_alone")
def test_a_size_that_nobody_told_is_found() -> None:
    assert candidates(n.conv_small().state_dict())[0].size == 32
    assert candidates(n.MnistNet().state_dict())[0].size == 28


@pytest.mark.usefixtures("first_alone")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: n.ResNet(n.Basic, (4, 8, 16, 32)), "ResNet-18"),
        (lambda: n.ResNet(partial(n.Basic, option="A"), (16, 32, 64), depth=3), "ResNet-20, option A shortcuts"),
        (lambda: n.WideNet(2), "WRN-16-2"),
        (lambda: timm.create_model("resnet18", num_classes=7), "timm resnet18"),
        (n.conv_small, "chain of 2 convolutions and 2 linear layers"),
        (lambda: n.Vgg(True, False), "VGG-11"),
    ],
)
def test_a_reading_has_the_name_that_a_person_would_say(make: Callable[[], nn.Module], name: str) -> None:
    assert candidates(make().state_dict())[0].name.startswith(name)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a.weight": torch.zeros(3)},
        {"a.weight": torch.zeros(3, 4), "b.weight": torch.zeros(3, 5)},
        {"a.weight": torch.zeros(4, 4, 3, 3, 3), "b.weight": torch.zeros(3, 4)},
        {"a.weight": torch.zeros(8, 3, 3, 3), "b.weight": torch.zeros(10, 13)},
        {"lstm.weight_ih_l0": torch.zeros(8, 4), "lstm.weight_hh_l0": torch.zeros(8, 2)},
        {"": torch.zeros(2, 2), ".": torch.zeros(2), "..weight": torch.zeros(1, 1, 1, 1)},
        {"conv1.weight": torch.zeros(2, 3, 3, 3), "linear.weight": torch.zeros(2, 3)},
    ],
)
def test_what_fits_nothing_has_no_reading(tensors: dict[str, torch.Tensor]) -> None:
    assert candidates(tensors) == []
