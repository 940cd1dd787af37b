"""The worst class and the worst 30 % of the classes, against numbers made by hand and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustmail.evaluation.class_accuracies import bias_note, class_row, lowest_by_chance, read_classes, worst_classes
from robustmail.evaluation.compare import compare_classes
from robustmail.evaluation.ledger import Ledger
from robustmail.evaluation.statistics import wilson
from robustmail.evaluation.storage import StoredEvaluation, summarize

SIZE = 20


def rows(*robust: int) -> list[dict]:
    return [class_row(number, SIZE, SIZE, count) for number, count in enumerate(robust)]


def evaluated(*robust: int, of: int = SIZE) -> StoredEvaluation:
    """An evaluation in memory in which so many of the images of each class stand."""
    label = torch.arange(len(robust)).repeat_interleave(of)
    ledger = Ledger(torch.arange(len(label)), label, label.clone(), torch.ones(len(label)))
    stands = torch.cat([torch.arange(of) < count for count in robust])

    ledger.enter("pgd2", torch.arange(len(label)), ~stands, label, torch.zeros(len(label)), None)

    images = [{"index": str(i), "image": str(i), "label": str(int(c))} for i, c in enumerate(label)]
    return StoredEvaluation(Path("e"), {}, ledger, images, {}, ())


def test_the_tail_is_the_mean_over_the_three_worst_of_ten_classes():
    found = worst_classes(rows(9, 3, 12, 20, 6, 15, 15, 15, 15, 15), "robust")
    assert (found["class"], found["accuracy"], found["interval"]) == (1, 3 / SIZE, list(wilson(3, SIZE)))
    assert (found["tail_classes"], found["tail"]) == ([1, 4, 0], pytest.approx(6 / SIZE))


@pytest.mark.parametrize(("classes", "tail"), [(1, 1), (2, 1), (3, 1), (10, 3), (43, 13), (100, 30)])
def test_thirty_percent_of_the_classes_are_one_at_least(classes, tail):
    assert len(worst_classes(rows(*([5] * classes)), "robust")["tail_classes"]) == tail


def test_results_have_the_worst_classes_and_an_interval_for_every_class():
    ledger = evaluated(4, 20, 0).ledger
    results = summarize(ledger, [], 5, None)
    assert [row["class"] for row in results["per_class"]] == [0, 1, 2], "classes without images have no accuracy"
    assert results["per_class"][0]["robust_interval"] == list(wilson(4, SIZE))
    assert results["worst_classes"]["robust"]["class"] == 2
    assert results["worst_classes"]["natural"]["accuracy"] == 1
    clean = Ledger(ledger.index, ledger.label, ledger.label, ledger.margin)
    assert list(summarize(clean, [], 5, None)["worst_classes"]) == ["natural"], "nothing was attacked"
    classes, worst = read_classes(results)
    assert (classes["robust"][1].accuracy, worst["robust"].tail) == (1, 0)


def test_the_lowest_by_chance_is_the_closed_form():
    """Of k classes of one image each the lowest is 1 with p^k; one class is as accurate as it is."""
    for p in 0.0, 0.3, 0.9, 1.0:
        for k in 1, 2, 7:
            assert lowest_by_chance(p, [1] * k) == pytest.approx(p**k, abs=1e-3)
        assert lowest_by_chance(p, [40]) == pytest.approx(p, abs=1e-3)


def test_a_worst_class_says_how_many_images_a_class_has_and_what_chance_makes_of_it():
    few, many = (bias_note(read_classes({"per_class": [class_row(c, n, n, n // 2) for c in range(10)]})[0]["robust"])
                 for n in (20, 2000))  # fmt: skip
    assert "20 images each is biased low" in few
    assert "2,000 images each" in many
    shown = [float(note.rpartition("show ")[2].split(" %")[0]) for note in (few, many)]
    assert shown[0] < shown[1] < 50


@pytest.mark.parametrize("row", [{"n": -1}, {"n": 10**9}, {"robust": 1.5}])
def test_numbers_that_no_class_has_are_refused(row):
    with pytest.raises(ValueError, match="per_class"):
        read_classes({"per_class": [class_row(0, 4, 4, 2) | row]})


def test_two_evaluations_are_compared_each_in_its_own_worst_classes():
    good, bad = evaluated(*[15] * 9, 12), evaluated(2, *[15] * 9)
    found, note = compare_classes(good, bad)
    assert [row.name for row in found] == [
        "natural worst class", "natural tail 30 %", "robust worst class", "robust tail 30 %",
    ]  # fmt: skip
    worst = found[2]
    assert (worst.first, worst.second, worst.difference) == (12 / SIZE, 2 / SIZE, pytest.approx(0.5))
    assert 0 < worst.low < worst.high
    assert not worst.tie
    assert all(row.difference == row.low == row.high == 0 for row in found[:2])
    assert "fewer images a class has, here 20 to 20" in note
    back = compare_classes(bad, good)[0][2]
    assert (back.difference, back.tie) == (pytest.approx(-0.5), False)


def test_a_small_difference_of_few_images_is_a_tie():
    found, _ = compare_classes(evaluated(10, 12, 14), evaluated(9, 12, 14))
    assert found[2].difference > 0
    assert found[2].tie
