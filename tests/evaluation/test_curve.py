"""Accuracy by eps: closed forms, broken images that are taken over, and a curve that never rises."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from robustmail.data.dataset import Split
from robustmail.data.testsets import TestSet
from robustmail.errors import RunError
from robustmail.evaluation import runner
from robustmail.evaluation.curve import curve_folders, eps_folder, read_curve, run_curve
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.storage import read_evaluation
from robustmail.evaluation.task import EvaluationTask
from robustmail.evaluation.verify import verify

N, BUDGETS = 60, (0.02, 0.05, 0.1)


class Linear(nn.Module):
    """Two classes; the gap of the logits is 2 (w . x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 48))

    def forward(self, x):
        score = x.flatten(1) @ self.w
        return torch.stack([score, -score], 1)


@pytest.fixture
def task(monkeypatch) -> EvaluationTask:
    """Images away from 0 and 1, and labels of which the model gets some wrong; the light is not the point here."""
    monkeypatch.setattr(runner, "measure", lambda *_: iter(()))
    x = 0.2 + 0.6 * torch.rand(N, 3, 4, 4)
    y = (x.flatten(1) @ Linear().w < 0.1).long().detach()
    data = TestSet("images", Split(x, y), 2)
    return EvaluationTask(LoadedModel.of(Linear(), data), data, ("nat", "pgd10"), BUDGETS[0])


def tasks(task: EvaluationTask, *budgets: float) -> list[EvaluationTask]:
    return [replace(task, eps=eps) for eps in budgets or BUDGETS]


def correct(folder) -> list[int]:
    return [point["attacks"][1]["correct"] for point in read_curve(folder)["points"]]


def expected(task: EvaluationTask, *budgets: float) -> list[int]:
    """How many images stand: w . x falls by eps ||w||_1 at most."""
    x, y, w = task.data.part.x, task.data.part.y, Linear().w
    gap = (1 - 2 * y) * (x.flatten(1) @ w)
    return [int((gap > eps * w.abs().sum()).sum()) for eps in budgets]


def test_the_curve_has_its_closed_form_and_begins_at_the_clean_accuracy(task, tmp_path):
    list(run_curve(tasks(task), tmp_path, at_zero=True))
    assert correct(tmp_path) == expected(task, 0.0, *BUDGETS)
    points = read_curve(tmp_path)["points"]
    assert {row["correct"] for row in points[0]["attacks"]} == {points[1]["attacks"][0]["correct"]}, "nat, whatever"
    assert [point["eps"] for point in points] == [0.0, *BUDGETS]
    assert all(row["low"] <= row["accuracy"] <= row["high"] for point in points for row in point["attacks"])


def test_an_example_of_a_smaller_eps_is_that_of_the_larger_and_is_verified_there(task, tmp_path):
    list(run_curve(tasks(task), tmp_path))
    small, large = (read_evaluation(tmp_path / eps_folder(eps)).ledger for eps in (BUDGETS[0], BUDGETS[2]))
    assert 0 < len(small.examples) < len(large.examples)
    assert all(torch.equal(small.examples[i], large.examples[i]) for i in small.examples)
    assert all(small.distance[i] == large.distance[i] for i in small.examples)
    for folder in curve_folders(tmp_path):
        verify(folder, task.subject.model, task.data)


def test_an_attack_that_fails_at_a_larger_eps_does_not_make_the_curve_rise(task, tmp_path):
    calls = []

    def tires(model, x, y):
        calls.append(len(x))
        return (x - 0.02 * (1 - 2 * y)[:, None, None, None] * model.w.sign().view(3, 4, 4)) if len(calls) == 1 else x

    class Known(nn.Module):
        w = task.subject.model.w

    model = Known()
    tires_too = lambda _, x, y: tires(model, x, y)  # noqa: E731
    tires_too.__name__ = "tires"
    found = tasks(replace(task, attacks=("nat", tires_too)))
    list(run_curve(found, tmp_path))
    numbers = correct(tmp_path)
    assert numbers[0] < expected(task, 0.0)[0]
    assert numbers == [numbers[0]] * 3


def test_an_eps_in_between_is_added_and_carried_to_the_larger_ones(task, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    list(run_curve(tasks(task), once))
    list(run_curve(tasks(task, BUDGETS[0], BUDGETS[2]), twice))
    list(run_curve(tasks(task), twice))
    assert correct(twice) == correct(once)
    verify(twice / eps_folder(BUDGETS[2]), task.subject.model, task.data)


def test_a_curve_that_was_stopped_goes_on(task, tmp_path):
    records = run_curve(tasks(task), tmp_path)
    for record in records:
        if getattr(record, "name", "") == "pgd10":
            break  # the smallest eps is attacked, but not complete
    records.close()
    assert not (tmp_path / "curve.json").exists()
    list(run_curve(tasks(task), tmp_path))
    assert correct(tmp_path) == expected(task, *BUDGETS)


def test_a_broken_image_that_is_taken_over_can_be_new_to_a_finished_evaluation(task):
    ledgers = []
    for eps in BUDGETS[:2]:
        one = replace(task, eps=eps)
        ledgers.append(runner.clean_pass(one.subject.model, one.part, runner.batch_sizer(one.subject.model, one.part)))
    small, large = ledgers
    at = int(small.right.nonzero()[0])
    only = torch.tensor([at])
    small.enter("pgd10", only, torch.tensor([True]), torch.tensor([1]), torch.tensor([0.01]), torch.rand(1, 3, 4, 4))
    large.enter("pgd10", only, torch.tensor([False]), torch.tensor([0]), torch.tensor([0.05]), None)
    assert large.take_over(small)
    assert large.broken_by[at] == "pgd10"
    assert torch.equal(large.examples[at], small.examples[at])
    assert not large.take_over(small), "nothing is new the second time"


def test_a_curve_that_was_altered_is_refused(task, tmp_path):
    list(run_curve(tasks(task, *BUDGETS[:2]), tmp_path))
    path = tmp_path / "curve.json"
    content = json.loads(path.read_text())
    content["points"][1]["worst_case"]["correct"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="does not follow from the evaluations beside it"):
        read_curve(tmp_path)
    path.write_text("{}")
    with pytest.raises(RunError, match=r"curve\.json: cannot be read"):
        curve_folders(tmp_path)


def test_a_folder_of_one_evaluation_does_not_become_a_curve(task, tmp_path):
    list(runner.run_evaluation(task, tmp_path))
    with pytest.raises(RunError, match=r"is no curve's: it holds ledger\.csv, an evaluation's"):
        list(run_curve(tasks(task), tmp_path))
