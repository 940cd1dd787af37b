"""RobustBench's names open its networks: the same names of parameters, and the same logits as written by hand."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from robustmail.checkpoints import build_network, load_strict
from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import ModelError
from robustmail.evaluation.model_loading import load_model, reload_model
from robustmail.models.classifier import build, check_forward, check_name, is_network
from robustmail.models.folded import FoldedModel
from robustmail.models.resnet import ResNet
from robustmail.models.robustbench import IMAGENET, NAMES, architectures
from robustmail.models.robustbench_networks import STATISTICS, DMPreActResNet, DMWideResNet, PreActResNet, WideResNet
from robustmail.models.robustbench_zoo import ZOO
from robustmail.models.wide_resnet import WideResNet as OurWideResNet

CIFAR10 = STATISTICS["cifar10"]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def randomised(network: nn.Module) -> nn.Module:
    """The network in eval mode, with BatchNorms that do something."""
    rng = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=rng) if "var" in name or "weight" in name else tensor.normal_(
                generator=rng
            )
    return network.eval()


def renamed(tensors: dict[str, torch.Tensor], *changes: tuple[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in tensors.items():
        for old, new in changes:
            name = re.sub(old, new, name)
        out[name] = tensor
    return out


# The same logits as networks from elsewhere, under other names


def test_the_wide_resnet_of_trades_is_ours_under_other_names(x):
    ours = randomised(OurWideResNet(7, 3, 16, 2))
    tensors = renamed(ours.state_dict(), (r"^(block\d)", r"\1.layer"), ("shortcut", "convShortcut"), ("linear", "fc"))
    network = load_strict(tensors, WideResNet(7, 3, 16, 2), "test")
    torch.testing.assert_close(network(x), ours(x))


def test_preactresnet_with_bn_is_ours_under_other_names(x):
    ours = randomised(ResNet(preact=True))
    tensors = renamed(ours.state_dict(), (r"shortcut\.", "shortcut.0."))
    torch.testing.assert_close(load_strict(tensors, PreActResNet(bn=True), "test")(x), ours(x))


@pytest.mark.long
@pytest.mark.parametrize(("depth", "bottleneck"), [(18, False), (34, False), (50, True)])
def test_resnets_are_torchvisions_with_another_stem(x, depth, bottleneck):
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    tensors = renamed(randomised(theirs).state_dict(), ("downsample", "shortcut"), (r"^fc\.", "linear."))
    network = load_strict(tensors, build_network(f"ResNet-{depth}", tensors, 10), "test")
    assert isinstance(network, ResNet)
    torch.testing.assert_close(network(x), theirs(x), rtol=1e-4, atol=1e-4)


# The same logits as by hand


def bn(t: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, *(t[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def same(x: torch.Tensor, kernel: torch.Tensor, stride: int) -> torch.Tensor:
    """A convolution padded as TensorFlow's SAME: in all as much as is needed, the odd pixel at the end."""
    total = max((-(-x.shape[2] // stride) - 1) * stride + kernel.shape[2] - x.shape[2], 0)
    return F.conv2d(F.pad(x, (total // 2, total - total // 2) * 2), kernel, stride=stride)


def scaled(x: torch.Tensor, statistics) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (x - mean) / std


@pytest.mark.parametrize(("act", "squeeze"), [("silu", 0.0), ("relu", 0.0), ("silu", 0.25)])
def test_dmwideresnet_does_as_written_by_hand(x, act, squeeze):
    network = randomised(DMWideResNet(10, 3, (4, 8, 16, 24), (2, 1, 2), act, squeeze=squeeze))
    t, f = network.state_dict(), getattr(F, act)
    h = same(scaled(x, CIFAR10), t["init_conv.weight"], 1)
    for group, depth in enumerate((2, 1, 2)):
        for block in range(depth):
            at, stride = f"layer.{group}.block.{block}", 2 if group and not block else 1
            active = f(bn(t, f"{at}.batchnorm_0", h))
            out = f(bn(t, f"{at}.batchnorm_1", same(active, t[f"{at}.conv_0.weight"], stride)))
            out = same(out, t[f"{at}.conv_1.weight"], 1)
            if squeeze:
                gate = F.relu(
                    F.conv2d(out.mean((2, 3), keepdim=True), t[f"{at}.se.fc1.weight"], t[f"{at}.se.fc1.bias"])
                )
                out = out * F.conv2d(gate, t[f"{at}.se.fc2.weight"], t[f"{at}.se.fc2.bias"]).sigmoid()
            shortcut = t.get(f"{at}.shortcut.weight")
            h = out + (h if shortcut is None else F.conv2d(active, shortcut, stride=stride))
    logits = F.linear(f(bn(t, "batchnorm", h)).mean((2, 3)), t["logits.weight"], t["logits.bias"])
    torch.testing.assert_close(network(x), logits)


def test_dmpreactresnet_does_as_written_by_hand(x):
    network = randomised(DMPreActResNet(10, 3, (1, 2, 1, 1), statistics=STATISTICS["cifar100"]))
    t = network.state_dict()
    h = same(scaled(x, STATISTICS["cifar100"]), t["conv_2d.weight"], 1)
    for stage, depth in enumerate((1, 2, 1, 1)):
        for block in range(depth):
            at, stride = f"layer_{stage}.{block}", 2 if stage and not block else 1
            out = same(F.silu(bn(t, f"{at}.batchnorm_0", h)), t[f"{at}.conv_2d_1.weight"], stride)
            out = same(F.silu(bn(t, f"{at}.batchnorm_1", out)), t[f"{at}.conv_2d_2.weight"], 1)
            shortcut = t.get(f"{at}.shortcut.weight")
            h = out + (h if shortcut is None else same(h, shortcut, stride))
    logits = F.linear(F.silu(bn(t, "batchnorm", h)).mean((2, 3)), t["logits.weight"], t["logits.bias"])
    torch.testing.assert_close(network(x), logits)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_preactresnet_without_bn_does_as_written_by_hand(x, bottleneck):
    network = randomised(PreActResNet(10, 3, (1, 1, 1, 1), bottleneck))
    t = network.state_dict()
    h = same(x, t["conv1.weight"], 1)
    for stage in range(1, 5):
        at, stride = f"layer{stage}.0", 1 if stage == 1 else 2
        active = out = F.relu(bn(t, f"{at}.bn1", h))
        for i, kernel in enumerate((1, 3, 1) if bottleneck else (3, 3), start=1):
            out = out if i == 1 else F.relu(bn(t, f"{at}.bn{i}", out))
            out = F.conv2d(out, t[f"{at}.conv{i}.weight"], None, stride if i == 1 + bottleneck else 1, kernel // 2)
        shortcut = t.get(f"{at}.shortcut.0.weight")
        h = out + (h if shortcut is None else F.conv2d(active if bottleneck else h, shortcut, stride=stride))
    torch.testing.assert_close(network(x), F.linear(h.mean((2, 3)), t["linear.weight"], t["linear.bias"]))


def test_hypersphere_embedding_gives_cosines(x):
    network = randomised(WideResNet(10, 3, 10, 1, bias=False, cosine=True))
    assert network(x).abs().max() <= 1
    plain = load_strict(network.state_dict(), WideResNet(10, 3, 10, 1, bias=False), "test")
    lengths = F.linear(torch.ones(1), network.fc.weight.norm(dim=1)[:, None])  # of the rows of the last layer
    torch.testing.assert_close((plain(x) / lengths).argmax(1), network(x).argmax(1))


@pytest.mark.long
def test_xcit_for_cifar_is_timms_with_two_strides_of_one(x):
    network = architectures("XCiT-S12")[0].build(10, 3).eval()
    assert network.model.forward_features(x).shape == (2, 1 + 8 * 8, 384)  # patches of 4 x 4
    with torch.no_grad():
        torch.testing.assert_close(network(x), network.model(scaled(x, CIFAR10)))
    with pytest.raises(ModelError, match="not for 7 classes"):
        build("XCiT-S12", 7, 3)


# Names


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("WideResNet-28-10", "WideResNet-28-10 of TRADES", 3),
        ("wide_resnet_28_10", "WideResNet-28-10 of TRADES", 3),
        ("WRN-28-10", "WideResNet-28-10 of TRADES", 3),
        ("wrn28-10-swish", "WideResNet-28-10 of TRADES", 3),
        ("WideResNet-106-16", "WideResNet-106-16", 3),
        ("DMWideResNet-70-16", "DMWideResNet-70-16 (SiLU", 1),
        ("DM_WideResNet_70_16_ReLU_cifar100", "DMWideResNet-70-16 (ReLU", 1),
        ("RaWideResNet-70-16", "RaWideResNet-70-16", 1),
        ("PreActResNet-18", "PreActResNet-18", 3),
        ("preact-resnet18-swish", "DMPreActResNet-18 (SiLU", 1),
        ("PreActResNet18", "PreActResNet-18", 3),
        ("DMPreActResNet-34", "DMPreActResNet-34", 1),
        ("ResNet-18", "ResNet-18 for CIFAR", 2),
        ("ResNet18", "ResNet-18 for CIFAR", 2),
        ("WideResNet-50-2", "timm wide_resnet50_2", 1),
        ("Swin-B", "timm swin_base_patch4_window7_224", 1),
        ("carmon2019unlabeled", "WideResNet-28-10 of TRADES", 3),
        ("Wang2023Better_WRN-28-10", "DMWideResNet-28-10", 1),
    ],
)
def test_a_name_is_read_in_any_spelling(name, first, count):
    found = architectures(name)
    assert found[0].title.startswith(first)
    assert len(found) == count


@pytest.mark.parametrize(
    "name",
    ["WideResNet-29-10", "WideResNet-28", "WideResNet-28-0", "WideResNet-4-10", "WideResNet-28-10-10", "ResNet-19",
     "ResNet-18-2", "ResNet-18-silu", "PreActResNet-18-x", "DMResNet-18", "RaWideResNet-28-10", "WideResNet-999994-10",
     "WideResNet-28-10-silu-relu", "WideResNet-28-10:x", "../WideResNet-28-10", "WideResNet-28-10\n", "", "XCiT-S24"],
)  # fmt: skip
def test_other_names_are_none(name):
    assert not architectures(name)
    assert not is_network(name)


def test_a_misspelt_name_is_refused_with_the_nearest():
    for name, near in {
        "WideResNet-28-1O": "WideResNet-28-10",
        "RaWideResnet-70-17": "RaWideResNet-70-16",
        "Carmon2019Unlabelled": "Carmon2019Unlabeled",
    }.items():
        with pytest.raises(ModelError, match=f"Did you mean '{near}'"):
            check_name(name)


def test_every_suggested_name_and_every_name_in_the_zoo_is_known():
    assert all(architectures(name) for name in (*NAMES, *IMAGENET))
    for entries in ZOO.values():
        assert all(architectures(architecture) and classes in (10, 100) for architecture, classes, _ in entries)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("WideResNet-28-10", 36.48), ("WideResNet-34-10", 46.16), ("DMWideResNet-70-16", 266.8), ("ResNet-18", 11.17),
     ("RaWideResNet-70-16", 267.2), ("PreActResNet-18", 11.17)],
)  # fmt: skip
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        network = architectures(name)[0].build(10, 3)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=1e-3)


# Files


@pytest.fixture(scope="module")
def data() -> TestSet:
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=rng)
    return TestSet("random", Split(x, torch.randint(10, (8,), generator=rng)), 10)


def stored(network: nn.Module, path, **extra: torch.Tensor):
    torch.save({"state_dict": {f"module.{k}": v for k, v in {**network.state_dict(), **extra}.items()}}, path)
    return path


@pytest.mark.long
@pytest.mark.parametrize(
    ("network", "title"),
    [
        (WideResNet(10, 3, 10, 1), "of TRADES' code"),
        (WideResNet(10, 3, 10, 1, sub_block1=True), "of TRADES' code"),
        (WideResNet(10, 3, 10, 1, bias=False), "of TRADES' code"),
        (DMWideResNet(10, 3, (16, 16, 32, 64), (1, 1, 1)), "DMWideResNet-10-1 (SiLU, normalises images itself)"),
        (OurWideResNet(10, 3, 10, 1), "of robustmail"),
    ],
)  # fmt: skip
def test_one_name_opens_every_network_that_has_it(network, title, data, tmp_path):
    path = stored(randomised(network), tmp_path / "file.pt")
    loaded = load_model(path, data, model="WideResNet-10-1", normalize="none")
    assert any(title in note for note in loaded.notes)
    x = data.part.x.float() / 255
    torch.testing.assert_close(loaded.model(x), network(x))
    assert reload_model(loaded.spec, data).fingerprint == loaded.fingerprint


@pytest.mark.long
def test_a_network_that_normalises_itself_is_not_normalised_again(data, tmp_path):
    network = randomised(DMWideResNet(10, 3, (16, 16, 32, 64), (1, 1, 1)))
    path, x = stored(network, tmp_path / "file.pt"), data.part.x.float() / 255
    loaded = load_model(path, data, model="DMWideResNet-10-1")
    assert "the network normalises by itself (cifar10)" in loaded.notes
    torch.testing.assert_close(loaded.model(x), network(x))
    with pytest.raises(ModelError, match="normalises already"):
        load_model(path, data, model="DMWideResNet-10-1", normalize="cifar10")


@pytest.mark.long
def test_statistics_in_the_file_go_before_those_of_the_name(data, tmp_path):
    mean, std = torch.full((3, 1, 1), 0.25), torch.full((3, 1, 1), 0.125)
    network = DMWideResNet(10, 3, (16, 16, 32, 64), (1, 1, 1), statistics=((0.25,) * 3, (0.125,) * 3))
    path = stored(randomised(network), tmp_path / "file.pt", mean=mean, std=std)
    loaded, x = load_model(path, data, model="DMWideResNet-10-1"), data.part.x.float() / 255
    torch.testing.assert_close(loaded.model(x), network(x))


@pytest.mark.long
def test_a_model_of_the_zoo_brings_its_normalisation(data, tmp_path, monkeypatch):
    monkeypatch.setitem(ZOO, "Tiny2020Model", [("WideResNet-10-1", 100, "half"), ("WideResNet-10-1", 10, "cifar10")])
    path = stored(randomised(WideResNet(10, 3, 10, 1)), tmp_path / "file.pt")
    with pytest.raises(ModelError, match="does not say how images are normalised"):
        load_model(path, data, model="WideResNet-10-1")
    loaded = load_model(path, data, model="tiny2020model")
    assert loaded.spec["normalize"] == "cifar10"
    assert "images are normalised by cifar10, as RobustBench's tiny2020model" in loaded.notes
    assert load_model(path, data, model="Tiny2020Model", normalize="none").spec["normalize"] == "none"


def test_a_file_that_fits_none_of_them_is_told_against_the_nearest(data, tmp_path):
    path = stored(DMWideResNet(10, 3, (16, 32, 64, 128), (1, 1, 1)), tmp_path / "file.pt")
    with pytest.raises(
        ModelError, match=r"does not fit the model: .*batchnorm.bias is \[128\] in the file, \[64\] in the model"
    ):
        load_model(path, data, model="WideResNet-10-1", normalize="none")


# Training


@pytest.mark.parametrize("name", ["WideResNet-10-1", "WideResNet-10-1-silu", "DMWideResNet-10-1"])
def test_they_can_be_trained_and_folded_for_attacks(name, data, x):
    model = build(name, 10, 3)
    check_forward(model, name, x, 10)
    FoldedModel(model, x, torch.float32)  # compares the two


def test_a_network_for_color_images_says_so():
    with pytest.raises(ModelError, match="normalises images of 3 channels, not 1"):
        build("DMWideResNet-10-1", 10, 1)
