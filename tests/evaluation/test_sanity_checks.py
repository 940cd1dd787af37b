"""Planted maskers are flagged by name; a model trained against attacks is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from robustmail import evaluate
from robustmail.data.dataset import Split
from robustmail.evaluation import sanity_checks
from robustmail.evaluation.evaluator import batch_sizer
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.sanity_checks import Check, curve, judge, measure
from robustmail.step import module_mode
from tests.conftest import WHOLE_SAMPLE
from tests.evaluation import maskers
from tests.evaluation.maskers import EPS, MASKERS, Masked

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("whole_sample")]

DOCS = Path(__file__).parents[2] / "docs" / "believing.md"


MASKS = ("logits times 1000", "rounded input", "detached", "softmax inside", "noise layer", "statistics of the batch",
         "writes into its images", "dropout left on")  # fmt: skip


def examined(model, digit_images):
    return maskers.examined(model, digit_images.part.first(40))


@pytest.fixture(scope="module")
def of_robust_cnn(robust_cnn, digit_images):
    """(what is measured, the verdict) of a model trained against PGD."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity_checks, "SAMPLE", WHOLE_SAMPLE)  # `whole_sample` is of a test, later than this fixture
        return examined(robust_cnn, digit_images)


@pytest.mark.parametrize("name", MASKS)
def test_a_planted_masker_is_flagged_by_name(robust_cnn, digit_images, name):
    masker = MASKERS[name]
    measured, verdict = examined(Masked(robust_cnn, masker.how), digit_images)
    flags = {flag["name"] for flag in verdict["flags"]}
    assert verdict["light"] == "red"
    assert masker.cause in flags
    if name == "rounded input":  # where gradients are 0, a black box and a huge ball bear witness
        assert measured["zero_gradients"] == 1.0
        assert {"zero-gradients", "huge-eps"} <= flags


def test_a_model_trained_against_pgd_is_not_flagged(of_robust_cnn):
    measured, verdict = of_robust_cnn
    assert (verdict["light"], verdict["flags"]) == ("green", [])
    assert len(verdict["examined"]) >= 7
    accuracies = [point["accuracy"] for point in curve(measured)["points"]]
    assert accuracies[0] > 0.8 > 0.05 > accuracies[-1]


def test_examining_leaves_no_mark(robust_cnn, digit_images):
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in robust_cnn.state_dict().items()}
    with module_mode(robust_cnn, "train"):
        examined(robust_cnn, digit_images)
        assert robust_cnn.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in robust_cnn.state_dict().items())


def ledger(n: int, pgd: int, worst: int, strongest: str = "square") -> Ledger:
    """n images, all right; so many stand under PGD, so many under everything."""
    found = Ledger(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64), torch.ones(n))
    for stage, stand in {"pgd100": pgd, strongest: worst}.items():
        broke = torch.arange(n) >= stand
        found.enter(stage, torch.arange(n), broke, torch.ones(n, dtype=torch.int64), torch.zeros(n), None)
    return found


@pytest.mark.parametrize(
    ("pgd", "worst", "light"),
    [(489, 449, "green"), (527, 481, "green"), (552, 442, "yellow"), (548, 333, "red")],
    ids=["AT", "TRADES", "MAIL-AT", "GAIRAT"],
)
def test_the_papers_own_gaps_light_up_where_its_methods_flatter_pgd(pgd, worst, light):
    verdict = judge(None, ledger(1000, pgd, worst), ["pgd100"], 10)
    assert verdict["gap"] == pytest.approx((pgd - worst) / 10)
    said = {flag["name"]: flag["light"] for flag in [*verdict["flags"], *verdict["examined"]]}
    assert said["pgd-to-strongest-gap"] == light
    assert verdict["light"] == "grey", "nothing was asked of the model"


def test_accuracy_at_chance_is_flagged():
    n = 200
    found = Ledger(torch.arange(n), torch.arange(n) % 10, torch.zeros(n, dtype=torch.int64), torch.zeros(n))
    assert "chance-accuracy" in [flag["name"] for flag in judge(None, found, [], 10)["flags"]]


def test_every_check_has_a_section_in_the_documentation(of_robust_cnn):
    _, verdict = of_robust_cnn
    heads = set(re.findall(r"^## (\S+)$", DOCS.read_text(), re.M))
    names = {flag["name"] for flag in [*verdict["flags"], *verdict["examined"]]} | {"eight-bit"}
    assert names <= heads
    text = DOCS.read_text()
    for number in (sanity_checks.GAP[0], sanity_checks.GAP[1], sanity_checks.SAMPLE):
        assert f"{number:g}" in text


def test_the_light_is_that_of_the_worst_check():
    assert (
        sanity_checks.light([Check("a", "green", "", ""), Check("b", "yellow", "", ""), Check("c", "green", "", "")])
        == "yellow"
    )


