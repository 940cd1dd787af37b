"""Splitting, shuffling and augmenting: exact, seeded, and per example."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from robustmail.data.dataset import ImageData, Split, batch_indices, hold_out, to_float
from robustmail.errors import DataError
from robustmail.train.batches import crops_and_flips

COUNTS = (70, 41, 23, 5)


def augment(x: torch.Tensor, pad: int, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """The augmentation of a data source, on bytes."""
    floats, targets = to_float(x), torch.zeros(len(x), 2)
    for augmentation in crops_and_flips(pad, flip):
        floats, targets = augmentation(floats, targets, rng)
    return (floats * 255).round().to(torch.uint8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(n: int, *shape: int) -> Split:
    """Images whose first pixels spell their index, of the classes COUNTS in a shuffled order."""
    x = torch.zeros(n, *(shape or (1, 2, 2)), dtype=torch.uint8)
    x.view(n, -1)[:, 0], x.view(n, -1)[:, 1] = torch.arange(n) // 256, torch.arange(n) % 256
    y = torch.cat([torch.full((count,), i) for i, count in enumerate(COUNTS)])
    return Split(x, y[torch.randperm(len(y), generator=rng(7))[torch.arange(n) % len(y)]])


def data(n: int = sum(COUNTS), **changes: Any) -> ImageData:
    return replace(ImageData("mine", numbered(n), numbered(4), classes=len(COUNTS)), **changes)


def identities(part: Split) -> list[int]:
    first, second = part.x.flatten(1)[:, :2].long().unbind(1)
    return (first * 256 + second).tolist()


@pytest.mark.parametrize("wanted", [1, 7, 20, 69, 138])
def test_every_class_gives_its_share_to_the_validation_set_to_within_one_image(wanted: int) -> None:
    train, validation = hold_out(data(validation=wanted), seed=3)
    assert len(validation.y) == wanted
    given = Counter(validation.y.tolist())
    for label, count in enumerate(COUNTS):
        assert abs(given[label] - count * wanted / sum(COUNTS)) <= 1
    assert given + Counter(train.y.tolist()) == Counter(dict(enumerate(COUNTS)))


def test_the_two_parts_are_disjoint_and_complete_and_keep_their_labels() -> None:
    images = data(validation=30)
    train, validation = hold_out(images, seed=3)
    assert sorted(identities(train) + identities(validation)) == list(range(sum(COUNTS)))
    for part in (train, validation):
        assert part.y.tolist() == images.train.y[identities(part)].tolist()


def test_the_seed_alone_decides_what_is_held_out() -> None:
    images = data(validation=30)
    held = identities(hold_out(images, seed=3)[1])
    torch.manual_seed(99)
    assert identities(hold_out(images, seed=3)[1]) == held
    assert identities(hold_out(images, seed=4)[1]) != held


@pytest.mark.parametrize(("n", "held"), [(40, 20), (41, 20), (2000, 1000), (2600, 1000)])
def test_a_thousand_images_are_held_out_by_default_but_never_more_than_half(n: int, held: int) -> None:
    assert [len(part.y) for part in hold_out(data(n), seed=1)] == [n - held, held]


@pytest.mark.parametrize("wanted", [0, -1, 139, 140])
def test_holding_out_nothing_or_everything_is_refused_with_a_number_that_works(wanted: int) -> None:
    with pytest.raises(DataError, match=rf"mine \(given validation={wanted}\): train has 139 images") as caught:
        hold_out(data(validation=wanted), seed=1)
    advised = int(caught.value.todo.removeprefix("Set the source's validation=").rstrip("."))
    assert len(hold_out(data(validation=advised), seed=1)[1].y) == advised


def test_the_advice_works_for_few_images_too() -> None:
    with pytest.raises(DataError) as caught:
        hold_out(data(5, validation=5), seed=1)
    advised = int(caught.value.todo.removeprefix("Set the source's validation=").rstrip("."))
    assert len(hold_out(data(5, validation=advised), seed=1)[1].y) == advised


@pytest.mark.parametrize(
    ("n", "size", "sizes"),
    [
        pytest.param(12, 4, [4, 4, 4], id="even"),
        pytest.param(14, 4, [4, 4, 4, 2], id="short last batch"),
        pytest.param(13, 4, [4, 4, 5], id="a last one joins its neighbour"),
        pytest.param(5, 4, [5], id="a last one joins the only other"),
        pytest.param(3, 8, [3], id="fewer than a batch"),
        pytest.param(1, 8, [1], id="one image in all"),
    ],
)
def test_batches_cover_every_index_once_and_leave_none_alone(n: int, size: int, sizes: list[int]) -> None:
    found = batch_indices(n, size, rng())
    assert [len(batch) for batch in found] == sizes
    assert torch.cat(found).sort().values.tolist() == list(range(n))


def test_the_order_of_the_batches_is_random_and_the_generators() -> None:
    first, same, other = (torch.cat(batch_indices(50, 8, rng(seed))).tolist() for seed in (0, 0, 1))
    assert first == same
    assert first != other
    assert first != sorted(first)


def unlike(n: int, height: int, width: int, channels: int = 2) -> Tensor:
    """Images in which no two pixels are alike and none is zero."""
    x = torch.arange(1, height * width + 1).view(1, 1, height, width) + 50 * torch.arange(channels).view(1, -1, 1, 1)
    return (x + torch.arange(n).view(-1, 1, 1, 1)).byte()


def cropped(image: Tensor, pad: int, top: int, left: int, mirrored: bool) -> Tensor:
    """The reference, pixel by pixel: a crop of [C, H, W] from its zero-padded self, then mirrored."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for row, column in product(range(height), range(width)):
        r, c = row + top - pad, column + left - pad
        if 0 <= r < height and 0 <= c < width:
            result[:, row, width - 1 - column if mirrored else column] = image[:, r, c]
    return result


