"""Weights go into a named or own network strictly, or a sentence says why they do not."""

from __future__ import annotations

import re
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from robustmail.checkpoints import build_network, convert_names, fits, load_strict, load_tensors, normalisation_in
from robustmail.checkpoints.infer import class_counts, stem_channels
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


@pytest.mark.long
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


def test_unused_tensors_are_told_and_left_out_only_where_asked() -> None:
    net = n.seasoned(n.ResNet(n.Basic))
    extra = {"rotation.weight": torch.zeros(4, 8), "rotation.bias": torch.zeros(4)}
    with pytest.raises(ModelError, match=r"2 tensors more than the model: rotation.bias \[4\].*--ignore-unused"):
        load_strict({**net.state_dict(), **extra}, n.ResNet(n.Basic), "file")
    loaded, notes = load_tensors({**net.state_dict(), **extra}, n.ResNet(n.Basic), "file", ignore_unused=True)
    assert same(loaded, net)
    assert notes == ("left out, not used by the network: rotation.bias, rotation.weight",)
    missing = {key: tensor for key, tensor in net.state_dict().items() if key != "linear.bias"}
    with pytest.raises(ModelError, match="1 only in the model"):
        load_tensors({**missing, **extra}, n.ResNet(n.Basic), "file", ignore_unused=True)


class Tabled(nn.Module):
    """A network with tables: one in its state dict, one not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = n.ResNet(n.Basic)
        self.register_buffer("kept_index", torch.arange(4).view(2, 2))
        self.register_buffer("own_scale", torch.ones(1, 1, 1, 1) * 2, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x * self.own_scale)


def test_tables_that_a_network_makes_itself_are_left_out_and_its_own_loaded() -> None:
    net = Tabled()
    tensors = {**net.state_dict(), "own_scale": torch.full((1, 1, 1, 1), 5.0), "kept_index": torch.ones(2, 2).long(),
               "old_mask": torch.ones(3, 3, dtype=torch.bool)}  # fmt: skip
    loaded, notes = load_tensors(tensors, Tabled(), "file")
    assert torch.equal(loaded.kept_index, tensors["kept_index"])
    assert loaded.own_scale.item() == 2
    assert "old_mask, own_scale" in notes[0]
    with pytest.raises(ModelError, match="kept_index"):
        load_strict({key: t for key, t in net.state_dict().items() if key != "kept_index"}, Tabled(), "file")


def test_wrappers_within_either_side_do_not_matter() -> None:
    net, inner = n.seasoned(n.ResNet(n.Basic)), n.ResNet(n.Basic)
    inner.layer1 = nn.DataParallel(inner.layer1)
    wrapped = {name.replace("layer2.", "layer2._orig_mod."): t for name, t in net.state_dict().items()}
    loaded = load_strict(wrapped, inner, "file")
    inner.layer1 = inner.layer1.module
    assert same(loaded, net)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18", "efficientnet_b0", "swin_tiny_patch4_window7_224"]
)
def test_the_order_of_names_tells_nothing_of_classes_and_channels(name: str) -> None:
    with torch.device("meta"):
        tensors = timm.create_model(name, num_classes=7, in_chans=3).state_dict()
    for shuffled in (dict(reversed(tensors.items())), dict(sorted(tensors.items())), tensors):
        shapes = {key: tuple(tensor.shape) for key, tensor in shuffled.items()}
        assert class_counts(shapes)[0] == 7
        assert stem_channels(shapes) == 3


def test_older_names_of_a_timm_network_go_through_its_own_conversion() -> None:
    net = timm.create_model("convnext_atto", num_classes=7)
    renames = (("stem.", "downsample_layers.0."), ("head.norm.", "norm."), ("head.fc.", "head."), (".blocks.", "."),
               ("conv_dw", "dwconv"), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2"))  # fmt: skip
    older = {}
    for name, tensor in net.state_dict().items():
        name = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", name)
        for new, old in renames:
            name = name.replace(new, old)
        older[name] = tensor
    fresh = timm.create_model("convnext_atto", num_classes=7)
    converted = convert_names("convnext_atto", older, fresh)
    assert fits(converted, fresh)
    assert all(torch.equal(converted[name].flatten(), tensor.flatten()) for name, tensor in net.state_dict().items())


def test_a_conversion_that_would_resize_is_none() -> None:
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, depth=1)
    large = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7, depth=1)
    assert convert_names("vit_tiny_patch16_224", small.state_dict(), large) == {}
