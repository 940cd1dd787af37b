"""Logits from what a window reaches are those of the whole image."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustmail.evaluation.exact_inference import BatchInvariance, FixedBatch, make_search_model
from robustmail.models.classifier import Classifier, build
from robustmail.models.folded import FoldedModel
from robustmail.models.windowed import KnownImages

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


def places(height: int, width: int, side: int) -> torch.Tensor:
    """In each corner, at each border, inside, and at odd and even places: (top, left), [25, 2]."""
    tops, lefts = ((0, 1, length // 2, length // 2 + 1, length - side) for length in (height, width))
    return torch.tensor([(top, left) for top in tops for left in lefts]).clamp(min=0)


def put(x: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The images with values [R, C, side, side] in a square of each."""
    changed, side = x.clone(), values.shape[-1]
    for image, (top, left), square in zip(changed, place, values, strict=True):
        image[:, top : top + side, left : left + side] = square
    return changed


def is_close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((logits - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
@torch.no_grad()
def test_changed_squares_have_the_logits_of_the_changed_images(folded, side):
    model, x = folded
    known = KnownImages(model, x, side, least=8)
    assert known.is_faster
    where = places(*x.shape[2:], side)
    for rows in (torch.arange(12), torch.tensor([0, 3, 4, 11]), torch.tensor([5, 5, 2, 5, 2])):
        place = where[torch.randperm(len(where))[: len(rows)]]
        values = torch.rand(len(rows), x.shape[1], side, side)
        assert is_close(known(place, values, rows), model(put(x[rows], place, values)))
    accepted = torch.tensor([2, 3])  # of `rows`: images 2 and 5
    known.accept(accepted)
    x[rows[accepted]] = put(x[rows[accepted]], place[accepted], values[accepted])
    image = torch.arange(25) % 12  # each place once, in images whose activations have been changed
    values = torch.rand(25, x.shape[1], side, side)
    assert is_close(known(where, values, image), model(put(x[image], where, values)))


@torch.no_grad()
def test_images_that_are_kept_keep_their_activations(folded):
    model, x = folded
    known, place = KnownImages(model, x, 3), torch.tensor([4, 5]).expand(4, 2)
    known.keep(torch.arange(12) % 3 == 0)
    values = torch.rand(4, x.shape[1], 3, 3)
    assert is_close(known(place, values, torch.arange(4)), model(put(x[::3], place, values)))
    whole = known(place, x[::3, :, 4:7, 5:8].clone(), torch.arange(4))
    assert is_close(whole, model(x[::3])), "a call alone changes nothing"


@pytest.mark.parametrize("layer", [nn.ReLU, nn.LeakyReLU, nn.SiLU])
@torch.no_grad()
def test_layers_that_write_into_their_input_leave_the_known_activations_alone(layer):
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), layer(inplace=True), nn.Conv2d(8, 8, 3), nn.Flatten(),
        nn.Linear(8 * 14 * 14, 10),
    )  # fmt: skip
    x = torch.rand(9, 1, 16, 16) - 0.5
    model = FoldedModel(Classifier(network).eval(), x[:2].clone(), torch.float32).eval()
    before, place, values = x.clone(), torch.tensor([3, 2]).expand(9, 2), torch.rand(9, 1, 2, 2) - 0.5
    known = KnownImages(model, x, 2)
    for _ in range(2):
        assert is_close(known(place, values, torch.arange(9)), model(put(x, place, values)))
    assert torch.equal(x, before)


@torch.no_grad()
def test_an_activation_that_a_layer_reads_twice_is_computed_as_a_whole():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.linear = nn.Linear(4 * 144, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).relu()
            x = (self.second(x) + x).relu()
            return self.linear((x + x).flatten(1))

    x = torch.rand(9, 1, 12, 12)
    model = FoldedModel(Classifier(Twice()).eval(), x[:2].clone(), torch.float32).eval()
    place, values = torch.tensor([3, 2]).expand(9, 2), torch.rand(9, 1, 2, 2)
    known = KnownImages(model, x, 2)
    assert is_close(known(place, values, torch.arange(9)), model(put(x, place, values)))


@torch.no_grad()
def test_an_image_has_the_same_bits_in_calls_of_all_sizes(folded):
    model, x = folded
    search = make_search_model(model.model, x, 8)
    if not search.is_windowed:
        pytest.skip("this CPU's convolutions round otherwise in larger passes")
    x, rows = torch.rand(40, *x.shape[1:]), torch.arange(40)
    values, place = torch.rand(40, x.shape[1], 3, 3), torch.randint(0, 18, (40, 2))
    passes = [FixedBatch(search.network, 8, search.batch_invariant, windowed=lambda: True) for _ in range(2)]
    whole = passes[0].known_images(x, 3)(place, values, rows)
    for n in (1, 2, 7, 9, 23):
        few = passes[1].known_images(x[:n], 3)(place[:n], values[:n], rows[:n])
        assert torch.equal(few, whole[:n])


def test_a_network_of_global_layers_is_asked_about_whole_images():
    mixer = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(2, 1, 8, 8)
    search = make_search_model(Classifier(mixer).eval(), x, 8)
    assert isinstance(search.network, FoldedModel)
    assert not search.is_windowed
    passes = FixedBatch(search.network, 8, BatchInvariance.YES, windowed=lambda: True)
    assert passes.known_images(x, 2) is None