def draws(x: Tensor, out: Tensor, pad: int) -> list[tuple[int, int, bool]]:
    """For each example the one (top, left, mirrored) that made it."""
    places = list(product(range(2 * pad + 1), range(2 * pad + 1), (False, True)))
    found = [[p for p in places if torch.equal(cropped(a, pad, *p), b)] for a, b in zip(x, out, strict=True)]
    assert all(len(choices) == 1 for choices in found)
    return [choice for (choice,) in found]


@pytest.mark.parametrize(("height", "width"), [(5, 5), (4, 7)], ids=["square", "not square"])
def test_every_example_is_its_own_crop_of_the_zero_padded_image_perhaps_mirrored(height: int, width: int) -> None:
    x = unlike(60, height, width)
    out = augment(x, pad=1, flip=True, rng=rng())
    assert (out.shape, out.dtype) == (x.shape, torch.uint8)
    tops, lefts, mirrored = zip(*draws(x, out, pad=1), strict=True)
    assert set(tops) == set(lefts) == {0, 1, 2}
    assert 15 <= sum(mirrored) <= 45
    assert len(set(zip(tops, lefts, mirrored, strict=True))) == 18  # the three draws are independent


def test_crops_reach_the_corners_of_the_padding() -> None:
    x = unlike(50, 5, 5)
    tops, lefts, mirrored = zip(*draws(x, augment(x, pad=2, flip=False, rng=rng()), pad=2), strict=True)
    assert set(tops) == set(lefts) == set(range(5))
    assert not any(mirrored)


def test_flipping_without_padding_mirrors_about_half_of_the_images() -> None:
    x = unlike(60, 3, 4)
    out = augment(x, pad=0, flip=True, rng=rng())
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(x, out, strict=True)]
    assert 15 <= sum(mirrored) <= 45
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, x, out, strict=True))


def test_the_same_generator_makes_the_same_draws_and_another_makes_others() -> None:
    x = unlike(60, 4, 7)
    first, same, other = (augment(x, pad=2, flip=True, rng=rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_without_padding_and_flipping_nothing_happens() -> None:
    x = unlike(9, 4, 7)
    assert torch.equal(augment(x, pad=0, flip=False, rng=rng()), x)


def test_augmenting_leaves_the_stored_images_alone() -> None:
    x = unlike(9, 4, 7)
    before = x.clone()
    augment(x, pad=2, flip=True, rng=rng())
    assert torch.equal(x, before)


GOOD = numbered(6, 3, 4, 5)


@pytest.mark.parametrize(
    ("part", "fragment"),
    [
        pytest.param(Split(GOOD.x.float() / 255, GOOD.y), "images are float32, expected bytes", id="floats"),
        pytest.param(Split(GOOD.x[:, 0], GOOD.y), "images have shape [6, 4, 5]", id="no channels"),
        pytest.param(Split(GOOD.x[:0], GOOD.y[:0]), "with at least one image", id="nothing"),
        pytest.param(Split(GOOD.x, GOOD.y[:5]), "6 images but labels of shape [5]", id="a label too few"),
        pytest.param(Split(GOOD.x, GOOD.y[:, None]), "6 images but labels of shape [6, 1]", id="a column of labels"),
        pytest.param(Split(GOOD.x, GOOD.y + 4), "outside the 4 classes 0 ... 3", id="labels too large"),
        pytest.param(Split(GOOD.x, GOOD.y - 4), "labels span -4", id="negative labels"),
        pytest.param(Split(GOOD.x, GOOD.y.float()), "labels are float32", id="float labels"),
        pytest.param(Split(GOOD.x, GOOD.y.int()), "labels are int32", id="int32 labels"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_the_wrong_kind_are_refused_with_the_split_named(split: str, part: Split, fragment: str) -> None:
    good = ImageData("mine", GOOD, GOOD, classes=4)
    with pytest.raises(DataError) as caught:
        replace(good, **{split: part})
    assert f"mine ({split}): " in str(caught.value)
    assert fragment in str(caught.value)


def test_training_and_test_images_of_different_sizes_are_refused() -> None:
    with pytest.raises(DataError, match=r"training images are \[3, 4, 5\], test images \[3, 5, 4\]"):
        ImageData("mine", GOOD, numbered(6, 3, 5, 4), classes=4)


def test_a_fingerprint_tells_one_changed_pixel_or_label() -> None:
    whole = ImageData("mine", GOOD, GOOD, classes=4)
    x, y = GOOD.x.clone(), GOOD.y.clone()
    x[5, 2, 3, 4] ^= 1
    y[5] = (y[5] + 1) % 4
    prints = {replace(whole, test=part).fingerprint for part in (GOOD, Split(x, GOOD.y), Split(GOOD.x, y))}
    assert len(prints) == 3
    assert replace(whole, name="yours").fingerprint == whole.fingerprint
