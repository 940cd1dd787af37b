"""Augmentations do what their formulas say, for each image by itself, from draws that are the same everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from robustmail import (
    IDBH,
    PGD,
    TRADES,
    AutoAugment,
    Crop,
    CropShift,
    CutMix,
    Cutout,
    Flip,
    Mixup,
    RandAugment,
    Recipe,
    Stairs,
    digits,
)
from robustmail.augmentations.draws import beta
from robustmail.augmentations.image_operations import OPERATIONS, apply_chosen
from robustmail.augmentations.policies import _erased
from robustmail.augmentations.policy_tables import CIFAR10, RAND_AUGMENT, SVHN, policy_strength
from robustmail.config.overrides import apply_overrides
from robustmail.data.dataset import ImageData, Split, to_float
from robustmail.errors import PluginError, RecipeError
from robustmail.fields import describe, flatten
from robustmail.functional import one_hot
from robustmail.train.batches import augment_batch, augmentation_text, draw_batch
from robustmail.train.dry_run import dry_run

SHIPPED = [
    Crop(3), Flip(), Cutout(5), CutMix(), CutMix(alpha=0.3, p=0.5), Mixup(0.4), RandAugment(2, 14),
    AutoAugment("cifar10"), AutoAugment("svhn"), CropShift(0, 9), IDBH("weak"), IDBH("strong"),
]  # fmt: skip
EACH = pytest.mark.parametrize("augmentation", SHIPPED, ids=str)
recipe = Recipe(
    data=digits(), model="small_cnn", attack=PGD(eps=0.1, alpha=0.05, steps=2), objective=TRADES(), epochs=1
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 64, channels: int = 3, height: int = 16, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randint(256, (n, channels, height, width), generator=rng(1)) / 255
    return x, one_hot(torch.arange(n) % 10, 10)


@EACH
@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_in_the_box_targets_stay_probabilities_and_the_draws_are_the_generators(augmentation, n, channels):
    x, targets = images(n, channels)
    before = x.clone()
    found, mixed = augmentation(x, targets, rng())
    assert found.shape == x.shape
    assert 0 <= found.min() <= found.max() <= 1
    assert torch.allclose(mixed.sum(1), torch.ones(n))
    assert torch.equal(x, before)
    assert all(map(torch.equal, (found, mixed), augmentation(x, targets, rng())))
    assert (mixed is targets) == (not isinstance(augmentation, (CutMix, Mixup)))


@EACH
def test_equal_images_of_a_batch_become_different_ones(augmentation):
    x, targets = images(2)
    x, targets = x.repeat(32, 1, 1, 1), targets.repeat(32, 1)
    found, _ = augmentation(x, targets, rng())
    assert len({tuple(image.flatten().tolist()) for image in found[::2]}) > 1
    assert not torch.equal(found, augmentation(x, targets, rng(1))[0])


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_are_what_the_data_source_does_to_the_bit(flip):
    train = Split(torch.randint(256, (50, 3, 16, 12), dtype=torch.uint8), torch.arange(50) % 10)
    data = ImageData("toy", train, train, 10, pad=2, flip=flip)
    own = recipe.but(augment=(Crop(2), *[Flip()] * flip))
    for position in ((0, 0), (3, 1)):
        batch, same = (draw_batch(r, data, train, torch.arange(20), position) for r in (recipe, own))
        assert torch.equal(batch.x, same.x)
        assert batch.x.stride() == same.x.stride()
        assert batch.targets is same.targets is None
    assert torch.equal(
        draw_batch(recipe.but(augment=()), data, train, torch.arange(20), (0, 0)).x, to_float(train.x[:20])
    )


def test_cutout_is_a_black_square_that_the_border_cuts():
    x = torch.ones(400, 3, 16, 12)
    black = Cutout(5)(x, images(400)[1], rng())[0] == 0
    assert torch.equal(black.all(1), black.any(1))
    seen = set()
    for image in black[:, 0]:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        assert image.sum() == (bottom - top) * (right - left)  # a full box
        assert bottom - top == 5 or (top == 0 and bottom >= 3) or (bottom == 16 and top <= 13)
        assert right - left == 5 or (left == 0 and right >= 3) or (right == 12 and left <= 9)
        seen.add((int(bottom - top), int(right - left)))
    assert seen == {(h, w) for h in (3, 4, 5) for w in (3, 4, 5)}


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_share_of_pixels_of_cutmix_is_the_share_of_the_label_exactly(alpha):
    n = 256  # image i has the colour i and the class i
    x, targets = (torch.arange(n) / 255)[:, None, None, None].expand(n, 3, 16, 12), torch.eye(n)
    found, mixed = CutMix(alpha=alpha)(x, targets, rng())
    colours = (found * 255).round().long()
    assert torch.equal(colours[:, 0], colours[:, 2])
    for i in range(n):
        counts = torch.bincount(colours[i, 0].flatten(), minlength=n).to(torch.float32) / (16 * 12)
        if mixed[i, i] < 1:  # not pasted into itself
            assert torch.equal(mixed[i], counts)
    assert 0.2 < 1 - mixed.diagonal().mean() < 0.5
    untouched, hard = CutMix(p=0.0)(x, targets, rng())
    assert torch.equal(untouched, x)
    assert torch.equal(hard, targets)


def test_mixup_is_linear_in_images_and_labels_with_one_lambda_for_both():
    n = 64
    x = torch.eye(n)[:, None, :, None].expand(n, 3, n, 2)  # an image is its label
    found, mixed = Mixup(0.4)(x, torch.eye(n), rng())
    assert torch.allclose(found, mixed[:, None, :, None].expand_as(x))
    assert (mixed > 0).sum(1).max() == 2
    lam = mixed.diagonal()[(mixed > 0).sum(1) == 2]
    assert len(lam.unique()) > n / 2


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_has_the_mean_and_variance_ofbeta(alpha):
    lam = beta(alpha, 20_000, rng())
    variance = 1 / (4 * (2 * alpha + 1))
    assert lam.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(variance / 20_000))
    assert lam.var().item() == pytest.approx(variance, rel=0.05)


def test_crop_shift_moves_a_crop_within_the_old_frame():
    x = torch.arange(1, 193).view(1, 1, 16, 12).expand(500, 3, 16, 12) / 255
    found = (CropShift(0, 7)(x, images(500)[1], rng())[0] * 255).round().long()[:, 0]
    lost = set()
    for image in found:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        box = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        first = int(box[0, 0]) - 1
        top, left = first // 12, first % 12
        original = torch.arange(1, 193).view(16, 12)[top : top + box.shape[0], left : left + box.shape[1]]
        assert torch.equal(box, original)
        lost.add(16 - box.shape[0] + 12 - box.shape[1])
    assert lost == set(range(7))


def test_crop_shift_leaves_something_of_an_image_that_is_smaller_than_its_crops():
    x = torch.ones(200, 1, 4, 4)
    assert (CropShift(0, 11)(x, images(200)[1], rng())[0].flatten(1).sum(1) >= 1).all()


def test_random_erasing_blackens_one_box_of_torchvisions_sizes():
    x = torch.ones(2000, 1, 32, 32)
    black = _erased(x, 1.0, rng())[:, 0] == 0
    share = black.flatten(1).double().mean(1)
    for image in black[:200]:
        rows, columns = image.any(1).nonzero().flatten(), image.any(0).nonzero().flatten()
        assert image.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert 0.01 < share.min() < 0.03
    assert 0.31 < share.max() < 0.35
    half = (_erased(x, 0.5, rng()) == 0).flatten(1).any(1).double().mean()
    assert half.item() == pytest.approx(0.5, abs=0.05)


def test_the_policies_are_torchvisions():
    names = {"ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y"}
    for policy, ours in ((v2.AutoAugmentPolicy.CIFAR10, CIFAR10), (v2.AutoAugmentPolicy.SVHN, SVHN)):
        theirs = [[(names.get(n, n.lower()), p, (m or 0) / 9) for n, p, m in pair]
                  for pair in v2.AutoAugment(policy)._policies]  # fmt: skip
        assert [[tuple(choice) for choice in pair] for pair in ours] == theirs


NAMES = {"centred_shear_x": None, "centred_shear_y": None}
TORCHVISION = {name.title().replace("_", "").replace("Autocontrast", "AutoContrast"): name
               for name in OPERATIONS if name not in NAMES}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), TORCHVISION.items())
@pytest.mark.parametrize(("level", "sign"), [(14 / 30, 1), (14 / 30, -1), (1.0, 1), (0.0, 1)])
def test_an_operation_is_torchvisions_at_the_same_strength(theirs, ours, level, sign, real_images):
    x, _ = real_images
    strength = policy_strength(ours, level, sign, (32, 32))
    made = OPERATIONS[ours](x, torch.full((len(x),), strength))
    library = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    given, scale = (x, 1) if ours in (*BLENDS, "autocontrast") else ((x * 255).round().byte(), 255)  # not rounded
    magnitude = strength - 1 if ours in BLENDS else strength
    expected = torch.stack(
        [
            library._apply_image_or_video_transform(image, theirs, magnitude, InterpolationMode.NEAREST, library._fill)
            for image in given
        ]
    )
    close = (made - expected / scale).abs() < 1e-5
    assert close.double().mean() > (0.985 if ours in WARPS else 0.999)  # two pixels may be at the same distance


BLENDS, WARPS = ("brightness", "color", "contrast", "sharpness"), ("shear_x", "shear_y", "rotate")


def test_strengths_are_torchvisions_in_randaugment():
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert [TORCHVISION[name] for name in space] == list(RAND_AUGMENT)
    for name, (magnitudes, signed) in space.items():
        scale = magnitudes(31, 32, 32)
        for m in (0, 9, 14, 30) if scale is not None else ():
            ours = policy_strength(TORCHVISION[name], m / 30, 1, (32, 32)) - (TORCHVISION[name] in BLENDS)
            theirs = float(scale[m])
            assert ours == pytest.approx(int(theirs) if "Translate" in name else theirs, abs=1e-6)
        assert signed == (policy_strength(TORCHVISION[name], 0.5, 1, (32, 32))
                          != policy_strength(TORCHVISION[name], 0.5, -1, (32, 32)))  # fmt: skip


def test_each_image_gets_its_own_operation_at_its_own_strength(real_images):
    x = real_images[0][:6]
    chosen = ["rotate", "identity", "color", "rotate", "equalize", "color"]
    strength = torch.tensor([10.0, 0.0, 0.5, -20.0, 0.0, 1.5])
    together = apply_chosen(x, chosen, strength)
    for i, name in enumerate(chosen):
        assert torch.equal(together[i], OPERATIONS[name](x[i : i + 1], strength[i : i + 1])[0])
    assert torch.equal(together[1], x[1])


def test_a_mixed_image_has_the_class_of_its_larger_share_and_its_own_at_a_tie():
    def mix(x, targets, rng):
        share = torch.tensor([0.3, 0.5, 0.7])[:, None]
        return x, (1 - share) * targets + share * targets.roll(1, 0)

    batch = augment_batch(recipe.but(augment=mix, label_smoothing=0.2), *three(), 10, rng())
    assert batch.y.tolist() == [7, 2, 2]
    expected = torch.full((3, 10), 0.02)
    for row, (own, other, share) in enumerate(((7, 5, 0.3), (2, 7, 0.5), (5, 2, 0.7))):
        expected[row, own] += 0.8 * (1 - share)
        expected[row, other] += 0.8 * share
    assert torch.allclose(batch.targets, expected)


def three():
    return torch.rand(3, 1, 8, 8), torch.tensor([7, 2, 5])


def test_labels_stay_hard_where_nothing_mixes_or_smooths_them():
    assert augment_batch(recipe.but(augment=(Flip(), Cutout(3))), *three(), 10, rng()).targets is None
    smooth = augment_batch(recipe.but(label_smoothing=0.1), *three(), 10, rng())
    assert torch.allclose(smooth.targets, 0.9 * one_hot(three()[1], 10) + 0.01)
    assert torch.equal(smooth.y, three()[1])


def test_one_augmentation_is_a_tuple_of_one_and_its_fields_are_paths():
    assert recipe.but(augment=CutMix()).augment == recipe.but(augment=[CutMix()]).augment == (CutMix(),)
    made = apply_overrides(recipe, ["augment=CutMix"])
    assert made.augment == (CutMix(),)
    made = apply_overrides(recipe, ["augment=(Crop(2), CutMix(p=0.5))", "augment.1.alpha=0.3", "augment.0.pad=1"])
    assert made.augment == (Crop(1), CutMix(alpha=0.3, p=0.5))
    paths = flatten(made)
    assert (paths["augment.0"], paths["augment.1.alpha"], "augment" in paths) == ("Crop", "0.3", False)
    assert flatten(recipe)["augment"] == "None"
    assert describe(made.augment) == "(Crop(pad=1), CutMix(alpha=0.3, p=0.5))"


def test_fields_of_augmentations_may_be_schedules():
    made = recipe.but(augment=(Cutout(Stairs({0: 2, 5: 4})), Flip()), epochs=9)
    assert [made.at(epoch).augment[0].size for epoch in (0, 5)] == [2, 4]
    assert made.change_points() == [0, 5]


WRONG = {
    "Cutout(0)": "Cutout (given size=0): size must be a finite number, at least 1",
    "CutMix(alpha=0)": "CutMix (given alpha=0): alpha must be more than 0",
    "CutMix(p=1.5)": "CutMix (given p=1.5): p must be at most 1",
    "RandAugment(2, 31)": "RandAugment (given m=31): m must be at most 30",
    "CropShift(5, 5)": "CropShift (given low=5, high=5): low must be at least 0 and less than high",
    "AutoAugment('mnist')": "policy must be 'cifar10' or 'svhn'",
    "IDBH('medium')": "version must be 'weak' or 'strong'",
    "CutMax()": "Did you mean 'CutMix'",
    "3": "augment must be a tuple of an augmentation or None",
}


@pytest.mark.parametrize(("value", "wrong"), WRONG.items())
def test_a_wrong_value_is_told_with_what_was_given(value, wrong):
    with pytest.raises((RecipeError, PluginError)) as told:
        apply_overrides(recipe, [f"augment={value}"])
    assert wrong in str(told.value)


@pytest.mark.parametrize("value", [1, -0.1, 1.5])
def test_label_smoothing_is_refused_outside_of_its_range(value):
    with pytest.raises(RecipeError, match="label_smoothing must be at least 0 and less than 1"):
        recipe.but(label_smoothing=value)


FAULTY = {
    "left the box": lambda x, targets, rng: (x + 1, targets),
    "returned targets": lambda x, targets, rng: (x, targets * 2),
    "expected a pair of tensors": lambda x, targets, rng: x,
    "returned x as float32": lambda x, targets, rng: (x[:2], targets),
    "returned targets as float64": lambda x, targets, rng: (x, targets.double()),
    "failed with ZeroDivisionError": lambda x, targets, rng: (x / (1 // 0), targets),
}


@pytest.mark.parametrize(("wrong", "augmentation"), FAULTY.items())
def test_the_dry_run_names_an_augmentation_that_goes_wrong(wrong, augmentation):
    with pytest.raises(PluginError, match=wrong):
        dry_run(recipe.but(augment=(Flip(), augmentation)))


def test_the_dry_run_passes_whatever_ships():
    dry_run(recipe.but(augment=tuple(SHIPPED), label_smoothing=0.1), classes=2, shape=(1, 8, 8))


def test_a_run_says_what_is_done_to_images_and_labels():
    data = ImageData("toy", *[Split(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))] * 2, 4, pad=1)
    texts = {
        "random crops of images padded by 1 pixel, never mirrored": recipe,
        "none": recipe.but(augment=()),
        "Crop(pad=2), CutMix(alpha=1.0, p=0.5)": recipe.but(augment=(Crop(2), CutMix(p=0.5))),
        "Flip(); labels smoothed by 0.1": recipe.but(augment=Flip(), label_smoothing=0.1),
    }
    assert {augmentation_text(made, data) for made in texts.values()} == set(texts)


@EACH
def test_no_augmentation_reads_a_value_back_from_the_device(augmentation):
    """On the device "meta" there are no values to read, and no tensor of the host may be mixed with them."""
    x, y = torch.empty(64, 3, 16, 12, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    batch = augment_batch(recipe.but(augment=augmentation, label_smoothing=0.1), x, y, 10, rng())
    assert {batch.x.device.type, batch.y.device.type, batch.targets.device.type} == {"meta"}
    assert batch.x.shape == x.shape


def test_numpy_and_torchs_global_generators_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    for augmentation in SHIPPED:
        augmentation(*images(), rng())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
