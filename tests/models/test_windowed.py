"""Logits from what a window reaches are those of the whole image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail.evaluation.exact_inference import BatchInvariance, FixedBatch, make_search_model
from robustmail.models.classifier import Classifier, build
from robustmail.models.folded import FoldedModel
from robustmail.models.windowed import KnownImages, Window

pytestmark = pytest.mark.numeric


def pooling(classes: int, channels: int) -> nn.Module:
    """Convolutions without padding and without BatchNorm, with pooling, strides and a kernel that is not square."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (3, 5), padding=(1, 2)), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 5, stride=3, padding=1), nn.LeakyReLU(), nn.AvgPool2d(2, 1), nn.Flatten(),
        nn.Linear(72, classes),
    )  # fmt: skip


def dilated(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 2, groups=2, stride=2), nn.SiLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


NETWORKS = {
    "pooling": (pooling, 1, (28, 28)),
    "dilated": (dilated, 3, (24, 37)),
    "small_cnn": ("small_cnn", 1, (28, 28)),
    "resnet": ("cifar_resnet18_w8", 3, (32, 32)),
    "resnet on rectangles": ("cifar_resnet18_w8", 3, (32, 21)),
    "preactivation": ("WideResNet-10-1", 3, (32, 32)),
}


@pytest.fixture(params=NETWORKS)
def folded(request) -> tuple[FoldedModel, torch.Tensor]:
    network, channels, size = NETWORKS[request.param]
    x = torch.rand(12, channels, *size)
    model = build(network, 10, channels).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return FoldedModel(model, x[:2], torch.float32).eval(), x


def windows(height: int, width: int, side: int) -> list[Window]:
    """In each corner, at each border, inside, and at odd and even places."""
    tops, lefts = ((0, 1, length // 2, length // 2 + 1, length - side) for length in (height, width))
    return [Window(top, left, side, side) for top in tops for left in lefts]


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
@torch.no_grad()
def test_a_changed_window_has_the_logits_of_the_changed_image(folded, side):
    model, x = folded
    known = KnownImages(model, x, side, least=8)
    assert known.is_faster
    some = torch.tensor([0, 3, 4, 11])
    for window in windows(*x.shape[2:], side):
        values = torch.rand(len(x), x.shape[1], side, side)
        for rows in (None, some):
            changed = (x if rows is None else x[rows]).clone()
            window.of_images(changed).copy_(values[: len(changed)])
            logits, expected = known(window, values[: len(changed)], rows), model(changed)
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
        accepted = torch.tensor([1, 3])  # of `some`: images 3 and 11
        known.accept(accepted)
        x[some[accepted]] = changed[accepted]


@torch.no_grad()
def test_images_that_are_kept_keep_their_activations(folded):
    model, x = folded
    known, window = KnownImages(model, x, 3), Window(4, 5, 3, 3)
    known.keep(torch.arange(12) % 3 == 0)
    values = torch.rand(4, x.shape[1], 3, 3)
    changed = x[::3].clone()
    window.of_images(changed).copy_(values)
    assert (known(window, values) - model(changed)).abs().max() < 1e-5 * model(changed).abs().max().clamp(min=1)
    whole = known(window, window.of_images(x[::3]).clone())
    assert (whole - model(x[::3])).abs().max() < 1e-5 * whole.abs().max().clamp(min=1), "a call alone changes nothing"


@pytest.mark.parametrize("layer", [nn.ReLU, nn.LeakyReLU, nn.SiLU])
@torch.no_grad()
def test_layers_that_write_into_their_input_leave_the_known_activations_alone(layer):
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), layer(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten(),
        nn.Linear(8 * 14 * 14, 10),
    )  # fmt: skip
    x = torch.rand(9, 1, 16, 16) - 0.5
    model = FoldedModel(Classifier(network).eval(), x[:2].clone(), torch.float32).eval()
    before, window, values = x.clone(), Window(3, 2, 2, 2), torch.rand(9, 1, 2, 2) - 0.5
    known = KnownImages(model, x, 2)
    changed = x.clone()
    window.of_images(changed).copy_(values)
    for _ in range(2):
        assert (known(window, values) - model(changed.clone())).abs().max() < 1e-5
    assert torch.equal(x, before)


@torch.no_grad()
def test_an_image_has_the_same_bits_in_calls_of_all_sizes(folded):
    model, x = folded
    search = make_search_model(model.model, x, 8)
    if not search.is_windowed:
        pytest.skip("this CPU's convolutions round otherwise in larger passes")
    x = torch.rand(40, *x.shape[1:])
    values, window = torch.rand(40, x.shape[1], 3, 3), Window(2, 7, 3, 3)
    passes = [FixedBatch(search.network, 8, search.batch_invariant, windowed=lambda: True) for _ in range(2)]
    whole = passes[0].known_images(x, 3)(window, values)
    for n in (1, 2, 7, 9, 23):
        assert torch.equal(passes[1].known_images(x[:n], 3)(window, values[:n]), whole[:n])


def test_a_network_of_global_layers_is_asked_about_whole_images():
    mixer = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(2, 1, 8, 8)
    search = make_search_model(Classifier(mixer).eval(), x, 8)
    assert isinstance(search.network, FoldedModel)
    assert not search.is_windowed
    passes = FixedBatch(search.network, 8, BatchInvariance.YES, windowed=lambda: True)
    assert passes.known_images(x, 2) is None
