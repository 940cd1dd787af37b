"""Weights go into a named or own network strictly, or a sentence says why they do not."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from robustmail.checkpoints import build_network, load_strict, normalisation_in
from robustmail.errors import ModelError
from tests.checkpoints import networks as n

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class Normalised(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mu", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("sigma", torch.tensor(STD).view(3, 1, 1))
        self.model = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x - self.mu) / self.sigma)


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return bool(torch.allclose(a.eval()(x), b.eval()(x)))


@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "1."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefixes_on_either_side_do_not_matter(prefix: str, wrapped: bool) -> None:
    net = n.seasoned(n.ResNet(n.Basic))
    tensors = {f"{prefix}{name}": t for name, t in net.state_dict().items()}
    target: nn.Module = n.ResNet(n.Basic)
    target = nn.DataParallel(target) if wrapped else target
    assert same(load_strict(tensors, target, "file").module if wrapped else load_strict(tensors, target, "file"), net)


def test_normalisation_of_the_network_is_loaded_and_any_other_left_out() -> None:
    net = Normalised(n.seasoned(n.ResNet(n.Basic)))
    net.mu += 0.01
    tensors = {f"module.{name}": t for name, t in net.state_dict().items()}
    assert same(load_strict(tensors, Normalised(n.ResNet(n.Basic)), "file"), net)
    assert same(load_strict(tensors, n.ResNet(n.Basic), "file"), net.model)


def test_counters_may_be_absent_and_nothing_else() -> None:
    net = n.seasoned(n.ResNet(n.Basic))
    tensors = {k: t for k, t in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert same(load_strict(tensors, n.ResNet(n.Basic), "file"), net)
    with pytest.raises(ModelError, match="1 only in the model"):
        load_strict({k: t for k, t in tensors.items() if k != "bn1.bias"}, n.ResNet(n.Basic), "file")


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (partial(n.ResNet, n.Basic, classes=100), "The file has 10 classes, the model 100"),
        (partial(n.ResNet, n.Basic, (16, 32, 64)), "another width"),
        (
            partial(n.ResNet, n.Basic, depth=3),
            "another depth: the file's layer1 ends at layer1.1, the model's at layer1.2",
        ),
        (partial(n.ResNet, n.Basic, channels=1), "other channels"),
        (n.LeNet, "another architecture"),
        (partial(n.Vgg, True, True), "another architecture"),
    ],
)
def test_a_misfit_is_explained_in_one_line(network: partial[nn.Module], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load_strict(n.ResNet(n.Basic).state_dict(), network(), "file.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_name_takes_classes_and_channels_from_the_tensors() -> None:
    tensors = timm.create_model("resnet18", num_classes=7, in_chans=1).state_dict()
    assert build_network("resnet18", tensors).fc.out_features == 7
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=10)
    assert same(
        load_strict(small.state_dict(), build_network("vit_tiny_patch16_224", small.state_dict()), "file"), small
    )


def test_factories_are_called_as_they_want() -> None:
    def bare() -> nn.Module:
        return nn.Linear(1, 1)

    def sized(a: int, b: int) -> nn.Module:
        return nn.Linear(a, b)

    def named(depth: int = 3, num_classes: int = 5) -> nn.Module:
        return nn.Linear(depth, num_classes)

    assert isinstance(build_network(bare, {}), nn.Linear)
    assert build_network(sized, {}, 7, 2).weight.shape == (2, 7)
    assert build_network(named, {}, 7).weight.shape == (7, 3)
    assert isinstance(build_network(n.LeNet, {}), n.LeNet)


def test_a_factory_that_breaks_its_contract_is_named() -> None:
    def raises() -> nn.Module:
        raise ValueError("no\nluck")

    def greedy(a: int, b: int, c: int) -> nn.Module:
        return nn.Linear(a, b)

    for factory, said in ((raises, "raised ValueError: no luck"), (dict, "returned dict"), (greedy, "needs a, b, c")):
        with pytest.raises(ModelError, match=said):
            build_network(factory, {})
    with pytest.raises(ModelError, match="no such model"):
        build_network("resnet1888", {})


def test_normalisation_is_found_inside_a_network() -> None:
    assert normalisation_in(Normalised(n.LeNet())) == (MEAN, STD)
    assert normalisation_in(nn.Sequential(torchvision.transforms.Normalize(MEAN, STD), n.LeNet())) == (MEAN, STD)
    assert normalisation_in(n.ResNet(n.Basic, (3, 6, 12))) is None
    assert normalisation_in(timm.create_model("resnet18")) is None