def test_chance_is_that_of_the_models_classes_not_of_the_labels_at_hand():
    n = 100
    found = Ledger(torch.arange(n), torch.arange(n) % 2, torch.zeros(n, dtype=torch.int64), torch.zeros(n))
    for classes, light in ((2, "red"), (10, "green")):
        verdict = judge(None, found, [], classes)
        said = {flag["name"]: flag["light"] for flag in [*verdict["flags"], *verdict["examined"]]}
        assert said["chance-accuracy"] == light


def test_pgd_alone_has_no_gap_to_anything():
    found = ledger(100, 60, 50)
    del found.stages["square"]
    assert judge(None, found, ["pgd100"], 10)["gap"] is None


def test_attacks_that_are_too_weak_are_told_by_what_the_check_finds_itself(robust_cnn, digit_images):
    part = digit_images.part.first(64)

    def idle(model, x, y):
        return x

    found = evaluate(robust_cnn, part, (idle,), 2.5 * EPS)
    *_, measured = measure(robust_cnn, part, found.ledger, 2.5 * EPS, "linf", 0, batch_sizer(robust_cnn, part))
    flags = {flag["name"]: flag["light"] for flag in judge(measured, found.ledger, [], 10)["flags"]}
    assert flags["overlooked"] == "red"
    assert len(measured["broken"]) > 6


def test_what_the_evaluation_overlooked_is_counted_among_the_images_at_hand():
    """A shard is judged by its own images, and the whole by all, from the same measurement."""
    whole = ledger(100, 60, 60)
    broken = list(range(0, 100, 10))  # 0, 10, ... 50 stand and are in the sample
    assert sanity_checks._overlooked(80, broken, whole) == (80, 6)
    assert sanity_checks._overlooked(80, broken, whole.take(torch.arange(40, 90))) == (40, 2)


def test_gradients_that_are_nan_are_as_good_as_none(robust_cnn, digit_images):
    def rooted(model, x):  # the derivative of a root at zero
        return model(x) + 0 * (x - x.detach()).flatten(1).sum(1, keepdim=True).sqrt()

    found = sanity_checks._zero_gradients(Masked(robust_cnn, rooted), digit_images.part.first(16), 8)
    assert found == 1.0


def test_a_check_that_found_nothing_does_not_say_what_it_would_have_meant(of_robust_cnn):
    _, verdict = of_robust_cnn
    assert verdict["examined"]
    assert {check["meaning"] for check in verdict["examined"]} == {""}


def test_a_gap_is_no_reason_to_doubt_a_number_that_is_not_pgds():
    lights = {}
    for strongest in ("square", "apgd-t"):
        verdict = judge(None, ledger(1000, 548, 333, strongest), ["pgd100"], 10)
        lights[strongest] = {flag["name"]: flag["light"] for flag in verdict["flags"]}["pgd-to-strongest-gap"]
    assert lights == {"square": "red", "apgd-t": "yellow"}


def sample(n: int, lost: int) -> dict:
    """What is measured of a sound model of whose n images a targeted attack breaks so many more than PGD."""
    curve = [{"eps": 0.0, "correct": n}, {"eps": 0.5, "correct": 0}]
    return {"n": n, "classes": 10, "differs": 0.0, "changes_its_mind": 0.0, "by_company": 0.0, "alters_images": False,
            "probabilities": False, "zero_gradients": 0.0, "pgd10": 0.8, "pgd100": 0.8, "margin": 0.8,
            "targeted": 0.8 - lost / n, "black_box": 0.0, "broken": [], "huge": 0.5, "curve": curve}  # fmt: skip


@pytest.mark.parametrize(
    ("n", "lost", "strongest", "light"),
    [(30, 4, "square", "green"), (128, 12, "square", "green"), (128, 15, "square", "red"),
     (128, 15, "apgd-t", "yellow")],
)  # fmt: skip
def test_a_targeted_attack_must_gain_more_than_chance_would(n, lost, strongest, light):
    verdict = judge(sample(n, lost), ledger(n, n, n, strongest), ["pgd100"], 10)
    said = {flag["name"]: flag["light"] for flag in [*verdict["flags"], *verdict["examined"]]}
    assert said["more-steps-do-not-help"] == light


def test_a_ball_in_l2_is_huge_only_where_every_image_can_be_made_grey():
    class Mean(nn.Module):
        def forward(self, x):
            mean = x.flatten(1).mean(1)
            return torch.stack([mean, 0.5 - mean], 1)

    huge = {}
    for size in (32, 96):
        part = Split(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1]))
        found = evaluate(Mean(), part, ("nat",), 0.5, "l2")
        *_, measured = measure(Mean(), part, found.ledger, 0.5, "l2", 0, batch_sizer(Mean(), part))
        huge[size] = measured["huge"]
        verdict = judge(measured, found.ledger, [], 2)
        names = {flag["name"] for flag in [*verdict["flags"], *verdict["examined"]]}
        assert ("huge-eps" in names) == (size == 32)
        assert len(curve(measured)["points"]) == 7 + (size == 32)
    assert huge == {32: pytest.approx(27.7, abs=0.1), 96: None}
