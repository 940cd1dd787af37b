"""The networks are the published ones, take any class count and channels, and sit in a Classifier that normalises."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from robustmail import catalog
from robustmail.errors import ModelError
from robustmail.models.classifier import Classifier, build, check_forward, check_name
from robustmail.models.folded import FoldedModel
from robustmail.models.wide_resnet import cifar_wrn32_10, cifar_wrn34_10

REGISTERED = sorted(catalog.catalog_entries("models"))
LARGE = {
    "cifar_wrn34_10", "cifar_wrn32_10", "cifar_wrn28_10", "cifar_resnet18", "cifar_resnet18_silu",
    "cifar_preact_resnet18", "cifar_preact_resnet18_silu",
}  # fmt: skip


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("cifar_resnet18", 10, 11_173_962),
        ("cifar_resnet18", 100, 11_220_132),
        ("cifar_wrn34_10", 10, 46_160_474),
        ("cifar_wrn34_10", 100, 46_218_164),
        ("cifar_wrn32_10", 10, 46_160_474),
        ("cifar_wrn28_10", 10, 36_479_194),
        ("cifar_preact_resnet18", 10, 11_172_170),
        ("cifar_preact_resnet18_silu", 10, 11_172_170),
        ("cifar_wrn28_10_silu", 10, 36_479_194),
        ("cifar_wrn70_16", 10, 266_796_506),
        ("cifar_wrn70_16_silu", 10, 266_796_506),
        ("cifar_wrn40_2", 10, 2_243_546),
    ],
)
def test_the_networks_have_as_many_parameters_as_published(name: str, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert size(build(name, classes, 3)) == parameters


@pytest.mark.parametrize("knobs", [{"num_classes": 7, "in_chans": 1}, {"depth": 10, "width": 2}], ids=["head", "size"])
def test_the_papers_wrn32_is_wrn34_under_another_name(knobs: dict[str, int]) -> None:
    with torch.device("meta"):
        one, other = cifar_wrn34_10(**knobs), cifar_wrn32_10(**knobs)
    assert str(one) == str(other)


@pytest.mark.numeric
def test_cifar_resnet18_is_torchvisions_resnet18_with_a_small_stem() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = nn.Identity()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, so that a BatchNorm in the wrong place shows
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    ours = timm.create_model("cifar_resnet18", num_classes=10)
    theirs = {
        k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in reference.state_dict().items()
    }
    ours.load_state_dict(theirs)  # strict: the same tensors, no more and no fewer
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        for mode in (False, True):  # in train mode the batch's own statistics are used
            expected, actual = reference.train(mode)(x), ours.train(mode)(x)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
            assert expected.std() > 1e-3


def test_every_model_of_the_catalogue_is_registered_in_timm_and_no_other() -> None:
    check_name("small_cnn")  # imports, and so registers, all of them
    ours = {name for name in timm.list_models() if name.startswith(("cifar_", "small_cnn"))}
    of_any_size = {name for name in ours if re.fullmatch(r"cifar_wrn\d+_\d+(_silu)?", name)}  # on demand
    assert set(REGISTERED) <= ours <= {*REGISTERED, *of_any_size}


@pytest.mark.parametrize(
    ("name", "like", "act"),
    [
        ("cifar_wrn16_1_silu", "cifar_wrn16_1", nn.SiLU),
        ("cifar_preact_resnet18_silu", "cifar_preact_resnet18", nn.SiLU),
        ("cifar_resnet18_silu", "cifar_resnet18", nn.SiLU),
        ("cifar_wrn10_1", "cifar_wrn10_1", nn.ReLU),
    ],
)
def test_another_activation_changes_no_tensor_and_every_activation(name: str, like: str, act: type[nn.Module]) -> None:
    with torch.device("meta"):
        network, relu = build(name, 10, 3), build(like, 10, 3)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in relu.state_dict().items()}
    acts = [m for m in network.modules() if isinstance(m, (nn.ReLU, nn.SiLU))]
    assert len(acts) > 3
    assert all(isinstance(m, act) for m in acts)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cifar_wrn30_10", "cifar_wrn28_10"),
        ("cifar_wrn32_2", "cifar_wrn34_2"),
        ("cifar_wrn71_16_silu", "cifar_wrn70_16_silu"),
        ("cifar_wrn4_2", "cifar_wrn10_2"),
        ("cifar_wrn28_0", "cifar_wrn28_1"),
        ("cifar_wrn999999_999999", "cifar_wrn1000_100"),
        ("cifar_wrn028_10", "cifar_wrn28_10"),
    ],
)
def test_a_wide_resnet_of_a_size_that_there_is_not_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ModelError, match=rf"depths are 6n \+ 4, .* The nearest is '{near}'"):
        check_name(name)
    check_name(near)


def test_a_name_that_only_looks_like_a_wide_resnet_is_still_met_with_the_nearest_name() -> None:
    with pytest.raises(ModelError, match=r"Did you mean .cifar_wrn28_10.\?"):
        check_name("cifar_wrn28-10")


def test_a_wide_resnet_of_any_size_trains_and_gives_a_new_head() -> None:
    network = build("cifar_wrn10_1_silu", 7, 1)
    network(torch.rand(2, 1, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert timm.create_model("cifar_wrn10_1_silu", num_classes=4).get_classifier().out_features == 4


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("name", sorted(set(REGISTERED) - LARGE))
def test_the_narrow_models_run_on_any_number_of_classes_and_channels(name: str, classes: int, channels: int) -> None:
    model = build(name, classes, channels)
    for height, width in ((32, 32), (24, 32)):
        logits = model(torch.rand(2, channels, height, width))
        assert logits.shape == (2, classes)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(LARGE))
def test_the_large_models_take_other_classes_channels_and_shapes_too(name: str) -> None:
    with torch.device("meta"):
        assert build(name, 2, 1)(torch.empty(2, 1, 24, 32)).shape == (2, 2)


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_the_small_cnn_takes_images_from_8x8_to_64x64(side: int) -> None:
    logits = build("small_cnn", 10, 1)(torch.rand(2, 1, side, side))
    assert logits.shape == (2, 10)
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", sorted(set(REGISTERED) - LARGE))
def test_timms_interface_gives_features_and_a_new_head(name: str) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(x), model.get_classifier()(model.forward_head(model.forward_features(x), pre_logits=True)))
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model.num_features == model.get_classifier().in_features


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_classifier_returns_float32_logits_at_least(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(dtype)
    logits = Classifier(net)(torch.rand(2, 3, 2, 2).to(dtype))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.4, 0.5, 0.6), (0.2, 0.3, 0.1)), ((0.5,), (0.25,))], ids=["per channel", "one for all"]
)
def test_normalising_inside_equals_normalising_by_hand(
    batch: tuple[torch.Tensor, torch.Tensor], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    model = build("small_cnn", 10, 3, (mean, std)).eval()
    shift, scale = (torch.tensor(v).expand(3).view(1, 3, 1, 1) for v in (mean, std))
    by_hand = model.net((batch[0] - shift) / scale)
    assert torch.equal(model(batch[0]), by_hand)
    assert not torch.equal(by_hand, model.net(batch[0]))


def test_without_normalisation_the_network_sees_the_image_itself(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = build("small_cnn", 10, 3).eval()
    assert torch.equal(model(batch[0]), model.net(batch[0]))


def test_normalisation_is_no_weight_so_a_checkpoint_fits_with_or_without_it() -> None:
    plain, normalised = build("small_cnn", 10, 1), build("small_cnn", 10, 1, ((0.5,), (0.5,)))
    normalised.load_state_dict(plain.state_dict())
    assert normalised.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "normalize",
    [((0.5, 0.5), (1.0, 1.0)), ((0.5, 0.5, 0.5), (1.0, 1.0)), ((), ()), ((0.5,) * 4, (1.0,) * 4)],
    ids=["two", "three and two", "none", "four"],
)
def test_a_normalisation_of_another_number_of_channels_is_refused(normalize: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(ModelError, match="one mean and one std for each of 3 channels"):
        build("small_cnn", 10, 3, normalize)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cifar_resnet81", "Did you mean 'cifar_resnet18'?"),
        ("smallcnn", "Did you mean 'small_cnn'?"),
        ("resnet26td", "Did you mean 'resnet26t'?"),
        ("qqqqqqqq", "Ours are cifar_preact_resnet18, "),
    ],
    ids=["ours", "ours without a hyphen", "timm's", "nothing like it"],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(name, 10, 3)
    assert f"model='{name}': no such model. {near}" in str(caught.value)


def test_a_stock_timm_model_works() -> None:
    model = build("test_resnet", 7, 1, ((0.5,), (0.5,)))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def test_a_function_of_classes_and_channels_is_a_model_too() -> None:
    model = build(lambda classes, channels: nn.Sequential(nn.Flatten(), nn.Linear(channels * 4, classes)), 5, 2)
    assert isinstance(model, Classifier)
    assert model(torch.rand(3, 2, 2, 2)).shape == (3, 5)


class Viewed(nn.Module):
    """A network that flattens with view, which channels-last tensors do not allow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(4 * 8 * 8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(x)).view(-1, 4 * 8 * 8))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_network_that_needs_plain_strides_gets_them(channels: int) -> None:
    net, x = Viewed(channels).eval(), torch.rand(6, channels, 16, 16)
    expected = net(x)
    model = Classifier(copy.deepcopy(net)).eval()
    assert torch.equal(model(x), expected)
    assert model.memory_format == torch.contiguous_format
    for given in (x, x.to(memory_format=torch.channels_last), torch.empty_strided(x.shape, x.mT.stride()).copy_(x)):
        assert torch.equal(model(given), expected)
    with pytest.raises(ModelError, match="plain strides"):
        FoldedModel(model, x)
    check_forward(Classifier(net), "viewed", x, 10)


def test_channels_last_stays_where_it_works_and_other_errors_are_as_they_were() -> None:
    model = build("small_cnn", 10, 3).eval()
    model(torch.rand(2, 3, 32, 32))
    assert model.memory_format == torch.channels_last
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.rand(2, 5, 32, 32))
    assert model.memory_format == torch.channels_last
