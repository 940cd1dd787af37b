"""report --format robustbench and model-card on the folder of a real evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from robustmail.evaluation.evaluator import as_floats
from robustmail.evaluation.model_loading import LoadedModel
from robustmail.evaluation.runner import run_evaluation
from robustmail.evaluation.task import EvaluationTask
from robustmail.report import robustbench
from tests.security.folders import call

pytestmark = pytest.mark.long
N = 12


@pytest.fixture(scope="module")
def evaluated(digit_images, tmp_path_factory) -> tuple[nn.Module, Path]:
    """A linear model of a few digits, and its evaluation with aa."""
    data = digit_images.first(N)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    model[1].weight.data = torch.stack([as_floats(data.part.x)[data.part.y == c].mean(0).flatten() if
                                        (data.part.y == c).any() else torch.zeros(64) for c in range(10)])  # fmt: skip
    folder = tmp_path_factory.mktemp("publish") / "e"
    list(run_evaluation(EvaluationTask(LoadedModel.of(model, data), data, ("nat", "aa"), 8 / 255), folder))
    return model, folder


def test_what_is_no_leaderboard_number_is_refused_and_nothing_written(evaluated, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = call(capsys, "report", evaluated[1], "--format", "robustbench")
    assert (code, said.count("\n")) == (2, 1)
    assert "not a leaderboard number: the data are digits; 12 of 10,000 images" in said
    assert list(tmp_path.iterdir()) == []


def test_the_pack_of_a_leaderboard_number(evaluated, digit_images, capsys, tmp_path, monkeypatch):
    """As if CIFAR-10 were these few digits."""
    model, folder = evaluated
    results = json.loads((folder / "results.json").read_text())
    monkeypatch.setattr(robustbench, "IMAGES", N)
    monkeypatch.setattr(robustbench, "FINGERPRINTS", {results["data"]["fingerprint"]: "cifar10"})
    monkeypatch.chdir(tmp_path)
    Path("paper.toml").write_text('title = "Few digits"\nauthors = "Ann Other"\nvenue = "X 2026"\n')
    words = ("report", folder, "--format", "robustbench", "--paper", "paper.toml", "--out", "pack")
    code, out, said = call(capsys, *words)
    assert code == 0, said
    names = ("model_info/cifar10/Linf/Other2026Few.json", "Other2026Few-new-model.md",
             "Other2026Few-external-evaluation.md", "Other2026Few-adversarial.pt")  # fmt: skip
    assert sorted(p.relative_to("pack").as_posix() for p in Path("pack").rglob("*") if p.is_file()) == sorted(names)
    info = json.loads(Path("pack", names[0]).read_text())
    robustbench.check_model_info(info)
    aa = next(row for row in results["attacks"] if row["name"] == "aa")
    assert info["autoattack_acc"] == f"{100 * aa['accuracy']:.2f}"
    assert out.endswith("in a file for --paper: link, additional_data\n")
    images = torch.load(Path("pack", names[3]), weights_only=True)
    assert (model(images).argmax(1) == digit_images.part.y[:N]).sum() == results["worst_case"]["correct"]


def test_a_card_is_of_one_model(evaluated, capsys, tmp_path):
    folder = evaluated[1]
    assert call(capsys, "report", folder, "--format", "model-card", "--out", tmp_path / "README.md")[0] == 0
    assert len(ModelCard.load(tmp_path / "README.md").data.eval_results) >= 3
    said = call(capsys, "report", folder, folder, "--format", "model-card")[2]
    assert "a card is of one model. Name one folder." in said
    assert "Did you mean 'model-card'" in call(capsys, "report", folder, "--format", "modelcard")[2]
