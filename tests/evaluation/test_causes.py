"""The light names why attacks fail on planted maskers, and labels that are not the model's; sound models stay green."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustmail import evaluate
from robustmail.data.dataset import Split
from robustmail.evaluation import causes
from robustmail.evaluation.causes import Sample, cause_checks, measure_causes
from robustmail.evaluation.evaluator import batch_sizer
from robustmail.evaluation.label_checks import label_checks
from robustmail.evaluation.ledger import STOOD, Ledger
from robustmail.evaluation.measurements import Measurements
from robustmail.evaluation.output_checks import measure_draws, output_checks
from robustmail.evaluation.quantiles import by_weight, weight_check
from robustmail.evaluation.sanity_checks import judge
from robustmail.train.image_weights import weights_of
from tests.evaluation.maskers import CLEAN, EPS, MASKERS, Masked, N, trained
from tests.train.conftest import recipe


def measurements(**changes) -> Measurements:
    """Of a sound model, with changes."""
    sound = {
        "n": N, "differs": 0.0, "changes_its_mind": 0.0, "by_company": 0.0, "alters_images": False,
        "probabilities": False, "zero_gradients": 0.0, "pgd10": 0.8, "pgd100": 0.8, "targeted": 0.8, "black_box": 0.0,
        "broken": [], "huge": 0.5,
        "curve": [{"eps": 0.0, "correct": N}, {"eps": EPS, "correct": 40}, {"eps": 4 * EPS, "correct": 2},
                  {"eps": 0.5, "correct": 0}],
    }  # fmt: skip
    return Measurements.of({**sound, **changes})


def lights(checks) -> dict[str, str]:
    return {check.name: check.light for check in checks}


def causes_of(model: nn.Module, part, zero_gradients: float = 0.0) -> dict[str, str]:
    """The lights of the causes, where PGD-100 is taken to have missed all that it left."""
    part = part.first(N)
    ledger = evaluate(model, part, ("pgd100",), EPS).ledger
    missed = ledger.standing(["pgd100"])
    sample = Sample(model, part, ledger, missed, EPS, "linf", 0, batch_sizer(model, part))
    measuring = measure_causes(sample)
    while True:
        try:
            next(measuring)
        except StopIteration as done:
            found = done.value
            break
    return lights(cause_checks(measurements(causes=found, zero_gradients=zero_gradients)))


@pytest.fixture(scope="module")
def two_layers() -> nn.Module:
    """A network of fractions of a second, trained against PGD."""
    return trained(CLEAN["two layers, against PGD"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "expected"),
    [("logits times 30", "logit-scale"), ("waves on the largest logit", "imbalanced-gradients"),
     ("sees known images from afar", "larger-eps-does-not-help"), ("flat between steps", "step-function")],
)  # fmt: skip
def test_a_planted_cause_is_named(two_layers, digit_images, name, expected):
    found = causes_of(Masked(two_layers, MASKERS[name].how), digit_images.part)
    assert found[expected] in ("yellow", "red")


@pytest.mark.long
def test_no_cause_is_found_in_a_model_trained_against_pgd(two_layers, digit_images):
    found = causes_of(two_layers, digit_images.part)
    assert found.pop("logit-scale") != "red", "three of 128 images are yellow without an attack that sees no scale"
    assert found == dict.fromkeys(("step-function", "imbalanced-gradients", "larger-eps-does-not-help"), "green")


def test_steps_without_a_gradient_are_red_and_with_a_backward_pass_through_them_yellow():
    flat = {"steps": {"flat": 1.0, "slope": 0.0}, "one_sided": 1.0, "missed": 0, "far": {}}
    for zero, light in ((1.0, "red"), (0.0, "yellow")):
        assert lights(cause_checks(measurements(causes=flat, zero_gradients=zero)))["step-function"] == light


@pytest.mark.parametrize(
    ("lost", "won", "light"), [(2, 0, "green"), (3, 0, "yellow"), (12, 0, "red"), (12, 10, "green"), (12, 6, "yellow")]
)
def test_a_cause_needs_three_images_two_points_and_more_than_the_other_way_round(lost, won, light):
    assert causes._level(N, lost, won) == light


def test_what_a_scale_breaks_is_milder_where_an_attack_saw_no_scale():
    found = {
        "steps": {"flat": 0.0, "slope": 1.0}, "one_sided": 1.0, "missed": 9, "far": {},
        "logit_scale": {"standing": 50, "lost": {"10": 14}, "worst": 14}, "imbalance": {"only_md": 0, "only_margin": 0},
    }  # fmt: skip
    said = {}
    for stage in ("pgd100", "apgd", "cw", "apgd-t", "apgd-t(steps=10)"):
        ledger = right(N)
        ledger.outcome(stage)[:] = STOOD
        verdict = judge(vars(measurements(causes=found)), ledger, [], 10)
        said[stage] = {check["name"]: check["light"] for check in (*verdict["flags"], *verdict["examined"])}
    assert {stage: names["logit-scale"] for stage, names in said.items()} == {
        "pgd100": "red", "apgd": "red", "cw": "yellow", "apgd-t": "yellow", "apgd-t(steps=10)": "yellow"
    }  # fmt: skip


def test_a_plateau_is_told_where_images_could_fall():
    far = {"eps": EPS, "far": 4 * EPS, "broken": 20, "regained": 0, "is_visible": True}
    sound = {"steps": {"flat": 0.0, "slope": 1.0}, "one_sided": 1.0, "missed": 0}
    curve = [{"eps": EPS, "correct": 40}, {"eps": 4 * EPS, "correct": 40}, {"eps": 0.5, "correct": 0}]
    for is_visible, light in ((True, "yellow"), (False, "green")):
        m = measurements(causes={**sound, "far": {**far, "is_visible": is_visible}}, curve=curve)
        assert lights(cause_checks(m))["larger-eps-does-not-help"] == light


# Randomness


class Coin(nn.Module):
    """Right nine times in ten, whatever the image is."""

    def forward(self, x: Tensor) -> Tensor:
        right = x[:, 0, 0, 0].round().long()
        turned = torch.rand(len(x)) < 0.1
        return nn.functional.one_hot(torch.where(turned, 1 - right, right), 2).float() + 0 * x.flatten(1)[:, :2]


@pytest.mark.long
def test_a_coin_has_its_expected_accuracy_and_without_eot_the_number_is_a_lottery():
    x = torch.rand(200, 1, 4, 4)
    draws = measure_draws(Coin(), Split(x, x[:, 0, 0, 0].round().long()), 0.001, "linf", 0, 8)
    for kind in ("clean", "attacked"):
        assert draws[kind]["mean"] == pytest.approx(0.9, abs=0.02)
        assert draws[kind]["low"] < draws[kind]["mean"] < draws[kind]["high"]
    assert draws["clean"]["moves"] > 0.7
    for has_eot, word in ((False, "lottery"), (True, "quote these averages")):
        check = next(iter(output_checks(measurements(differs=1.0, draws=draws), has_eot)))
        assert (check.name, check.light) == ("randomised-output", "red")
        assert word in check.meaning
        assert "90." in check.measured or "89." in check.measured


# Labels


def right(n: int, classes: int = 10) -> Ledger:
    """A ledger of n images of all classes, all right."""
    label = torch.arange(n) % classes
    return Ledger(torch.arange(n), label, label.clone(), torch.ones(n))


def answered(label: Tensor, predicted: Tensor) -> dict[str, str]:
    return lights(label_checks(Ledger(torch.arange(len(label)), label, predicted, torch.ones(len(label))), 10))


def test_sound_labels_turn_on_no_light():
    label = torch.randint(10, (N,))
    wrong = torch.rand(N) < 0.4
    noisy = torch.where(wrong, torch.randint(10, (N,)), label)
    for predicted in (label, noisy):
        assert set(answered(label, predicted).values()) == {"green"}


@pytest.mark.parametrize("moved", [[*range(1, 10), 0], [1, 0, *range(2, 10)], [3, 4, 5, *range(6, 10), 0, 1, 2]])
def test_classes_in_another_order_are_told(moved):
    label = torch.arange(300) % 10
    predicted = torch.tensor(moved)[label]
    assert answered(label, predicted)["class-order"] == "red"


def test_two_classes_that_a_model_confuses_are_no_other_order():
    label = torch.arange(300) % 10
    predicted = label.where((label != 3) | (torch.rand(300) < 0.4), 5)  # most of class 3 are taken for class 5
    assert answered(label, predicted)["class-order"] == "green"


def test_the_first_images_of_a_sorted_set_and_labels_of_another_set_are_told():
    label = torch.zeros(N, dtype=torch.int64)
    assert answered(label, label)["label-space"] == "yellow"
    assert answered(label, label + 7)["label-space"] == "red"
    assert answered(label[:10], label[:10])["label-space"] == "green", "ten images may well be of one class"


@pytest.mark.parametrize(("answers", "light"), [("one class", "red"), ("hardly better", "yellow"), ("right", "green")])
def test_what_guessing_would_give_is_told_on_imbalanced_labels(answers, light):
    label = torch.where(torch.arange(200) % 10 == 0, torch.arange(200) % 7, 3)
    predicted = {"one class": torch.full_like(label, 3), "right": label,
                 "hardly better": torch.where(torch.arange(200) % 9 == 0, 2, 3)}[answers]  # fmt: skip
    assert answered(label, predicted)["guessing"] == light


# Weights


def test_robust_accuracy_by_weight_is_yellow_where_light_images_break_first():
    for first, light in ((True, "yellow"), (False, "green")):
        ledger = right(100)
        broke = torch.arange(100) < 60
        ledger.enter("pgd", torch.arange(100), broke, torch.full((100,), 1), torch.zeros(100), None)
        weights = [float(i if first else -i) for i in range(100)]
        rows = by_weight(weights, ledger)
        assert [row["n"] for row in rows] == [20] * 5
        assert sum(row["robust"] for row in rows) == pytest.approx(2.0)
        (check,) = weight_check(rows)
        assert (check.name, check.light) == ("robust-accuracy-by-weight", light)


def test_equal_weights_and_no_weights_have_no_quantiles():
    assert by_weight([1.0] * 20, right(20)) == by_weight([], right(20)) == []
    assert list(weight_check([])) == []


def test_weights_of_a_shard_are_those_of_its_own_images():
    ledger = right(100)
    rows = by_weight([float(i) for i in range(100)], ledger.take(torch.arange(50, 100)))
    assert (rows[0]["low"], rows[-1]["high"], sum(row["n"] for row in rows)) == (50.0, 99.0, 50)


def test_a_runs_method_gives_test_images_its_weights(two_layers, digit_images):
    part = digit_images.part.first(40)
    sizer = batch_sizer(two_layers, part)
    weights = torch.tensor(weights_of(recipe, two_layers, part, sizer))
    assert len(weights) == 40
    assert weights.mean() == pytest.approx(1.0, abs=1e-4)
    assert weights.std() > 0
    assert torch.tensor(weights_of(recipe, two_layers, part, sizer)).equal(weights)
    assert weights_of(recipe.but(margin=None, weighter=None, burn_in=0), two_layers, part, sizer) == []


def test_a_margin_that_needs_training_gives_no_weights(two_layers, digit_images):
    def by_place(step):
        return step.index.float()

    part = digit_images.part.first(8)
    assert weights_of(recipe.but(margin=by_place), two_layers, part, batch_sizer(two_layers, part)) == []
