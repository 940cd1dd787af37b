"""Runs with augmentations, mixed and smoothed labels: their bits, a stop in between, the batch that failed."""

from __future__ import annotations

import pytest
import torch

from robustmail import (
    AWP,
    IDBH,
    AutoAugment,
    Crop,
    CropShift,
    CutMix,
    Cutout,
    Flip,
    Mixup,
    RandAugment,
    Stairs,
    State,
    Terms,
    fit,
    reproduce,
)
from robustmail.checkpoints import load_saved
from robustmail.errors import NonFiniteError
from robustmail.functional import ce
from robustmail.records import RunStarted, StepFinished
from tests.train.conftest import recipe as plain

pytestmark = pytest.mark.long

EVERYTHING = (
    Crop(1), Flip(), Cutout(Stairs({0: 2, 1: 3})), RandAugment(1, 9), AutoAugment("svhn"), CropShift(0, 3),
    IDBH("weak"), Mixup(0.2), CutMix(p=0.5),
)  # fmt: skip
recipe = plain.but(augment=EVERYTHING, label_smoothing=0.1, perturbation=AWP(gamma=0.01))


def test_a_run_with_everything_on_that_is_stopped_and_continued_ends_in_the_same_bits(tmp_path):
    whole = State.fresh(recipe, tmp_path / "whole")
    records = list(fit(recipe, whole))
    assert isinstance(records[0], RunStarted)
    assert records[0].augmentation.startswith("Crop(pad=1), Flip(), ")
    assert records[0].augmentation.endswith("; labels smoothed by 0.1")
    parts = State.fresh(recipe, tmp_path / "parts")
    for record in fit(recipe, parts):
        if isinstance(record, StepFinished) and record.epoch == 1:
            parts.save()
            break
    again = State.fresh(recipe, tmp_path / "parts")
    again.load()
    list(fit(recipe, again))
    for name in ("last.safetensors", "metrics.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def losses(made):
    return [record.loss for record in fit(made.but(epochs=1, burn_in=0)) if isinstance(record, StepFinished)]


def test_crop_of_the_data_sources_own_padding_trains_to_the_same_bits():
    assert losses(plain) == losses(plain.but(augment=Crop(1)))
    assert losses(plain) != losses(plain.but(augment=()))


def test_each_part_changes_the_loss_and_smoothing_bounds_it_from_below():
    assert (
        len({tuple(losses(plain.but(**part))) for part in ({}, {"augment": CutMix()}, {"label_smoothing": 0.5})}) == 3
    )
    floor = -(0.55 * torch.tensor(0.55).log() + 9 * 0.05 * torch.tensor(0.05).log())  # the entropy of the targets
    assert min(losses(plain.but(label_smoothing=0.5))) > floor


class SoftRoot:
    """An objective of the targets whose gradient is not finite from its third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step):
        self.calls += 1
        entropy = ce(step.logits_adv, step.targets)
        return Terms(entropy + (step.logits_adv * (self.calls <= 2)).pow(2).sum(1).sqrt())


def test_the_batch_that_failed_is_kept_with_its_targets_and_fails_again(tmp_path):
    made = plain.but(objective=SoftRoot(), augment=(Mixup(1.0),), label_smoothing=0.1, burn_in=2)
    state = State.fresh(made, tmp_path / "run")
    seen = []
    with pytest.raises(NonFiniteError, match=r"nonfinite\.pt"):
        seen.extend(record for record in fit(made, state))
    content = load_saved(tmp_path / "run" / "nonfinite.pt", torch.device("cpu"))
    targets = content["targets"]
    assert targets.shape == (len(content["y"]), 10)
    assert (targets > 0.0100001).sum(1).max() == 2
    assert torch.equal(targets.gather(1, content["y"][:, None])[:, 0], targets.amax(1))
    fixed = made.but(objective=SoftRoot())
    assert reproduce(tmp_path / "run" / "nonfinite.pt", fixed) > 0


def test_the_attack_gets_the_class_and_margins_go_by_it():
    given = []

    def attack(model, x, y):
        given.append(y)
        return x.clone()

    steps = []

    def margin(step):
        steps.append(step)
        return step.probs_adv.amax(1)

    made = plain.but(attack=attack, eps=0.1, margin=margin, augment=(CutMix(),), burn_in=0, epochs=1)
    for record in fit(made):
        if isinstance(record, StepFinished):
            break
    y, step = next(y for y in given if len(y) > 100), next(s for s in steps if len(s.y) > 100)
    assert y.dtype == torch.int64
    assert torch.equal(y, step.y)
    assert torch.equal(step.y, step.targets.argmax(1)) or (step.targets == 0.5).any()
    assert ((step.targets > 0).sum(1) == 2).any()
