"""Robust accuracy: settings, survivors, intervals, and verdicts that do not depend on how they were come by."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from robustmail import PGD, AutoAttack, evaluate, torchattack
from robustmail.data.dataset import Split
from robustmail.errors import AttackError, DataError, ModelError, NonFiniteError, PluginError, RecipeError
from robustmail.evaluation import evaluator
from robustmail.evaluation.attack_specs import attack_spec
from robustmail.evaluation.statistics import wilson


@pytest.mark.long
def test_a_stronger_attack_leaves_fewer_standing_and_a_larger_ball_fewer_still(fitted_model):
    model, part = fitted_model
    rows = {r.name: r.correct for r in evaluate(model, part, ("nat", "pgd1", "pgd20", "cw", "apgd"), eps=2 / 255)}
    assert rows["nat"] == 16
    assert rows["nat"] >= rows["pgd1"] >= rows["pgd20"]
    wide = {r.name: r.correct for r in evaluate(model, part, ("pgd20", "cw", "apgd"), eps=64 / 255)}
    assert set(wide.values()) == {0}


@pytest.mark.long
def test_autoattack_is_the_worst_case_of_its_stages(fitted_model, monkeypatch):
    model, part = fitted_model
    stages = AutoAttack.stages

    def shorter(self, classes):  # the same attacks with a hundredth of the queries, to be done in seconds
        found = stages(self, classes)
        object.__setattr__(found["square"], "n_queries", 50)
        for name in ("apgd-ce", "apgd-t", "fab-t"):
            object.__setattr__(found[name], "steps", 10)
        return found

    monkeypatch.setattr(AutoAttack, "stages", shorter)
    told = []
    (row,) = evaluate(model, part, ("aa",), eps=4 / 255, progress=told.append)
    (apgd,) = evaluate(model, part, ("apgd",), eps=4 / 255)
    assert row.correct <= apgd.correct
    assert list(row.settings)[:4] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert [t.n for t in told][1:] == [t.standing for t in told][:-1], "each stage sees what the last left standing"


def test_the_verdict_does_not_depend_on_the_size_of_a_call_for_an_attack_without_noise(fitted_model, monkeypatch):
    model, part = fitted_model
    attack = PGD(eps=2 / 255, alpha=1 / 255, steps=5, start="none")
    (whole,) = evaluate(model, part, (attack,), eps=2 / 255)
    monkeypatch.setattr(evaluator, "BLOCK", 3)
    (pieces,) = evaluate(model, part, (attack,), eps=2 / 255)
    assert whole.correct == pieces.correct


def test_an_evaluation_prints_as_one_line_and_names_what_was_run(fitted_model):
    model, part = fitted_model
    found = evaluate(model, part, ("nat", "pgd2"), eps=2 / 255)
    nat, pgd, n = found["nat"], found["pgd2"], len(part.y)
    said = f"nat {100 * nat.accuracy:.1f} %, pgd2 {100 * pgd.accuracy:.1f} %; worst case {100 * pgd.accuracy:.1f} %"
    assert repr(found) == f"Evaluation({n} images: {said})"
    with pytest.raises(KeyError, match="aa was not run; there are: nat, pgd2"):
        found["aa"]


def test_evaluation_leaves_model_modes_and_generators_as_they_were(fitted_model):
    model, part = fitted_model
    model.train()
    before = torch.get_rng_state()
    evaluate(model, part, ("nat", "pgd2", "cw"))
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_the_same_seed_gives_the_same_row(fitted_model):
    model, part = fitted_model
    first, second = (evaluate(model, part, ("pgd3",), eps=2 / 255, seed=4)[0] for _ in range(2))
    assert (first.correct, first.settings) == (second.correct, second.settings)


def test_a_model_that_returns_nan_has_no_accuracy(fitted_model):
    model, part = fitted_model
    nn.init.constant_(model[-1].weight, float("nan"))
    with pytest.raises(NonFiniteError, match="NaN"):
        evaluate(model, part, ("nat",))


def test_a_row_says_what_each_stage_left_standing(fitted_model):
    model, part = fitted_model
    (row,) = evaluate(model, part, ("pgd20",), eps=2 / 255, seed=3)
    assert row.settings["standing"] == f"16 after natural, {row.correct} after pgd20"
    assert row.settings["seed"] == "3"


def test_images_may_be_bytes_or_floats(fitted_model):
    model, part = fitted_model
    floats = Split(part.x.float() / 255, part.y)
    assert [r.correct for r in evaluate(model, part)] == [r.correct for r in evaluate(model, floats)]


def test_data_that_can_only_mean_one_thing_are_taken(fitted_model):
    model, part = fitted_model
    expected = [r.correct for r in evaluate(model, part, ("nat", "pgd2"))]
    for x, y in ((part.x.numpy(), part.y.numpy()), (part.x.double() / 255, part.y.to(torch.uint8)),
                 (part.x, part.y.to(torch.int32)[:, None])):  # fmt: skip
        assert [r.correct for r in evaluate(model, (x, y), "nat,pgd2")] == expected


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [(lambda x, y: (x.float(), y), r"outside \[0, 1\]"), (lambda x, y: (x / 255 * math.nan, y), "images span"),
     (lambda x, y: (x[0], y), "images are uint8 of shape"), (lambda x, y: (x[:0], y[:0]), "of shape"),
     (lambda x, y: (x, nn.functional.one_hot(y, 10)), r"one-hot"), (lambda x, y: (x, y - 99), "has the label -"),
     (lambda x, y: (x, y[:-1]), "16 images, but 15 labels"), (lambda x, y: (x, y.float()), "labels are float32"),
     (lambda x, y: x, "data are a Tensor"), (lambda x, y: (x, ["a"]), "a label is the text 'a'"),
     (lambda x, y: (x, [object()]), "data are no arrays")],
)  # fmt: skip
def test_data_that_are_none_are_refused_in_one_line(fitted_model, spoil, wrong):
    model, part = fitted_model
    with pytest.raises(DataError, match=wrong):
        evaluate(model, spoil(part.x, part.y), ("nat",))


def test_what_cannot_be_evaluated_is_refused_before_anything_is_attacked(fitted_model):
    model, part = fitted_model
    with pytest.raises(DataError, match="there are 16 images"):
        evaluate(model, part, ("nat",), n=17)
    with pytest.raises(RecipeError, match=r"images live in \[0, 1\]"):
        evaluate(model, part, ("nat",), eps=8)
    with pytest.raises(ModelError, match=r"is a function, not an nn.Module"):
        evaluate(lambda x: model(x), part, ("nat",))
    with pytest.raises(PluginError, match="returned NoneType, expected images"):
        evaluate(model, part, (lambda m, x, y: None,))


@pytest.mark.parametrize(("steps", "expected"), [(10, 2 / 255), (20, 1 / 255), (100, 0.8 / 255)])
def test_steps_of_pgd_follow_the_stated_rule(steps, expected):
    (attack,) = attack_spec(f"pgd{steps}", 8 / 255, 10).stages.values()
    assert attack.alpha == pytest.approx(expected)
    assert (attack.steps, attack.random_start) == (steps, True)


def test_cw_takes_the_steps_of_the_authors_evaluation():
    (attack,) = attack_spec("cw", 0.031, 10).stages.values()
    assert (attack.loss, attack.steps, round(attack.alpha, 6)) == ("margin", 20, 0.0031)


def test_every_stage_is_spelt_out_in_the_settings():
    said = attack_spec("aa", 8 / 255, 2).settings
    assert said["square"].startswith("torchattack('Square', norm='Linf', eps=8/255, n_queries=5000")
    assert said["note"] == "APGD-T needs 4 classes, here are 2: left out"


def test_an_unknown_attack_is_refused_with_the_nearest():
    with pytest.raises(
        RecipeError, match=r"'apgdd': no such attack in validation and evaluation. Did you mean 'apgd'\?"
    ):
        attack_spec("apgdd", 8 / 255, 10)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (5, 10), (437, 1000), (10, 10)])
def test_the_interval_is_wilsons(correct, n):
    z, p = 1.959963984540054, correct / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(correct, n) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)


def test_an_attack_of_ones_own_sees_the_model_and_a_library_a_likeness(robust_cnn, digit_images):
    seen = []
    handle = robust_cnn.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))

    def peek(model, x, y):
        before = len(seen)
        model(x)
        assert len(seen) > before
        return x

    evaluate(robust_cnn, digit_images.part.first(20), (peek,), 0.1)
    seen.clear()
    evaluate(robust_cnn, digit_images.part.first(20), ("pgd10",), 0.1)
    handle.remove()
    assert 0 < len(seen) < 20  # clean images, the comparison and the verdict; not the search


def test_an_attack_that_writes_into_its_images_and_labels_is_judged_by_the_originals(fitted_model):
    model, part = fitted_model

    def writes(model, x, y):
        y.copy_(y.roll(1))
        return x.add_(0.3).clamp_(0, 1)

    with pytest.raises(AttackError, match="writes: left its ball"):
        evaluate(model, part, (writes,), eps=2 / 255)

    def relabels(model, x, y):
        y.copy_((y + 1) % 10)
        return x

    assert evaluate(model, part, (relabels,), eps=2 / 255)["relabels"].correct == 16


class Leaves(nn.Module):
    """A model that ends the process from the k-th pass on."""

    def __init__(self, model: nn.Module, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x):
        self.k -= 1
        return self.model(x) if self.k > 0 else sys.exit(0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_model_that_ends_the_process_has_no_number(fitted_model, k):
    model, part = fitted_model
    with pytest.raises(ModelError, match=r"the model: leaves with SystemExit: 0"):
        evaluate(Leaves(model, k), part, ("nat", "pgd2"))


def test_an_attack_that_ends_the_process_has_no_number(fitted_model):
    model, part = fitted_model

    def leaves(model, x, y):
        sys.exit(0)

    with pytest.raises(PluginError, match=r"attack leaves .*failed with SystemExit: 0"):
        evaluate(model, part, (leaves,))


@pytest.mark.parametrize("pack", [lambda z: (z, z), lambda z: {"scores": z}], ids=["tuple", "dict"])
def test_a_model_that_returns_more_than_logits_is_told_so(fitted_model, pack):
    model, part = fitted_model

    class Packs(nn.Module):
        def forward(self, x):
            return pack(model(x))

    with pytest.raises(ModelError, match=r"returned (tuple|dict), expected logits \[B, classes\]"):
        evaluate(Packs(), part, ("nat",))


@pytest.mark.parametrize("name", ["index", "predicted", "seal", "natural", "rounded"])
def test_an_attack_of_ones_own_cannot_take_the_name_of_a_column(fitted_model, name):
    def idle(model, x, y):
        return x

    idle.__name__ = name
    with pytest.raises(RecipeError, match=f"attack {name}: named like a column of the ledger"):
        evaluate(*fitted_model, (idle,))


def test_an_attack_that_keeps_to_a_smaller_ball_is_not_quoted_for_a_larger(fitted_model):
    model, part = fitted_model
    for weak in (PGD(eps=1 / 255, alpha=1 / 255, steps=1), torchattack("FGSM", eps=1 / 255)):
        with pytest.raises(
            RecipeError, match=r"\(given eps=1/255\): its eps is smaller than the evaluation's 8/255.*Give"
        ):
            evaluate(model, part, ("nat", weak), eps=8 / 255)
    other_norm = PGD(eps=1 / 255, alpha=1 / 255, steps=1, norm="l2")
    assert len(evaluate(model, part, (other_norm,), eps=8 / 255)) == 1, "in l2 it is no smaller"


@pytest.mark.parametrize(
    ("knobs", "wrong"),
    [({"batch": 0}, r"evaluate \(given batch=0\): must be a whole number"), ({"n": 0}, "given n=0"),
     ({"n": 2.5}, "given n=2.5"), ({"n": "3"}, "given n='3'"), ({"eps": "8/255"}, "eps='8/255': is no finite number"),
     ({"eps": 0}, "eps=0: must be above 0"), ({"eps": True}, "eps=True: is no"),
     ({"attacks": ()}, "attacks: no attack given")],
)  # fmt: skip
def test_knobs_that_mean_nothing_are_refused_in_one_line(fitted_model, knobs, wrong):
    with pytest.raises(RecipeError, match=wrong):
        evaluate(*fitted_model, **knobs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_of_another_precision_is_told_so(dtype):
    net, (x, y) = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).to(dtype),
        (torch.rand(4, 3, 2, 2), torch.zeros(4).long()),
    )
    said = rf"its parameters are {str(dtype).removeprefix('torch.')}, images are float32.*Call model\.float\(\) first"
    with pytest.raises(ModelError, match=said):
        evaluate(net, (x, y), "nat")
